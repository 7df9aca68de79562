"""What one attention replacement layer does on held-out contexts.

Shape legend: B contexts, T positions, N = B*T rows, M heads, G groups that share a pattern, C columns, D = d_model.

Normalised MSE is a ratio of sums over counted positions, the target centred by its training mean. A head is *active* at
a position where it writes more than 1% of the target's size there: the mean number of active heads is the L0 of a
replacement layer. A head is *alive* when it is active anywhere in the held-out contexts. Effective rank is the
exponential of the entropy of a form's singular values (Roy and Vetterli 2007): of W_Q' W_K at distance 0, and of
W_V' W_O. Pattern entropy is in nats, the mean over counted rows; 0 is a row with one key.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from pydantic import BaseModel
from torch import Tensor

from crosshead.activations.base_model import LanguageModel
from crosshead.analysis.evaluation import EvaluationConfig
from crosshead.analysis.splicing import Splicing, cross_entropy_recovered
from crosshead.attention import wide
from crosshead.attention.replacement import WRITES, Module
from crosshead.attention.replacement_config import Combined
from crosshead.dictionaries.base import Batch

__all__ = ["ReplacementEvaluation", "Spread", "each_pattern", "effective_ranks", "evaluate"]

_QUANTILES = (0.1, 0.5, 0.9)


class Spread(BaseModel):
    """How a figure is spread over the live heads (or groups)."""

    mean: float
    low: float
    """10% of them lie below."""
    median: float
    high: float
    """10% of them lie above."""


class ReplacementEvaluation(BaseModel):
    """Figures of one replacement layer on held-out contexts."""

    n_tokens: int
    n_contexts: int
    normalised_mse: float
    normalised_mse_refit: float
    """After one least-squares factor on the prediction."""
    l0: float
    """Active heads per counted position."""
    heads: int
    heads_alive: int
    dead_fraction: float
    gates_open: int | None
    """Heads whose gate is above 0; None without gates."""
    rank_qk: Spread
    """Effective rank of the QK form, over live groups; of combined ones, QK features active at once are the rank."""
    rank_ov: Spread
    """Effective rank of the OV map, over live heads."""
    pattern_entropy: Spread
    """Of pattern rows, nats, over live groups; the first token counts as a key."""
    first_token: Spread
    """Attention on the beginning-of-text token, over live groups."""
    energy_share: Spread
    """Share of the squares of what all live heads write that is one head's, times the number of live heads."""
    head_counts: list[int]
    """Positions at which each head was active."""
    context_squared_error: list[float]
    context_variance: list[float]
    ce_recovered: float | None = None
    """Against mean ablation; None without the base model."""
    ce_recovered_zero: float | None = None
    """Against zero ablation."""
    splicing: Splicing | None = None


@torch.no_grad()
def evaluate(
    module: Module,
    heldout: Iterable[Batch],
    config: EvaluationConfig,
    *,
    train: Sequence[Batch] = (),
    model: LanguageModel | None = None,
) -> ReplacementEvaluation:
    """Evaluate a replacement layer in eval mode; with the base model, on its first contexts also spliced into it.

    Nothing is fitted here, so ``train`` is not read. ValueError when there is no counted position.
    """
    assert not module.training, "evaluate a replacement layer in eval mode"
    sums, kept = _Sums(module), []
    for batch in heldout:
        sums.add(batch)
        if model is not None and (room := config.splice_contexts - sum(len(b.mask) for b in kept)) > 0:
            kept.append(_first(batch, room))
    if not sums.n_tokens:
        raise ValueError("no held-out positions to evaluate on; raise corpus.heldout_contexts")
    alive = sums.active > 0
    live_groups = alive.view(module.config.groups, -1).any(1)
    qk, ov = effective_ranks(module)
    error, variance = sum(sums.error), sum(sums.variance)
    entropy, first = sums.entropy / sums.n_tokens, sums.first / sums.n_tokens
    energy = sums.energy[alive]
    spliced = None if model is None else cross_entropy_recovered(module, model, kept)  # pyright: ignore[reportArgumentType]
    return ReplacementEvaluation(
        n_tokens=sums.n_tokens,
        n_contexts=len(sums.error),
        normalised_mse=error / variance,
        normalised_mse_refit=1.0 - sums.cross**2 / max(sums.power * variance, 1e-30),
        l0=float(sums.active.sum()) / sums.n_tokens,
        heads=len(alive),
        heads_alive=int(alive.sum()),
        dead_fraction=float((~alive).double().mean()),
        gates_open=None if module.config.gates is None else int((module.gate > 0).sum()),
        rank_qk=_spread(qk[live_groups]),
        rank_ov=_spread(ov[alive]),
        pattern_entropy=_spread(entropy[live_groups]),
        first_token=_spread(first[live_groups]),
        energy_share=_spread(energy / energy.mean() if len(energy) else energy),
        head_counts=sums.active.tolist(),
        context_squared_error=sums.error,
        context_variance=sums.variance,
        ce_recovered=None if spliced is None else spliced.ce_recovered,
        ce_recovered_zero=None if spliced is None else spliced.ce_recovered_zero,
        splicing=spliced,
    )


def _first(batch: Batch, n_contexts: int) -> Batch:
    sites = {site: tensor[:n_contexts] for site, tensor in batch.sites.items()}
    return Batch(sites, batch.mask[:n_contexts], batch.tokens[:n_contexts])


class _Sums:
    """Running float64 sums."""

    def __init__(self, module: Module):
        self.module = module
        groups, heads = module.config.groups, module.config.features
        self.error: list[float] = []
        self.variance: list[float] = []
        self.cross = self.power = 0.0
        self.active = torch.zeros(heads, dtype=torch.long)
        self.energy = torch.zeros(heads, dtype=torch.float64)
        self.entropy, self.first = (torch.zeros(groups, dtype=torch.float64) for _ in range(2))
        self.n_tokens = 0

    def add(self, batch: Batch) -> None:
        module, mask = self.module, batch.mask
        z = module.encode(batch)
        target = module.target(batch).double() * mask[..., None]
        prediction = module.decode(z, batch).double() * mask[..., None]
        self.error += (target - prediction).square().sum((1, 2)).tolist()
        self.variance += target.square().sum((1, 2)).tolist()
        self.cross += float((target * prediction).sum())
        self.power += float(prediction.square().sum())
        sizes = module.sizes(z)[mask.flatten()]
        self.active += (sizes > WRITES * target[mask].norm(dim=1, keepdim=True)).sum(0).cpu()
        self.energy += sizes.double().square().sum(0).cpu()
        self.n_tokens += batch.n_counted
        for groups, pattern in each_pattern(module, batch):
            self.entropy[groups] += (_row_entropy(pattern) * mask[:, None]).double().sum((0, 2)).cpu()
            self.first[groups] += (pattern[..., 0] * mask[:, None]).double().sum((0, 2)).cpu()


def each_pattern(module: Module, batch: Batch) -> Iterable[tuple[slice, Float[Tensor, "B g T T"]]]:
    """Patterns of all groups, a few at a time, with the groups they belong to."""
    q, k = module.queries_keys(batch)
    allowed = wide.allowed_keys(batch.mask)
    n_contexts, n_positions = batch.mask.shape
    size = wide.heads_at_a_time(n_contexts, n_positions, q.element_size(), module.config.patterns_mib)
    for start in range(0, module.config.groups, size):
        groups = slice(start, min(start + size, module.config.groups))
        yield groups, wide.patterns(q[:, groups], k[:, groups], allowed, module.scale)


def _row_entropy(pattern: Float[Tensor, "B g T T"]) -> Float[Tensor, "B g T"]:
    return torch.special.entr(pattern).sum(-1)


@torch.no_grad()
def effective_ranks(module: Module) -> tuple[Float[Tensor, " G"], Float[Tensor, " M"]]:
    """Effective ranks of every group's QK form and every head's OV map; 0 for a map that is zero."""
    if isinstance(module.config.variant, Combined):
        qk = torch.full((module.config.groups,), float(module.config.variant.qk_active), dtype=torch.float64)
        values: Any = module.encoder.weight
    else:
        qk, values = _ranks(module.query, module.key), module.value
    heads = module.config.features
    return qk, _ranks(values.unflatten(0, (heads, -1)), module.out.unflatten(0, (heads, -1)))


def _ranks(left_nED: Tensor, right_nED: Tensor) -> Float[Tensor, " n"]:
    """Exp entropy of the singular values of left' right, from small matrices only."""
    cores = [torch.linalg.qr(side.double().transpose(1, 2), mode="r").R for side in (left_nED, right_nED)]
    values = torch.linalg.svdvals(cores[0] @ cores[1].transpose(1, 2))
    total = values.sum(1, keepdim=True)
    shares = values / total.clamp(min=1e-300)
    return torch.where(total[:, 0] > 1e-12, torch.special.entr(shares).sum(1).exp(), 0.0).cpu()


def _spread(values: Tensor) -> Spread:
    if not len(values):
        return Spread(mean=0.0, low=0.0, median=0.0, high=0.0)
    low, median, high = torch.quantile(values.double(), values.new_tensor(_QUANTILES, dtype=torch.float64)).tolist()
    return Spread(mean=float(values.double().mean()), low=low, median=median, high=high)

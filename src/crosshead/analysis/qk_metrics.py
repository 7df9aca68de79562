"""How well QK features predict where heads attend, on held-out contexts.

Shape legend: B contexts, G heads, T positions (t query, s key).

Everything is measured over counted queries, twice: over the keys a query may attend to without the beginning-of-text
key (the default), and with it, which takes most of the attention of most heads.

- normalised MSE of scores: squared error over squared size, both of scores centred per query over the keys in question,
  summed over queries and keys; per head, and the mean over heads (design choice: a head with large scores would decide
  a ratio of sums). Patterns likewise, their variance taken around the uniform pattern.
- KL(model's pattern || predicted pattern), nats per query; agreement on the key with the most attention.
- L0: active features per position, query side and key side; pair L0: features active on both sides of a pair, mean over
  allowed pairs. A pair costs its pair L0, so frontiers are over that.
- Cross-entropy with the predicted scores in place of the model's (``qk_patching``).

After Jermyn et al., Progress on Attention (2025); centring and the per-head mean are design choices.
"""

from collections.abc import Iterable, Sequence

import torch
from jaxtyping import Float
from pydantic import BaseModel
from torch import Tensor

from crosshead.activations.base_model import LanguageModel
from crosshead.analysis.evaluation import EvaluationConfig
from crosshead.analysis.qk_errors import ScoreErrors
from crosshead.analysis.qk_patching import Patching, patch_scores
from crosshead.analysis.qk_references import Reference, measure_references
from crosshead.attention.qk_diagonal import Module
from crosshead.dictionaries.base import Batch

__all__ = ["KeySet", "QKEvaluation", "evaluate"]


class KeySet(BaseModel):
    """Errors over one choice of keys; means over heads."""

    normalised_mse: float
    normalised_mse_pattern: float
    kl: float
    top1_agreement: float
    per_head: list[dict[str, float]]
    """``{head, normalised_mse, normalised_mse_pattern, kl, top1_agreement}``."""


class QKEvaluation(BaseModel):
    """Figures of one QK diagonalization."""

    n_tokens: int
    n_contexts: int
    l0: float
    """Pair L0."""
    l0_query: float
    l0_key: float
    normalised_mse: float
    """Of centred scores, without the beginning-of-text key."""
    keys: KeySet
    """Without the beginning-of-text key."""
    keys_with_first: KeySet
    dead_fraction: float
    """Features that are never active on both sides of an allowed pair's context."""
    context_squared_error: list[float]
    """Per context, centred scores in units of each head's size, summed over heads."""
    context_variance: list[float]
    references: list[Reference] = []
    patching: Patching | None = None


class _Sums:
    def __init__(self, n_heads: int):
        self.totals = torch.zeros(6, n_heads, dtype=torch.float64)
        self.n_queries = 0
        self.context_error: list[float] = []
        self.context_variance: list[float] = []

    def add(self, found: ScoreErrors, allowed: Tensor, sizes: Float[Tensor, " G"]) -> None:
        self.totals += torch.stack([part.sum(0) for part in found]).cpu()
        self.n_queries += int(allowed.any(-1).sum())
        squares = sizes.double().square()
        self.context_error += (found.squared_error / squares).sum(1).tolist()
        self.context_variance += (found.variance / squares).sum(1).tolist()

    def keys(self, heads: Sequence[int]) -> KeySet:
        error, variance, pattern_error, pattern_variance, kl, agreement = self.totals
        n = max(self.n_queries, 1)
        columns = {
            "normalised_mse": error / variance.clamp(min=1e-30),
            "normalised_mse_pattern": pattern_error / pattern_variance.clamp(min=1e-30),
            "kl": kl / n,
            "top1_agreement": agreement / n,
        }
        per_head = [{"head": h} | {name: float(column[g]) for name, column in columns.items()}
                    for g, h in enumerate(heads)]  # fmt: skip
        return KeySet(**{name: float(column.mean()) for name, column in columns.items()}, per_head=per_head)


@torch.no_grad()
def evaluate(
    module: Module,
    heldout: Iterable[Batch],
    config: EvaluationConfig,
    *,
    train: Sequence[Batch] = (),
    model: LanguageModel | None = None,
) -> QKEvaluation:
    """Evaluate a QK diagonalization in eval mode; references are fitted on ``train``, where it is given.

    ValueError when there is no counted position.
    """
    assert not module.training, "evaluate a model in eval mode"
    heads = module.heads.tolist()
    without, with_first = _Sums(len(heads)), _Sums(len(heads))
    active = torch.zeros(2, dtype=torch.float64)
    pairs = n_pairs = 0.0
    alive = torch.zeros(module.config.features, dtype=torch.bool)
    n_tokens, detail = 0, []
    for batch in heldout:
        sides = module.sides(batch)
        predicted, true = module.scores_of(sides, batch), module.true_scores(batch)
        for sums, allowed in ((without, module.positions.allowed(batch.mask)),
                              (with_first, module.positions.allowed_with_first(batch.mask))):  # fmt: skip
            sums.add(ScoreErrors.of(module, predicted, true, allowed, batch.mask), allowed, module.score_size)
        on = [(codes.codes.to_dense() != 0).view(*batch.mask.shape, -1) for codes in sides[:2]]
        active += torch.tensor([float(x.sum()) for x in on])
        allowed = module.positions.allowed(batch.mask)[:, 0]
        pairs += float(((on[0].float() @ on[1].float().transpose(1, 2)) * allowed).double().sum())
        n_pairs += float(allowed.sum())
        alive |= (on[0].any(1) & on[1].any(1)).any(0).cpu()
        n_tokens += batch.n_counted
        if sum(len(b.mask) for b in detail) < config.detail_contexts:
            detail.append(batch)
    if not n_tokens:
        raise ValueError("no held-out positions to evaluate on; raise corpus.heldout_contexts")
    keys, fitted_on = without.keys(heads), train or detail
    n_patched = config.splice_contexts
    return QKEvaluation(
        n_tokens=n_tokens,
        n_contexts=len(without.context_error),
        l0=pairs / max(n_pairs, 1.0),
        l0_query=float(active[0]) / n_tokens,
        l0_key=float(active[1]) / n_tokens,
        normalised_mse=keys.normalised_mse,
        keys=keys,
        keys_with_first=with_first.keys(heads),
        dead_fraction=float((~alive).double().mean()),
        context_squared_error=without.context_error,
        context_variance=without.context_variance,
        references=measure_references(module, train, detail) if train else [],
        patching=None if model is None else patch_scores(module, model, fitted_on, detail, n_patched),
    )

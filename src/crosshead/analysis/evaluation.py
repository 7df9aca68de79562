"""What one dictionary does on held-out contexts.

Normalised MSE is a ratio of sums over all counted positions, the target centred by its training mean. Sums are taken in
float64 context by context, so the result does not depend on how contexts are batched.

L0 says of what: ``l0`` counts key-side activations per position; ``l0_query`` features whose moved activation writes
more than 1% of the target's size at a position; ``l0_triples`` (feature, from, to) moves above that, per position.
"""

from collections.abc import Iterable, Sequence
from typing import Annotated, Any

import torch
from jaxtyping import Float
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from crosshead.analysis.pruning import Pruned, pruned_errors
from crosshead.dictionaries.base import Batch, Dictionary
from crosshead.maths.statistics import participation_ratio

__all__ = ["Evaluation", "EvaluationConfig", "SiteError", "Superposition", "evaluate"]

_DENSITY_EDGES = (-6.0, -5.0, -4.5, -4.0, -3.5, -3.0, -2.5, -2.0, -1.5, -1.0, -0.5, 0.0)


class EvaluationConfig(BaseModel):
    """How much held-out data evaluation reads."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    contexts_per_batch: Annotated[int, Field(gt=0)] = 4
    """Held-out contexts read at a time; does not change any result."""
    detail_contexts: Annotated[int, Field(gt=0)] = 8
    """Held-out contexts for what costs a dense product per head: contributions of heads, query-side counts, pruning."""
    refit_contexts: Annotated[int, Field(gt=0)] = 16
    """Training contexts on which gains are refitted when features keep few of their movers."""
    splice_contexts: Annotated[int, Field(gt=0)] = 8
    """Held-out contexts on which the reconstruction is spliced into the base model."""


class SiteError(BaseModel):
    """Squared error and variance of one target site, summed over counted positions and its columns."""

    site: str
    squared_error: float
    variance: float


class Superposition(BaseModel):
    """How a dictionary's features spread over heads, from what the heads contribute (not from the loadings alone)."""

    participation_ratio_median: float
    """(sum_h c_h^2)^2 / sum_h c_h^4 over the real heads; 1 is one head. Median over live features."""
    participation_ratio_mean: float
    """Its mean over live features."""
    identity_share: float
    """Share of the energy written by all movers of all live features that went through the identity."""
    n_features: int
    """Live features that at least one real head moves: those the participation ratios are over."""


class Evaluation(BaseModel):
    """Figures of one dictionary on held-out contexts; sums and means over counted positions."""

    n_tokens: int
    n_contexts: int
    l0: float
    l1: float
    """Mean of sum_i f_i n_i."""
    normalised_mse: float
    normalised_mse_refit: float
    """After one least-squares factor on the prediction: what is left when shrinkage is undone."""
    shrinkage: float
    """<prediction, target> / ||prediction||^2: the factor; above 1 the prediction is too small."""
    dead_fraction: float
    """Features never active in these contexts."""
    feature_counts: list[int]
    """Positions at which each feature was active; kept beside the run's weights, not in its metrics record."""
    density_histogram: list[int]
    """Features per bin of log10(share of positions where active); edges in ``density_edges``, dead ones left out."""
    density_edges: list[float]
    sites: list[SiteError]
    context_squared_error: list[float]
    context_variance: list[float]
    l0_query: float | None = None
    l0_triples: float | None = None
    superposition: Superposition | None = None
    pruned: list[Pruned] = []
    n_tokens_detail: int = 0
    """Positions behind ``l0_query``, ``l0_triples``, ``superposition`` and ``pruned``."""


class _Sums:
    """Running float64 sums."""

    def __init__(self, module: Dictionary):
        self.widths = list(module.target_widths)
        self.error: list[float] = []
        self.variance: list[float] = []
        self.site_error = torch.zeros(len(self.widths), dtype=torch.float64)
        self.site_variance = torch.zeros(len(self.widths), dtype=torch.float64)
        self.cross = self.power = self.l1 = 0.0
        self.active = torch.zeros(module.config.features, dtype=torch.long)
        self.n_tokens = 0

    def add(self, module: Dictionary, batch: Batch) -> None:
        codes = module.encode(batch)
        target, prediction = module.target(batch).double(), module.decode(codes, batch).double()
        mask = batch.mask[..., None]
        target, prediction = target * mask, prediction * mask
        squared_error, squared = (target - prediction).square(), target.square()
        self.error += squared_error.sum((1, 2)).tolist()
        self.variance += squared.sum((1, 2)).tolist()
        self.site_error += _by_site(squared_error, self.widths)
        self.site_variance += _by_site(squared, self.widths)
        self.cross += float((target * prediction).sum())
        self.power += float(prediction.square().sum())
        on = codes.values != 0
        self.active += torch.bincount(codes.columns[on], minlength=len(self.active)).cpu()
        self.l1 += float((codes.values.double() * module.feature_norms().double()[codes.columns]).sum())
        self.n_tokens += batch.n_counted


def _by_site(squares: Tensor, widths: list[int]) -> Tensor:
    return torch.stack([part.sum() for part in squares.split(widths, dim=-1)]).cpu()


@torch.no_grad()
def evaluate(
    module: Dictionary, batches: Iterable[Batch], config: EvaluationConfig, train: Sequence[Batch] = ()
) -> Evaluation:
    """Evaluate a dictionary in eval mode; ``train`` holds the contexts that gains are refitted on.

    ValueError when there is no counted position.
    """
    assert not module.training, "evaluate a dictionary in eval mode"
    sums, detail = _Sums(module), _Detail(module)
    for batch in batches:
        sums.add(module, batch)
        detail.add(batch, config.detail_contexts)
    if not sums.n_tokens:
        raise ValueError("no held-out positions to evaluate on; raise corpus.heldout_contexts")
    error, variance = sum(sums.error), sum(sums.variance)
    density = sums.active[sums.active > 0].double() / sums.n_tokens
    histogram = torch.histogram(density.log10(), torch.tensor(_DENSITY_EDGES, dtype=torch.float64)).hist
    return Evaluation(
        n_tokens=sums.n_tokens,
        n_contexts=len(sums.error),
        l0=float(sums.active.sum()) / sums.n_tokens,
        l1=sums.l1 / sums.n_tokens,
        normalised_mse=error / variance,
        normalised_mse_refit=1.0 - sums.cross**2 / max(sums.power * variance, 1e-30),
        shrinkage=sums.cross / max(sums.power, 1e-30),
        dead_fraction=float((sums.active == 0).double().mean()),
        feature_counts=sums.active.tolist(),
        density_histogram=[int(n) for n in histogram],
        density_edges=list(_DENSITY_EDGES),
        sites=[
            SiteError(site=str(site), squared_error=float(e), variance=float(v))
            for site, e, v in zip(module.target_sites, sums.site_error, sums.site_variance, strict=True)
        ],
        context_squared_error=sums.error,
        context_variance=sums.variance,
        **detail.results(sums.active > 0, train),
    )


class _Detail:
    """Head contributions, query-side counts and pruning, for dictionaries that move features."""

    def __init__(self, module: Any) -> None:
        self.module = module if hasattr(module, "contributions") else None
        self.batches: list[Batch] = []

    def add(self, batch: Batch, limit: int) -> None:
        """Keep the first ``limit`` contexts of the evaluation set."""
        room = limit - sum(len(kept.mask) for kept in self.batches)
        if self.module is not None and room > 0:
            self.batches.append(batch if len(batch.mask) <= room else _first(batch, room))

    def results(self, live: Tensor, train: Sequence[Batch]) -> dict[str, Any]:
        n_tokens = sum(batch.n_counted for batch in self.batches)
        if self.module is None or not n_tokens:
            return {}
        energy = torch.stack([self.module.contributions(batch).double().cpu() for batch in self.batches]).sum(0)
        counts = [self.module.moved_counts(batch) for batch in self.batches]
        return {
            "l0_query": sum(moved for moved, _ in counts) / n_tokens,
            "l0_triples": sum(triples for _, triples in counts) / n_tokens,
            "superposition": _superposition(energy[:, live]),
            "pruned": pruned_errors(self.module, train, self.batches),
            "n_tokens_detail": n_tokens,
        }


def _first(batch: Batch, n_contexts: int) -> Batch:
    sites = {site: tensor[:n_contexts] for site, tensor in batch.sites.items()}
    return Batch(sites, batch.mask[:n_contexts], batch.tokens[:n_contexts])


def _superposition(energy: Float[Tensor, "M live"]) -> Superposition | None:
    """None where no feature was moved by any real head."""
    by_heads = energy[1:, energy[1:].sum(0) > 0]
    if not by_heads.shape[1]:
        return None
    ratio = participation_ratio(by_heads)
    return Superposition(
        participation_ratio_median=float(ratio.median()),
        participation_ratio_mean=float(ratio.mean()),
        identity_share=float(energy[0].sum() / energy.sum()),
        n_features=len(ratio),
    )

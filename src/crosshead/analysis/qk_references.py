"""What a head's scores cost without any feature: references for every frontier of QK features.

Shape legend: G heads, E head width, D distances, R rank.

- ``svd/R``: the head's form on rotated queries and keys, truncated to R dimensions of its data-weighted singular value
  decomposition: dense rank-1 features, R of them active on every pair, and one for the mean query.
- ``svd-content/R``: the same on un-rotated ones, under the mean rotation: what content alone can say.
- ``coordinates/R``: the R strongest of the E coordinates, as signed features (query and key each split by sign, so that
  at most one feature of a coordinate is active on a pair); exact at pair L0 = E.
- ``mean-score``: the mean score at every distance, whatever stands there.
- ``mean-query-key``: the exact scores of the mean query with every key and of every query with the mean key.

None is a limit: features that are sparse can do better than any fixed few dimensions.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from jaxtyping import Float
from pydantic import BaseModel
from torch import Tensor

from crosshead.analysis.qk_errors import ScoreErrors
from crosshead.attention.qk_diagonal import Module, centred
from crosshead.attention.qk_start import balanced_coordinates, mean_rotation
from crosshead.dictionaries.base import Batch

__all__ = ["MeanScores", "Reference", "measure_references"]

_RANKS = (1, 2, 4, 8, 16, 32)


class Reference(BaseModel):
    """One reference on held-out contexts, beginning-of-text key left out; means over heads."""

    name: str
    l0: float
    """Features active on a pair; 0 where there are none."""
    normalised_mse: float
    kl: float
    per_head: list[float]
    """Normalised MSE of every head."""


class MeanScores:
    """The mean score of every head at every distance, over counted pairs, and of the beginning-of-text key."""

    def __init__(self, module: Module, train: Sequence[Batch]):
        length = train[0].mask.shape[1]
        total = torch.zeros(len(module.heads), length, dtype=torch.float64, device=module.heads.device)
        count, first, n_queries = total.new_zeros(length), total.new_zeros(len(module.heads)), 0
        place = torch.arange(length, device=total.device)
        self.distance = (place[:, None] - place).clamp(min=0)
        for batch in train:
            allowed = module.positions.allowed(batch.mask)
            true = module.true_scores(batch).double()
            total.index_add_(1, self.distance.flatten(), (true * allowed).sum(0).flatten(1))
            count.index_add_(0, self.distance.flatten(), allowed.double().sum((0, 1)).flatten())
            first += (true[..., 0] * batch.mask[:, None]).sum((0, 2))
            n_queries += batch.n_counted
        self.by_distance = (total / count.clamp(min=1)).float()
        self.first = (first / max(n_queries, 1)).float()

    def scores(self, batch: Batch) -> Float[Tensor, "B G T T"]:
        """The same for every context."""
        length = batch.mask.shape[1]
        scores = self.by_distance[:, self.distance[:length, :length]].clone()
        scores[..., 0] = self.first[:, None]
        return scores.expand(len(batch.mask), *scores.shape)


@torch.no_grad()
def measure_references(module: Module, train: Sequence[Batch], heldout: Sequence[Batch]) -> list[Reference]:
    """Every reference for the module's heads, fitted on ``train``."""
    sums: dict[str, Tensor] = {}
    l0s: dict[str, float] = {}
    n_queries = 0
    predictors = list(_predictors(module, train))
    for batch in heldout:
        allowed, true = module.positions.allowed(batch.mask), module.true_scores(batch)
        n_queries += int(allowed.any(-1).sum())
        for name, l0, predict in predictors:
            found = ScoreErrors.of(module, predict(batch), true, allowed, batch.mask)
            parts = torch.stack([found.squared_error.sum(0), found.variance.sum(0), found.kl.sum(0)]).cpu()
            sums[name] = sums.get(name, 0.0) + parts
            l0s[name] = l0
    records = []
    for name, (error, variance, kl) in sums.items():
        per_head = error / variance.clamp(min=1e-30)
        records.append(Reference(name=name, l0=l0s[name], normalised_mse=float(per_head.mean()),
                                 kl=float(kl.mean()) / max(n_queries, 1), per_head=per_head.tolist()))  # fmt: skip
    return records


def _predictors(module: Module, train: Sequence[Batch]) -> Iterator[tuple[str, float, Callable[[Batch], Tensor]]]:
    """Name, pair L0 and predicted scores of every reference."""
    width = module.dims.head_dim
    means = MeanScores(module, train)
    yield "mean-score", 0.0, means.scores
    yield "mean-query-key", 0.0, module.base_scores
    form = mean_rotation(module, train[0].mask.shape[1])
    eye = torch.eye(width, device=module.heads.device)
    for name, unrotated, own_form in (("svd", False, eye), ("svd-content", True, form)):
        fitted = _Forms(module, train, own_form, unrotated)
        for rank in (r for r in _RANKS if r <= width):
            yield f"{name}/{rank}", rank + 1.0, lambda batch, fitted=fitted, rank=rank: fitted.scores(batch, rank)
    coordinates = _Coordinates(module, train)
    for rank in sorted({r for r in (*_RANKS, width) if r <= width}):
        yield f"coordinates/{rank}", float(rank), lambda batch, rank=rank: coordinates.scores(batch, rank)


class _Forms:
    """Data-weighted singular value decompositions, one per head."""

    def __init__(self, module: Module, train: Sequence[Batch], form: Tensor, unrotated: bool):
        self.module, self.unrotated = module, unrotated
        rows = [self._both(batch) for batch in train]
        q, k = (torch.cat([x[i].transpose(1, 2)[b.mask] for x, b in zip(rows, train, strict=True)]) for i in (0, 1))
        self.mean_q, self.mean_k = q.mean(0), k.mean(0)
        maps = [
            balanced_coordinates(q[:, g] - self.mean_q[g], k[:, g] - self.mean_k[g], form) for g in range(q.shape[1])
        ]
        self.to_query, self.to_key = (torch.stack([found[i] for found in maps]) for i in (0, 1))
        self.form = form

    def _both(self, batch: Batch) -> tuple[Tensor, Tensor]:
        q, k = self.module.queries_keys(batch)
        unrotated = self.module.positions.unrotated
        return (unrotated(q), unrotated(k)) if self.unrotated else (q, k)

    def scores(self, batch: Batch, rank: int) -> Float[Tensor, "B G T T"]:
        """The truncated form of centred queries and keys, and the mean query's own form: one more dense dimension."""
        q, k = self._both(batch)
        q, k = q - self.mean_q[:, None], k - self.mean_k[:, None]
        truncated = (q @ self.to_query[..., :rank]) @ (k @ self.to_key[..., :rank]).transpose(-1, -2)
        mean_query = torch.einsum("ge,ef,bgsf->bgs", self.mean_q, self.form, k)
        return (truncated + mean_query[:, :, None]) * self.module.positions.scale


class _Coordinates:
    """The coordinates of rotated queries and keys, those first whose products vary most."""

    def __init__(self, module: Module, train: Sequence[Batch]):
        self.module = module
        power = 0.0
        for batch in train:
            q, k = module.queries_keys(batch)
            allowed = module.positions.allowed(batch.mask)
            parts = [centred(q[..., e : e + 1] @ k[..., e : e + 1].transpose(-1, -2), allowed).square().sum((0, 2, 3))
                     for e in range(q.shape[-1])]  # fmt: skip
            power = power + torch.stack(parts, dim=-1).double()
        assert isinstance(power, Tensor)
        self.order = power.argsort(dim=1, descending=True)

    def scores(self, batch: Batch, rank: int) -> Float[Tensor, "B G T T"]:
        q, k = self.module.queries_keys(batch)
        kept = torch.zeros(q.shape[1], q.shape[-1], device=q.device).scatter_(1, self.order[:, :rank], 1.0)
        return (q * kept[:, None]) @ k.transpose(-1, -2) * self.module.positions.scale

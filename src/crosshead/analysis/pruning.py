"""How many movers a feature needs: keep its strongest few, refit one gain per feature, measure.

Shape legend: n counted rows, F features, M movers (identity and heads), D width of the target, K choices of movers.

The movers of a feature are ranked by what they contribute over data, not by their loadings: patterns of heads are
collinear. Keeping m of them scales what the feature still moves, so every feature gets a gain a_i, fitted together on
training contexts: with g [n, F] what the kept movers bring and d_i the decoder rows, the squared error of
sum_i a_i g_i d_i is quadratic in a, its normal matrix (g'g) * (d d') elementwise. Error on held-out contexts against m
says whether the heads beyond the m-th matter. After the dose-response of Jermyn et al. (2025); the refit is a design
choice.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from pydantic import BaseModel
from torch import Tensor

from crosshead.dictionaries.base import Batch

__all__ = ["Pruned", "pruned_errors"]

_KEPT = (1, 2, 4)
_LARGEST = 16_384
"""Features up to which the [F, F] normal matrices are built, one per choice of movers (1 GiB each)."""
_RIDGE = 1e-4
"""Pull towards a gain of 1, over the mean eigenvalue: features that hardly fire in the sample keep theirs."""


class Pruned(BaseModel):
    """Held-out error with every feature on its strongest movers, gains refitted."""

    movers: int
    """Kept per feature, identity included."""
    normalised_mse: float
    n_tokens: int
    """Held-out positions."""


@torch.no_grad()
def pruned_errors(module: Any, train: Sequence[Batch], heldout: Sequence[Batch]) -> list[Pruned]:
    """One row for 1, 2, 4 and all movers that the dictionary keeps.

    Gains are fitted on ``train``, errors measured on ``heldout``; no row for dictionaries that move nothing, have more
    than 16,384 features, or without batches.
    """
    if not hasattr(module, "contributions") or module.config.features > _LARGEST or not train or not heldout:
        return []
    energies = torch.stack([module.contributions(batch) for batch in train]).sum(0)
    most = int((module.effective_loadings() != 0).sum(0).max())
    rank = energies.argsort(dim=0, descending=True, stable=True).argsort(dim=0, stable=True)
    counts = [*(m for m in _KEPT if m < most), most]
    kept = torch.stack([rank < m for m in counts])
    gains = _fit_gains(module, kept, train)
    errors, variance = torch.zeros(len(counts), dtype=torch.float64), 0.0
    for batch in heldout:
        moved, rest, target = _rows(module, kept, batch)
        for k, gain in enumerate(gains):
            errors[k] += (rest - (moved[k] * gain) @ module.decoder).double().square().sum().cpu()
        variance += float(target.double().square().sum())
    n_tokens = sum(batch.n_counted for batch in heldout)
    return [Pruned(movers=movers, normalised_mse=float(error) / variance, n_tokens=n_tokens)
            for movers, error in zip(counts, errors, strict=True)]  # fmt: skip


def _fit_gains(module: Any, kept: Bool[Tensor, "K M F"], batches: Sequence[Batch]) -> list[Float[Tensor, " F"]]:
    """The gains of every choice of movers."""
    decoder = module.decoder
    grams = decoder.new_zeros(len(kept), len(decoder), len(decoder))
    moments = decoder.new_zeros(len(kept), len(decoder))
    for batch in batches:
        moved, rest, _ = _rows(module, kept, batch)
        explained = rest @ decoder.T
        for k, own in enumerate(moved):
            grams[k].addmm_(own.T, own)
            moments[k] += (own * explained).sum(0)
    alike = decoder @ decoder.T
    return [_solve(gram * alike, moment).to(decoder.dtype) for gram, moment in zip(grams, moments, strict=True)]


def _solve(normal: Float[Tensor, "F F"], moment: Float[Tensor, " F"]) -> Float[Tensor, " F"]:
    """Gains that are pulled towards 1 where the sample says little."""
    normal = normal.double()
    pull = _RIDGE * normal.diagonal().mean() + 1e-12
    normal.diagonal().add_(pull)
    return torch.linalg.solve(normal, moment.double() + pull)


def _rows(
    module: Any, kept: Bool[Tensor, "K M F"], batch: Batch
) -> tuple[Float[Tensor, "K n F"], Float[Tensor, "n D"], Float[Tensor, "n D"]]:
    """At counted positions: what the kept movers bring, the target without bias and first token, the target."""
    codes = module.encode(batch)
    base = module.decode(codes.with_values(torch.zeros_like(codes.values)), batch)
    target = module.target(batch)
    return module.query_side_sums(batch, codes, kept)[:, batch.mask], (target - base)[batch.mask], target[batch.mask]

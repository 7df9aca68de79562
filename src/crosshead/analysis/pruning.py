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
_LARGEST = 8_192
"""Features up to which the [F, F] normal matrices are built, one per choice of movers (256 MiB each)."""
_PULL = 40.0
"""Pull towards a gain of 1, over the dictionary's mean squared error per entry: features that hardly fire in the sample
keep theirs, with few movers as with all. A normal prior of standard deviation 0.5 would be 4 if errors were
independent; they go on from one position to the next. Between 4 and 400 results move by 1%; at 0.02 gains of rare
features reached 7, and what was fitted on 16 contexts was worse on others than no refit at all."""


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
    than 8,192 features, or without batches.
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
    """The gains of every choice of movers; the last one is all of them."""
    decoder = module.decoder
    grams = decoder.new_zeros(len(kept), len(decoder), len(decoder))
    moments = decoder.new_zeros(len(kept), len(decoder))
    error, n_entries = decoder.new_zeros((), dtype=torch.float64), 0
    for batch in batches:
        moved, rest, _ = _rows(module, kept, batch)
        explained = rest @ decoder.T
        n_entries += rest.numel()
        for k, own in enumerate(moved):
            grams[k].addmm_(own.T, own)
            moments[k] += (own * explained).sum(0)
        error += (rest - moved[-1] @ decoder).double().square().sum()
    alike = decoder @ decoder.T
    pull = _PULL * error / n_entries
    return [_solve((gram * alike).double(), moment.double(), pull).to(decoder.dtype)
            for gram, moment in zip(grams, moments, strict=True)]  # fmt: skip


def _solve(normal: Float[Tensor, "F F"], moment: Float[Tensor, " F"], pull: Float[Tensor, ""]) -> Float[Tensor, " F"]:
    """The gains a that minimise a' normal a - 2 moment' a + pull ||a - 1||^2."""
    pull = pull + 1e-6 * normal.diagonal().mean() + 1e-12
    normal.diagonal().add_(pull)
    return torch.linalg.solve(normal, moment + pull)


def _rows(
    module: Any, kept: Bool[Tensor, "K M F"], batch: Batch
) -> tuple[Float[Tensor, "K n F"], Float[Tensor, "n D"], Float[Tensor, "n D"]]:
    """At counted positions: what the kept movers bring, the target without bias and first token, the target."""
    codes = module.encode(batch)
    base = module.decode(codes.with_values(torch.zeros_like(codes.values)), batch)
    target = module.target(batch)
    return module.query_side_sums(batch, codes, kept)[:, batch.mask], (target - base)[batch.mask], target[batch.mask]

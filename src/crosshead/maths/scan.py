"""The encoder's product and the choice of its active entries, tile by tile.

Shape legend: N rows, F features.

The product x W^T + b is the only dense work of a sparse dictionary. It is computed in tiles of whole columns that stay
within ``Engine.tile_mib``; active entries are read off a tile before the next one overwrites it, so no [N, F] matrix
exists. The choice depends on the tiles only between entries whose scores are equal to the bit.

A score is a pre-activation times ``scale`` [F] (not negative). Rows that do not count have no active entries. All
functions return codes whose values are pre-activations, outside autograd.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from crosshead.maths.backends import backend
from crosshead.maths.codes import SparseCodes
from crosshead.maths.engine import Engine
from crosshead.maths.forms import Product

__all__ = ["larger_entries", "largest_entries", "largest_per_row"]

# A floor too low costs some candidates, one too high the whole product again.
_SAMPLE_ROWS, _MARGIN, _SPARE = 16, 1.5, 32


@torch.no_grad()
def larger_entries(
    product: Product, scale: Float[Tensor, " F"], level: Float[Tensor, " F"], engine: Engine
) -> SparseCodes:
    """All entries whose score exceeds its feature's level."""
    return backend(product.x.device).larger_entries(product.detach(), scale.detach(), level.detach(), engine)


@torch.no_grad()
def largest_per_row(product: Product, scale: Float[Tensor, " F"], k: int, engine: Engine) -> SparseCodes:
    """The k largest positive scores of every row; fewer where fewer are positive."""
    k = min(k, len(product.weight))
    if k == 0:
        return larger_entries(product, scale, torch.full_like(scale, math.inf), engine)
    return backend(product.x.device).largest_per_row(product.detach(), scale.detach(), k, engine)


@torch.no_grad()
def largest_entries(product: Product, scale: Float[Tensor, " F"], count: int, engine: Engine) -> SparseCodes:
    """The ``count`` largest positive scores of the whole product; fewer if fewer are positive.

    A floor guessed from a few rows leaves few candidates, among which the choice is exact. If it left too few, it was
    too high, and everything is scanned again with a lower one, at last with none.
    """
    product, scale = product.detach(), scale.detach()
    for margin in (_MARGIN, 4 * _MARGIN, math.inf):
        floor = _guess_floor(product, scale, count, margin)
        candidates = larger_entries(product, scale, torch.full_like(scale, floor), engine)
        if len(candidates.columns) >= count or floor == 0.0:
            break
    if len(candidates.columns) <= count:
        return candidates
    return backend(product.x.device).keep_largest(candidates, scale, count)


def _guess_floor(product: Product, scale: Float[Tensor, " F"], count: int, margin: float) -> float:
    """A score that about ``margin`` times ``count`` entries exceed, if a few rows are like the others; at least 0."""
    if count == 0:
        return math.inf
    counted = torch.nonzero(product.mask).flatten()
    rows = counted[:: max(1, len(counted) // _SAMPLE_ROWS)]
    scores = ((product.x[rows] @ product.weight.T + product.bias) * scale).flatten()
    rank = _SPARE + margin * count * len(rows) / max(1, len(counted))
    if rank > len(scores):
        return 0.0
    return max(0.0, float(scores.kthvalue(len(scores) - math.ceil(rank) + 1).values))

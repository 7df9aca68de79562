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
_SAMPLE_SIDE, _SAMPLE_MARGIN, _SAMPLE_SPARE = 128, 1.4, 32


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
    return backend(product.x.device).largest_per_row(product.detach(), scale.detach(), k, engine)


@torch.no_grad()
def largest_entries(product: Product, scale: Float[Tensor, " F"], count: int, engine: Engine) -> SparseCodes:
    """The ``count`` largest positive scores of the whole product; fewer if fewer are positive.

    A floor guessed from a sample leaves few candidates, among which the choice is exact. If it left too few, it was
    too high, and everything is scanned again without it.
    """
    product, scale = product.detach(), scale.detach()
    floor = _guess_floor(product, scale, count) if count else math.inf
    candidates = larger_entries(product, scale, torch.full_like(scale, floor), engine)
    if len(candidates.columns) < count and floor > 0:
        candidates = larger_entries(product, scale, torch.zeros_like(scale), engine)
    if len(candidates.columns) <= count:
        return candidates
    return backend(product.x.device).keep_largest(candidates, scale, count)


def _guess_floor(product: Product, scale: Float[Tensor, " F"], count: int) -> float:
    """A score that somewhat more than ``count`` entries exceed, if a sample of rows and features is like the rest."""
    counted = torch.nonzero(product.mask).flatten()
    rows = counted[:: max(1, len(counted) // _SAMPLE_SIDE)]
    columns = slice(None, None, max(1, len(scale) // _SAMPLE_SIDE))
    scores = product.x[rows] @ product.weight[columns].T + product.bias[columns]
    scores = (scores * scale[columns]).flatten()
    rank = _SAMPLE_SPARE + math.ceil(_SAMPLE_MARGIN * count * len(scores) / max(1, len(counted) * len(scale)))
    if rank > len(scores):
        return 0.0
    return max(0.0, float(scores.kthvalue(len(scores) - rank + 1).values))

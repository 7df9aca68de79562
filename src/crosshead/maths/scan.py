"""The encoder's product and the choice of its active entries, tile by tile.

Shape legend: N rows, F features, X input width, C columns of a tile, Z active entries.

The product x W^T + b is the only dense work of a sparse dictionary. It is computed in tiles of whole columns that stay
within ``Engine.tile_mib``; active entries are read off a tile before the next one overwrites it, so no [N, F] matrix
exists. The choice depends on the tiles only between entries whose scores are equal to the bit.

A score is a pre-activation times ``scale`` [F] (not negative). Rows outside ``mask`` have no active entries. All
functions return codes whose values are pre-activations, outside autograd.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional

from crosshead.maths.codes import SparseCodes
from crosshead.maths.engine import Engine
from crosshead.maths.threads import even_ranges, on_ranges

__all__ = ["Product", "larger_entries", "largest_entries", "largest_per_row"]

_SAMPLE_STRIDE = 17  # odd, so that a sample meets every column of a tile
_SAMPLE_MARGIN = 1.5  # a floor too low costs some candidates, one too high the whole product again


class Product(NamedTuple):
    """An encoder's product x W^T + b, not computed yet."""

    x: Float[Tensor, "N X"]
    weight: Float[Tensor, "F X"]
    bias: Float[Tensor, " F"]
    mask: Bool[Tensor, " N"]
    """Rows that count."""

    def tiles(self, engine: Engine) -> Iterator[tuple[slice, Float[Tensor, "N C"]]]:
        """Columns and x W^T of them (without b), one tile after the other in the same memory."""
        n_rows, n_features = len(self.x), len(self.weight)
        width = int(engine.tile_mib * 2**20 / (max(n_rows, 1) * self.x.element_size()))
        width = min(max(width, 1), n_features)
        buffer = self.x.new_empty(n_rows * width)
        for first in range(0, n_features, width):
            columns = slice(first, min(first + width, n_features))
            tile = buffer[: n_rows * (columns.stop - first)].view(n_rows, -1)
            torch.mm(self.x, self.weight[columns].T, out=tile)
            yield columns, tile


@torch.no_grad()
def larger_entries(
    product: Product, scale: Float[Tensor, " F"], level: Float[Tensor, " F"], engine: Engine
) -> SparseCodes:
    """All entries whose score exceeds its feature's level."""
    product = Product(*(t.detach() for t in product))
    parts = [_read_larger(product, columns, tile, scale[columns], level[columns])
             for columns, tile in product.tiles(engine)]  # fmt: skip
    return _joined(parts, len(product.weight))


@torch.no_grad()
def largest_entries(product: Product, scale: Float[Tensor, " F"], count: int, engine: Engine) -> SparseCodes:
    """The ``count`` largest positive scores of the whole product; fewer if fewer are positive.

    A floor guessed from a sample of the first tile leaves few candidates, among which the choice is exact. If it left
    too few, it was wrong and everything is scanned again without it.
    """
    product = Product(*(t.detach() for t in product))
    parts, floor = [], None
    for columns, tile in product.tiles(engine):
        if floor is None:
            floor = _guess_floor(product, columns, tile, scale[columns], count)
        level = floor.expand(columns.stop - columns.start).contiguous()
        parts.append(_read_larger(product, columns, tile, scale[columns], level))
    candidates = _joined(parts, len(product.weight))
    if len(candidates.columns) < count and floor is not None and floor > 0:
        candidates = larger_entries(product, scale, torch.zeros_like(scale), engine)
    if len(candidates.columns) <= count:
        return candidates
    scores = candidates.values * scale[candidates.columns]
    least = scores.kthvalue(len(scores) - count + 1).values if count else scores.new_tensor(math.inf)
    kept = scores > least
    ties = torch.nonzero(scores == least).flatten()
    kept[ties[: count - int(kept.sum())]] = True
    offsets = functional.pad(kept.cumsum(0), (1, 0))[candidates.row_offsets]
    return SparseCodes(offsets, candidates.columns[kept], candidates.values[kept], candidates.n_features)


@torch.no_grad()
def largest_per_row(product: Product, scale: Float[Tensor, " F"], k: int, engine: Engine) -> SparseCodes:
    """The k largest positive scores of every row; fewer where fewer are positive."""
    product = Product(*(t.detach() for t in product))
    n_rows, n_features = len(product.x), len(product.weight)
    k = min(k, n_features)
    if product.x.device.type == "cpu":
        return _largest_per_row_cpu(product, scale, k, engine)
    best = product.x.new_zeros(n_rows, 0)
    best_values, best_columns = best, best.long()
    for columns, tile in product.tiles(engine):
        values = tile + product.bias[columns]
        scores = (values * scale[columns]).masked_fill_(~product.mask[:, None], 0.0)
        numbers = torch.arange(columns.start, columns.stop, device=tile.device).expand(n_rows, -1)
        everything = torch.cat([best, scores], 1)
        best, chosen = everything.topk(min(k, everything.shape[1]), dim=1)
        best_values = torch.cat([best_values, values], 1).gather(1, chosen)
        best_columns = torch.cat([best_columns, numbers], 1).gather(1, chosen)
    best_columns, order = best_columns.sort(dim=1)
    positive = best.gather(1, order) > 0
    offsets = functional.pad(positive.sum(1).cumsum(0), (1, 0))
    return SparseCodes(offsets, best_columns[positive], best_values.gather(1, order)[positive], n_features)


def _guess_floor(product: Product, columns: slice, tile: Tensor, scale: Tensor, count: int) -> Tensor:
    """A score that somewhat more than ``count`` entries of the whole product exceed, if all tiles are alike."""
    scores = ((tile + product.bias[columns]) * scale)[product.mask].flatten()[::_SAMPLE_STRIDE]
    if not len(scores):
        return scale.new_zeros(())
    share = (columns.stop - columns.start) / len(product.weight)
    rank = math.ceil(_SAMPLE_MARGIN * count * share / _SAMPLE_STRIDE) + 64
    if rank >= len(scores):
        return scale.new_zeros(())
    return scores.kthvalue(len(scores) - rank + 1).values.clamp(min=0.0)


# ---- one tile ----


def _read_larger(
    product: Product, columns: slice, tile: Float[Tensor, "N C"], scale: Float[Tensor, " C"], level: Float[Tensor, " C"]
) -> SparseCodes:
    """The entries of one tile, in columns of the whole product."""
    n_rows, n_features = tile.shape[0], len(product.weight)
    bias = product.bias[columns]
    if tile.device.type != "cpu":
        values = tile + bias
        active = (values * scale > level) & product.mask[:, None]
        part = SparseCodes.from_dense(values, active)
        return SparseCodes(part.row_offsets, part.columns + columns.start, part.values, n_features)
    from crosshead.maths import kernels_cpu

    inputs = [t.numpy() for t in (tile, bias, scale, level, product.mask)]
    counts = torch.empty(n_rows, dtype=torch.long)
    on_ranges(kernels_cpu.count_above, even_ranges(n_rows), *inputs, counts.numpy())
    offsets = functional.pad(counts.cumsum(0), (1, 0))
    found = torch.empty(int(offsets[-1]), dtype=torch.long)
    values = tile.new_empty(len(found))
    outputs = [t.numpy() for t in (found, values)]
    on_ranges(kernels_cpu.fill_above, even_ranges(n_rows), *inputs, offsets.numpy(), columns.start, *outputs)
    return SparseCodes(offsets, found, values, n_features)


def _joined(parts: list[SparseCodes], n_features: int) -> SparseCodes:
    """Tiles side by side."""
    if len(parts) == 1:
        return parts[0]
    counts = torch.stack([part.row_offsets.diff() for part in parts])
    offsets = functional.pad(counts.sum(0).cumsum(0), (1, 0))
    starts = offsets[:-1] + counts.cumsum(0) - counts
    columns = parts[0].columns.new_empty(sum(len(part.columns) for part in parts))
    values = parts[0].values.new_empty(len(columns))
    for part, start in zip(parts, starts, strict=True):
        if columns.device.type != "cpu":
            to = start[part.rows] + torch.arange(len(part.rows), device=columns.device) - part.row_offsets[part.rows]
            columns[to], values[to] = part.columns, part.values
            continue
        from crosshead.maths import kernels_cpu

        arrays = (part.row_offsets, part.columns, part.values, start, columns, values)
        on_ranges(kernels_cpu.place_rows, even_ranges(len(start)), *(t.numpy() for t in arrays))
    return SparseCodes(offsets, columns, values, n_features)


def _largest_per_row_cpu(product: Product, scale: Tensor, k: int, engine: Engine) -> SparseCodes:
    from crosshead.maths import kernels_cpu

    n_rows = len(product.x)
    ranges = even_ranges(n_rows)
    sizes = torch.zeros(n_rows, dtype=torch.long)
    scores, values = product.x.new_empty(n_rows, k), product.x.new_empty(n_rows, k)
    kept = torch.empty(n_rows, k, dtype=torch.long)
    state = [t.numpy() for t in (sizes, scores, kept, values)]
    for columns, tile in product.tiles(engine):
        inputs = [t.numpy() for t in (tile, product.bias[columns], scale[columns], product.mask)]
        on_ranges(kernels_cpu.offer_rows, ranges, *inputs, columns.start, *state)
    offsets = functional.pad(sizes.cumsum(0), (1, 0))
    columns_Z = torch.empty(int(offsets[-1]), dtype=torch.long)
    values_Z = product.x.new_empty(len(columns_Z))
    arrays = (offsets, kept, values, columns_Z, values_Z)
    on_ranges(kernels_cpu.sort_rows, ranges, *(t.numpy() for t in arrays))
    return SparseCodes(offsets, columns_Z, values_Z, len(product.weight))

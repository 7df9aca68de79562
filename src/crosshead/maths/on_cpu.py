"""The sparse engine on the CPU: compiled loops, one stretch of rows or features per thread.

Shape legend: see ``maths.sparse``, which says what every function computes. All backends offer the same functions.
"""

from collections.abc import Iterable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from crosshead.maths import loops
from crosshead.maths.codes import SparseCodes
from crosshead.maths.engine import Engine
from crosshead.maths.forms import MixGradients, Mixing, Product
from crosshead.maths.threads import balanced_ranges, even_ranges, on_ranges

__all__ = [
    "apply_patterns",
    "decode_gradients",
    "keep_largest",
    "larger_entries",
    "largest_per_row",
    "mix",
    "transpose_patterns",
    "unmix",
    "weighted_columns",
    "weighted_rows",
]

_BLOCK = 64  # query positions that share one causal cut of the keys


def larger_entries(product: Product, scale: Tensor, level: Tensor, engine: Engine) -> SparseCodes:
    """All entries whose score exceeds its feature's level."""
    parts = [_read_larger(product, columns, tile, scale[columns], level[columns])
             for columns, tile in product.tiles(engine)]  # fmt: skip
    return parts[0] if len(parts) == 1 else _joined(parts)


def _read_larger(
    product: Product, columns: slice, tile: Float[Tensor, "N C"], scale: Float[Tensor, " C"], level: Float[Tensor, " C"]
) -> SparseCodes:
    ranges = even_ranges(len(tile))
    inputs = [t.numpy() for t in (tile, product.bias[columns], scale, level, product.mask)]
    counts = torch.empty(len(tile), dtype=torch.long)
    on_ranges(loops.count_above, ranges, *inputs, counts.numpy())
    offsets = functional.pad(counts.cumsum(0), (1, 0))
    found = torch.empty(int(offsets[-1]), dtype=torch.long)
    values = tile.new_empty(len(found))
    on_ranges(loops.fill_above, ranges, *inputs, offsets.numpy(), columns.start, found.numpy(), values.numpy())
    return SparseCodes(offsets, found, values, len(product.weight))


def _joined(parts: list[SparseCodes]) -> SparseCodes:
    """Tiles side by side."""
    offsets = torch.zeros_like(parts[0].row_offsets)
    for part in parts:
        offsets += part.row_offsets
    start = offsets[:-1].clone()
    columns = parts[0].columns.new_empty(int(offsets[-1]))
    values = parts[0].values.new_empty(len(columns))
    for part in parts:
        arrays = (part.row_offsets, part.columns, part.values, start, columns, values)
        on_ranges(loops.place_rows, even_ranges(len(start)), *_numpy(arrays))
        start += part.row_offsets.diff()
    return SparseCodes(offsets, columns, values, parts[0].n_features)


def largest_per_row(product: Product, scale: Tensor, k: int, engine: Engine) -> SparseCodes:
    """The k largest positive scores of every row."""
    n_rows = len(product.x)
    ranges = even_ranges(n_rows)
    sizes = torch.zeros(n_rows, dtype=torch.long)
    scores, values = product.x.new_empty(n_rows, k), product.x.new_empty(n_rows, k)
    kept = torch.empty(n_rows, k, dtype=torch.long)
    for columns, tile in product.tiles(engine):
        inputs = _numpy((tile, product.bias[columns], scale[columns], product.mask))
        on_ranges(loops.offer_rows, ranges, *inputs, columns.start, *_numpy((sizes, scores, kept, values)))
    offsets = functional.pad(sizes.cumsum(0), (1, 0))
    found = torch.empty(int(offsets[-1]), dtype=torch.long)
    found_values = product.x.new_empty(len(found))
    on_ranges(loops.sort_rows, ranges, *_numpy((offsets, kept, values, found, found_values)))
    return SparseCodes(offsets, found, found_values, len(product.weight))


def keep_largest(codes: SparseCodes, scale: Float[Tensor, " F"], count: int) -> SparseCodes:
    """The ``count`` largest scores of some codes; the first of equal ones."""
    scores = codes.values * scale[codes.columns]
    least = scores.kthvalue(len(scores) - count + 1).values
    n_ties = count - int((scores > least).sum())
    kept = SparseCodes(torch.empty_like(codes.row_offsets), codes.columns.new_empty(count),
                       codes.values.new_empty(count), codes.n_features)  # fmt: skip
    offsets, columns, values, weights = _numpy((codes.row_offsets, codes.columns, codes.values, scale))
    into = _numpy((kept.row_offsets, kept.columns, kept.values))
    loops.keep_largest(offsets, columns, values, weights, least.numpy()[()], n_ties, into[0], into[1], into[2])
    return kept


def weighted_rows(codes: SparseCodes, table: Float[Tensor, "F D"]) -> Float[Tensor, "N D"]:
    """Codes times ``table``."""
    out = table.new_empty(codes.n_rows, table.shape[1])
    arrays = (codes.row_offsets, codes.columns, codes.values, table.contiguous(), out)
    on_ranges(loops.weighted_rows, balanced_ranges(codes.row_offsets), *_numpy(arrays))
    return out


def weighted_columns(
    codes: SparseCodes, table: Float[Tensor, "N X"], share: Float[Tensor, " F"], common: Float[Tensor, " X"]
) -> Float[Tensor, "F X"]:
    """Transposed codes times ``table``, plus share[i] * common in every row."""
    order = codes.by_column
    out = table.new_empty(codes.n_features, table.shape[1])
    arrays = (*order, codes.values, table.contiguous(), share, common, out)
    on_ranges(loops.weighted_columns, balanced_ranges(order.offsets), *_numpy(arrays))
    return out


def decode_gradients(
    codes: SparseCodes, grad: Float[Tensor, "N D"], decoder: Float[Tensor, "F D"]
) -> tuple[Float[Tensor, " Z"], Float[Tensor, "F D"]]:
    """Gradients of values and decoder, given those of codes times decoder."""
    order = codes.by_column
    grad_values, grad_decoder = torch.empty_like(codes.values), torch.empty_like(decoder)
    arrays = (*order, codes.values, grad, decoder, grad_values, grad_decoder)
    on_ranges(loops.decode_columns, balanced_ranges(order.offsets), *_numpy(arrays))
    return grad_values, grad_decoder


def mix(mixing: Mixing, out: Float[Tensor, "n M D"], first: int, last: int) -> None:
    """Every mover's share of rows ``first`` to ``last``."""
    codes = mixing.codes
    kernel = loops.mix_rows if mixing.lists is None else loops.mix_rows_by_movers
    ranges = balanced_ranges(codes.row_offsets, first, last)
    on_ranges(kernel, ranges, *_inputs(mixing), *_numpy([mixing.decoder, out]), first)


def unmix(mixing: Mixing, grad: Float[Tensor, "n M D"], first: int, last: int, into: MixGradients) -> None:
    """Add the gradients of everything through rows ``first`` to ``last``, given those of the movers' shares."""
    kernel = loops.unmix_columns if mixing.lists is None else loops.unmix_columns_by_movers
    ranges = balanced_ranges(mixing.codes.by_column.offsets)
    on_ranges(kernel, ranges, *_inputs(mixing), *_numpy([mixing.decoder, grad]), first, last, *_numpy(into))


def apply_patterns(
    patterns: Float[Tensor, "C H T T"], shares: Float[Tensor, "C T M D"], out: Float[Tensor, "C T D"]
) -> None:
    """out[t] = shares[t, 0] + sum over h and s <= t of pattern_h(t, s) shares[s, h+1]."""
    n_movers = shares.shape[2]
    for patterns_HTT, shares_TMD, out_TD in zip(patterns, shares, out, strict=True):
        moves, shares_SD = _moves(patterns_HTT), shares_TMD.flatten(0, 1)
        for first in range(0, len(out_TD), _BLOCK):
            last = min(first + _BLOCK, len(out_TD))
            torch.mm(moves[first:last, : last * n_movers], shares_SD[: last * n_movers], out=out_TD[first:last])


def transpose_patterns(
    patterns: Float[Tensor, "C H T T"], grad: Float[Tensor, "C T D"], shares: Float[Tensor, "C T M D"]
) -> None:
    """The gradient of every mover's share at its source, written over ``shares``."""
    n_movers = shares.shape[2]
    for patterns_HTT, grad_TD, shares_TMD in zip(patterns, grad, shares, strict=True):
        moves, shares_SD = _moves(patterns_HTT), shares_TMD.flatten(0, 1)
        for first in range(0, len(grad_TD), _BLOCK):
            own = slice(first * n_movers, (first + _BLOCK) * n_movers)
            torch.mm(moves[first:, own].T, grad_TD[first:], out=shares_SD[own])


def _moves(patterns_HTT: Float[Tensor, "H T T"]) -> Float[Tensor, "T S"]:
    """Patterns of identity and heads as one matrix: query positions by pairs of a source and a mover.

    One product over pairs takes a third less time than one per head. A causal cut is a range of columns; what lies
    beyond the end of a position's block is never read, nor written.
    """
    n_heads, n_positions, _ = patterns_HTT.shape
    moves = patterns_HTT.new_empty(n_positions, n_positions, n_heads + 1)
    on_ranges(loops.interleave_patterns, even_ranges(n_positions), patterns_HTT.numpy(), _BLOCK, moves.numpy())
    return moves.flatten(1)


def _inputs(mixing: Mixing) -> list[Any]:
    codes = mixing.codes
    return _numpy((codes.row_offsets, codes.columns, codes.values, mixing.loadings_FM, *(mixing.lists or ())))


def _numpy(tensors: Iterable[Tensor]) -> list[Any]:
    return [tensor.detach().numpy() for tensor in tensors]

"""The sparse engine with dense matrices and torch's own operations: for dense batches, and for every other device.

Shape legend: see ``maths.sparse``, which says what every function computes. All backends offer the same functions.
"""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from crosshead.maths.codes import SparseCodes
from crosshead.maths.engine import Engine
from crosshead.maths.forms import MixGradients, Mixing, Product

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


def larger_entries(product: Product, scale: Tensor, level: Tensor, engine: Engine) -> SparseCodes:
    """All entries whose score exceeds its feature's level."""
    parts = []
    for columns, tile in product.tiles(engine):
        values = tile + product.bias[columns]
        active = (values * scale[columns] > level[columns]) & product.mask[:, None]
        part = SparseCodes.from_dense(values, active)
        parts.append((part.rows, part.columns + columns.start, part.values))
    rows, columns, values = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    order = torch.argsort(rows, stable=True)
    offsets = functional.pad(torch.bincount(rows, minlength=len(product.x)).cumsum(0), (1, 0))
    return SparseCodes(offsets, columns[order], values[order], len(product.weight))


def largest_per_row(product: Product, scale: Tensor, k: int, engine: Engine) -> SparseCodes:
    """The k largest positive scores of every row."""
    n_rows = len(product.x)
    best = values = product.x.new_zeros(n_rows, 0)
    columns = best.long()
    for part, tile in product.tiles(engine):
        tile_values = tile + product.bias[part]
        scores = (tile_values * scale[part]).masked_fill_(~product.mask[:, None], 0.0)
        numbers = torch.arange(part.start, part.stop, device=tile.device).expand(n_rows, -1)
        everything = torch.cat([best, scores], 1)
        best, chosen = everything.topk(min(k, everything.shape[1]), dim=1)
        values = torch.cat([values, tile_values], 1).gather(1, chosen)
        columns = torch.cat([columns, numbers], 1).gather(1, chosen)
    columns, order = columns.sort(dim=1)
    positive = best.gather(1, order) > 0
    offsets = functional.pad(positive.sum(1).cumsum(0), (1, 0))
    return SparseCodes(offsets, columns[positive], values.gather(1, order)[positive], len(product.weight))


def keep_largest(codes: SparseCodes, scale: Float[Tensor, " F"], count: int) -> SparseCodes:
    """The ``count`` largest scores of some codes; the first of equal ones."""
    scores = codes.values * scale[codes.columns]
    least = scores.kthvalue(len(scores) - count + 1).values
    kept = scores > least
    ties = torch.nonzero(scores == least).flatten()
    kept[ties[: count - int(kept.sum())]] = True
    offsets = functional.pad(kept.cumsum(0), (1, 0))[codes.row_offsets]
    return SparseCodes(offsets, codes.columns[kept], codes.values[kept], codes.n_features)


def weighted_rows(codes: SparseCodes, table: Float[Tensor, "F D"]) -> Float[Tensor, "N D"]:
    """Codes times ``table``."""
    return (codes.to_dense().to(table.dtype) @ table).to(codes.values.dtype)


def weighted_columns(
    codes: SparseCodes, table: Float[Tensor, "N X"], share: Float[Tensor, " F"], common: Float[Tensor, " X"]
) -> Float[Tensor, "F X"]:
    """Transposed codes times ``table``, plus share[i] * common in every row."""
    sums = (codes.to_dense().to(table.dtype).T @ table).to(codes.values.dtype)
    return torch.addr(sums, share, common)


def decode_gradients(
    codes: SparseCodes, grad: Float[Tensor, "N D"], decoder: Float[Tensor, "F D"]
) -> tuple[Float[Tensor, " Z"], Float[Tensor, "F D"]]:
    """Gradients of values and decoder, given those of codes times decoder."""
    products = (grad @ decoder.T)[codes.rows, codes.columns]
    grad_decoder = codes.to_dense().to(grad.dtype).T @ grad
    return products.to(codes.values.dtype), grad_decoder.to(codes.values.dtype)


def mix(mixing: Mixing, out: Float[Tensor, "n M D"], first: int, last: int) -> None:
    """Every mover's share of rows ``first`` to ``last``."""
    f = _dense_rows(mixing.codes, first, last)
    for m, loadings in enumerate(mixing.loadings_FM.T):
        out[:, m] = (f * loadings).to(mixing.decoder.dtype) @ mixing.decoder


def unmix(mixing: Mixing, grad: Float[Tensor, "n M D"], first: int, last: int, into: MixGradients) -> None:
    """Add the gradients of everything through rows ``first`` to ``last``, given those of the movers' shares."""
    codes = mixing.codes
    f = _dense_rows(codes, first, last)
    grad_f = torch.zeros_like(f)
    for m, loadings in enumerate(mixing.loadings_FM.T):
        products = (grad[:, m] @ mixing.decoder.T).to(f.dtype)
        grad_f.addcmul_(products, loadings[None])
        into.loadings_FM[:, m] += (products * f).sum(0)
        into.decoder.add_((f * loadings).to(grad.dtype).T @ grad[:, m])
    part = slice(int(codes.row_offsets[first]), int(codes.row_offsets[last]))
    into.values[part] = grad_f[codes.rows[part] - first, codes.columns[part]]


def apply_patterns(
    patterns: Float[Tensor, "C H T T"], shares: Float[Tensor, "C T M D"], out: Float[Tensor, "C T D"]
) -> None:
    """out[t] = shares[t, 0] + sum over h and s <= t of pattern_h(t, s) shares[s, h+1]."""
    # A product per context sums over heads and sources at once.
    moved = patterns.tril().transpose(1, 2).flatten(2) @ shares[:, :, 1:].transpose(1, 2).flatten(1, 2)
    out.copy_(shares[:, :, 0] + moved)


def transpose_patterns(
    patterns: Float[Tensor, "C H T T"], grad: Float[Tensor, "C T D"], shares: Float[Tensor, "C T M D"]
) -> None:
    """The gradient of every mover's share at its source, written over ``shares``."""
    shares[:, :, 0] = grad
    shares[:, :, 1:] = (patterns.tril().transpose(-1, -2) @ grad[:, None]).transpose(1, 2)


def _dense_rows(codes: SparseCodes, first: int, last: int) -> Float[Tensor, "n F"]:
    offsets = codes.row_offsets[first : last + 1]
    part = slice(int(offsets[0]), int(offsets[-1]))
    rows = SparseCodes(offsets - offsets[0], codes.columns[part], codes.values[part], codes.n_features)
    return rows.to_dense()

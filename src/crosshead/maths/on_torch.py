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

__all__ = ["decode_gradients", "larger_entries", "largest_per_row", "mix", "unmix", "weighted_columns", "weighted_rows"]


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


def weighted_rows(codes: SparseCodes, table: Float[Tensor, "F D"]) -> Float[Tensor, "N D"]:
    """Codes times ``table``."""
    return codes.to_dense() @ table


def weighted_columns(
    codes: SparseCodes, table: Float[Tensor, "N X"], share: Float[Tensor, " F"], common: Float[Tensor, " X"]
) -> Float[Tensor, "F X"]:
    """Transposed codes times ``table``, plus share[i] * common in every row."""
    return torch.addr(codes.to_dense().T @ table, share, common)


def decode_gradients(
    codes: SparseCodes, grad: Float[Tensor, "N D"], decoder: Float[Tensor, "F D"]
) -> tuple[Float[Tensor, " Z"], Float[Tensor, "F D"]]:
    """Gradients of values and decoder, given those of codes times decoder."""
    return (grad @ decoder.T)[codes.rows, codes.columns], codes.to_dense().T @ grad


def mix(mixing: Mixing, out: Float[Tensor, "n M D"], first: int, last: int) -> None:
    """Every mover's share of rows ``first`` to ``last``."""
    f = _dense_rows(mixing.codes, first, last)
    for m, loadings in enumerate(mixing.loadings_FM.T):
        out[:, m] = (f * loadings) @ mixing.decoder


def unmix(mixing: Mixing, grad: Float[Tensor, "n M D"], first: int, last: int, into: MixGradients) -> None:
    """Add the gradients of everything through rows ``first`` to ``last``, given those of the movers' shares."""
    codes = mixing.codes
    f = _dense_rows(codes, first, last)
    grad_f = torch.zeros_like(f)
    for m, loadings in enumerate(mixing.loadings_FM.T):
        products = grad[:, m] @ mixing.decoder.T
        grad_f.addcmul_(products, loadings[None])
        into.loadings_FM[:, m] += (products * f).sum(0)
        into.decoder.addmm_((f * loadings).T, grad[:, m])
    part = slice(int(codes.row_offsets[first]), int(codes.row_offsets[last]))
    into.values[part] = grad_f[codes.rows[part] - first, codes.columns[part]]


def _dense_rows(codes: SparseCodes, first: int, last: int) -> Float[Tensor, "n F"]:
    offsets = codes.row_offsets[first : last + 1]
    part = slice(int(offsets[0]), int(offsets[-1]))
    rows = SparseCodes(offsets - offsets[0], codes.columns[part], codes.values[part], codes.n_features)
    return rows.to_dense()

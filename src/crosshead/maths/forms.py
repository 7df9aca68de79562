"""What the sparse engine's backends are handed.

Shape legend: N rows, F features, Z non-zeros, X input width, D decoder width, M movers, C columns of a tile.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional

from crosshead.maths.codes import SparseCodes
from crosshead.maths.engine import Engine

__all__ = ["MixGradients", "Mixing", "Product"]


class Product(NamedTuple):
    """An encoder's product x W^T + b, not computed yet."""

    x: Float[Tensor, "N X"]
    weight: Float[Tensor, "F X"]
    bias: Float[Tensor, " F"]
    mask: Bool[Tensor, " N"]
    """Rows that count."""

    def detach(self) -> "Product":
        """The same product outside autograd."""
        return Product(*(tensor.detach() for tensor in self))

    def tiles(self, engine: Engine) -> Iterator[tuple[slice, Float[Tensor, "N C"]]]:
        """Columns and x W^T of them (without b), one tile after the other in the same memory."""
        n_rows, n_features = len(self.x), len(self.weight)
        width = int(engine.tile_mib * 2**20 / (max(n_rows, 1) * self.x.element_size()))
        width = min(max(width, 1), n_features)
        buffer = self.x.new_empty(n_rows * width)
        for first in range(0, n_features, width):
            columns = slice(first, min(first + width, n_features))
            tile = buffer[: n_rows * (columns.stop - first)].view(n_rows, columns.stop - first)
            torch.mm(self.x, self.weight[columns].T, out=tile)
            yield columns, tile


class Mixing(NamedTuple):
    """Codes that movers take their shares of: share of mover m in row n = sum_j L[i_j, m] f_j d[i_j]."""

    codes: SparseCodes
    loadings_FM: Float[Tensor, "F M"]
    decoder: Float[Tensor, "F D"]
    lists: tuple[Int[Tensor, " F+1"], Int[Tensor, " moves"]] | None
    """Where every feature's movers begin, and the movers; None where every mover takes a share of every feature."""
    n_moves: int
    """Pairs of a non-zero and a mover that takes a share of it."""

    @classmethod
    def of(
        cls, codes: SparseCodes, loadings: Float[Tensor, "M F"], decoder: Float[Tensor, "F D"],
        movers: Bool[Tensor, "M F"] | None,
    ) -> "Mixing":  # fmt: skip
        """Outside autograd. ``movers``: which take a share of a feature; None for all."""
        codes, loadings, decoder = codes.detach(), loadings.detach(), decoder.detach().contiguous()
        if movers is None:
            return cls(codes, loadings.T.contiguous(), decoder, None, len(loadings) * len(codes.columns))
        counts = movers.sum(0)
        lists = functional.pad(counts.cumsum(0), (1, 0)), torch.nonzero(movers.T)[:, 1].contiguous()
        return cls(codes, (loadings * movers).T.contiguous(), decoder, lists, int(counts[codes.columns].sum()))


class MixGradients(NamedTuple):
    """Gradients of a mixing, to be added to; values are written."""

    values: Float[Tensor, " Z"]
    loadings_FM: Float[Tensor, "F M"]
    decoder: Float[Tensor, "F D"]

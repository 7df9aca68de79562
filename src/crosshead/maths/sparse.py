"""Sparse codes and the products that touch only their non-zeros.

Shape legend: N rows (positions), F features, Z non-zeros, M moved copies (heads), D decoder width, X input width.

The encoder product X W^T is the only dense work. Everything after it - decoding, moving features through heads,
all gradients - reads and writes non-zeros only. The penalty on negative pre-activations, which sees every entry, has
an exact sparse form too: sum_t relu(-pre_ti) = sum_t f_ti - sum_t pre_ti, and sum_t pre_ti = w_i . sum_t x_t + N b_i
needs one column sum instead of a dense product.
"""

import warnings
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional

# The sampled product is the one operation we need of a layout that torch still calls beta.
warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta", category=UserWarning)

__all__ = ["SparseCodes", "decode", "gather_preactivations", "moved_decode", "preactivation_sums"]


@dataclass(frozen=True)
class SparseCodes:
    """An [N, F] matrix by its non-zeros, sorted by row. ``values`` takes part in autograd, the structure does not."""

    rows: Int[Tensor, " Z"]
    columns: Int[Tensor, " Z"]
    values: Float[Tensor, " Z"]
    n_rows: int
    n_features: int
    _derived: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    @property
    def row_offsets(self) -> Int[Tensor, " N+1"]:
        """Entry n is the number of non-zeros in the rows before n."""
        if "row_offsets" not in self._derived:
            self._derived["row_offsets"] = _offsets(self.rows, self.n_rows)
        return self._derived["row_offsets"]

    @property
    def by_column(self) -> tuple[Int[Tensor, " Z"], Int[Tensor, " F+1"]]:
        """The stable order that sorts the non-zeros by feature, and each feature's offset in it."""
        if "by_column" not in self._derived:
            order = torch.argsort(self.columns.int(), stable=True)
            self._derived["by_column"] = order, _offsets(self.columns, self.n_features)
        return self._derived["by_column"]

    def with_values(self, values: Float[Tensor, " Z"]) -> "SparseCodes":
        """The same structure with other values; what was derived from the structure is shared."""
        return SparseCodes(self.rows, self.columns, values, self.n_rows, self.n_features, self._derived)

    def detach(self) -> "SparseCodes":
        """The same codes outside autograd."""
        return self.with_values(self.values.detach())

    def to_dense(self) -> Float[Tensor, "N F"]:
        """The dense matrix (differentiable in the values)."""
        dense = self.values.new_zeros(self.n_rows, self.n_features)
        return dense.index_put((self.rows, self.columns), self.values)

    @classmethod
    def from_dense(cls, dense: Float[Tensor, "N F"], active: Bool[Tensor, "N F"] | None = None) -> "SparseCodes":
        """The codes of a dense matrix, non-zero where ``active`` (by default where it is not zero)."""
        rows, columns = torch.nonzero(dense != 0 if active is None else active, as_tuple=True)
        return cls(rows, columns, dense[rows, columns], dense.shape[0], dense.shape[1])

    def feature_sums(self) -> Float[Tensor, " F"]:
        """sum_t f_ti for every feature."""
        return self.values.new_zeros(self.n_features).index_add(0, self.columns, self.values)

    def fired(self) -> Bool[Tensor, " F"]:
        """Which features have a non-zero anywhere."""
        return torch.bincount(self.columns, minlength=self.n_features) > 0


def _offsets(sorted_or_not: Tensor, size: int) -> Tensor:
    counts = torch.bincount(sorted_or_not, minlength=size)
    return functional.pad(counts.cumsum(0), (1, 0))


def _bag(indices: Tensor, weights: Tensor, offsets: Tensor, table: Tensor) -> Tensor:
    """Row b of the result is the sum over its bag's entries j of weights[j] * table[indices[j]]."""
    if not len(indices):
        return table.new_zeros(len(offsets) - 1, table.shape[1])
    return functional.embedding_bag(
        indices, table, offsets, mode="sum", per_sample_weights=weights.to(table.dtype), include_last_offset=True
    )


class _GatherPreactivations(torch.autograd.Function):
    """values_j = x[row_j] . W[column_j] + b[column_j], read off a product that was computed without autograd."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, dense: Tensor, structure: SparseCodes) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.structure = structure
        return dense[structure.rows, structure.columns]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        x, weight = ctx.saved_tensors
        s: SparseCodes = ctx.structure
        order, column_offsets = s.by_column
        grad_weight = _bag(s.rows[order], gradient[order], column_offsets, x)
        grad_bias = gradient.new_zeros(s.n_features).index_add_(0, s.columns, gradient)
        grad_x = _bag(s.columns, gradient, s.row_offsets, weight) if ctx.needs_input_grad[0] else None
        return grad_x, grad_weight, grad_bias, None, None


def gather_preactivations(
    x: Float[Tensor, "N X"],
    weight: Float[Tensor, "F X"],
    bias: Float[Tensor, " F"],
    dense: Float[Tensor, "N F"],
    structure: SparseCodes,
) -> SparseCodes:
    """Pre-activations at the structure's entries, differentiable in x, weight and bias.

    ``dense`` is ``x @ weight.T + bias`` as already computed to choose the structure; it is not kept for backward.
    """
    return structure.with_values(_GatherPreactivations.apply(x, weight, bias, dense, structure))


def preactivation_sums(
    x: Float[Tensor, "N X"], weight: Float[Tensor, "F X"], bias: Float[Tensor, " F"], mask: Bool[Tensor, " N"]
) -> Float[Tensor, " F"]:
    """Sum over counted rows of x . w_i + b_i for every feature, at the price of one column sum."""
    counted = mask.to(x.dtype)
    return weight @ (counted @ x) + counted.sum() * bias


class _MovedDecode(torch.autograd.Function):
    """out[m, n] = sum over non-zeros j of row n of loadings[m, column_j] * values_j * decoder[column_j].

    A *move* is a pair (m, j). ``movers`` [M, F] says which heads move a feature at all; other moves cost nothing, and
    their loadings get no gradient. Leaving out moves whose loading is zero changes no bit of any sum.
    """

    @staticmethod
    def forward(
        ctx: Any, values: Tensor, loadings: Tensor, decoder: Tensor, structure: SparseCodes, movers: Tensor | None
    ) -> Tensor:
        s = structure
        moves = _moves(s, len(loadings), movers)
        ctx.save_for_backward(values, loadings, decoder)
        ctx.structure, ctx.movers, ctx.moves = s, movers, moves
        weights = loadings[moves.heads, s.columns[moves.entries]] * values[moves.entries]
        moved = _bag(s.columns[moves.entries], weights, moves.offsets, decoder)
        return moved.view(len(loadings), s.n_rows, -1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        grad_MND = gradients[0].contiguous()
        values, loadings, decoder = ctx.saved_tensors
        s: SparseCodes = ctx.structure
        moves: _Moves = ctx.moves
        columns = s.columns[moves.entries]
        products = _sampled_products(grad_MND, decoder, s, moves)
        pulls = products * loadings[moves.heads, columns]
        if ctx.movers is None:
            grad_values = pulls.view(len(loadings), -1).sum(0)
        else:
            grad_values = torch.zeros_like(values).index_add_(0, moves.entries, pulls)
        places = moves.heads * s.n_features + columns
        grad_loadings = torch.zeros_like(loadings).view(-1).index_add_(0, places, products * values[moves.entries])

        by_column = _moves_by_column(s, len(loadings), ctx.movers)
        indices = s.rows[by_column.entries] + by_column.heads * s.n_rows
        weights = loadings[by_column.heads, s.columns[by_column.entries]] * values[by_column.entries]
        grad_decoder = _bag(indices, weights, by_column.offsets, grad_MND.flatten(0, 1))
        return grad_values, grad_loadings.view_as(loadings), grad_decoder, None, None


class _Moves(NamedTuple):
    """Pairs of a head and a non-zero, and where each bag of them begins."""

    heads: Int[Tensor, " moves"]
    entries: Int[Tensor, " moves"]
    offsets: Int[Tensor, " bags+1"]


def _moves(s: SparseCodes, n_heads: int, movers: Tensor | None) -> _Moves:
    """Moves by head, then row: one bag for every (head, row)."""
    device, n_nonzero = s.columns.device, len(s.columns)
    if movers is None:
        heads = torch.arange(n_heads, device=device).repeat_interleave(n_nonzero)
        entries = torch.arange(n_nonzero, device=device).repeat(n_heads)
        starts = torch.arange(n_heads, device=device) * n_nonzero
        offsets = torch.cat([(starts[:, None] + s.row_offsets[:-1]).flatten(), s.row_offsets[-1:] * n_heads])
        return _Moves(heads, entries, offsets)
    heads, entries = torch.nonzero(movers[:, s.columns], as_tuple=True)
    return _Moves(heads, entries, _offsets(heads * s.n_rows + s.rows[entries], n_heads * s.n_rows))


def _moves_by_column(s: SparseCodes, n_heads: int, movers: Tensor | None) -> _Moves:
    """Moves by feature, then row, then head: one bag for every feature."""
    order, column_offsets = s.by_column
    if movers is None:
        heads = torch.arange(n_heads, device=order.device).repeat(len(order))
        return _Moves(heads, order.repeat_interleave(n_heads), column_offsets * n_heads)
    places, heads = torch.nonzero(movers.T[s.columns[order]], as_tuple=True)
    entries = order[places]
    return _Moves(heads, entries, _offsets(s.columns[entries], s.n_features))


def _sampled_products(grad_MND: Tensor, decoder: Tensor, s: SparseCodes, moves: _Moves) -> Tensor:
    """Products grad[m, row_j] . decoder[column_j] of the moves only."""
    if not len(moves.entries):
        return grad_MND.new_zeros(0)
    pattern = torch.sparse_csr_tensor(
        moves.offsets,
        s.columns[moves.entries],
        grad_MND.new_zeros(len(moves.entries)),
        size=(len(grad_MND) * s.n_rows, s.n_features),
        check_invariants=False,
    )
    return torch.sparse.sampled_addmm(pattern, grad_MND.flatten(0, 1), decoder.T, beta=0.0).values()


def moved_decode(
    codes: SparseCodes,
    loadings: Float[Tensor, "M F"],
    decoder: Float[Tensor, "F D"],
    movers: Bool[Tensor, "M F"] | None = None,
) -> Float[Tensor, "M N D"]:
    """Decode M copies of the codes, copy m with every feature scaled by its loading on head m.

    ``movers`` (all by default): only these loadings are used and get a gradient; the price falls with their number.
    """
    return _MovedDecode.apply(codes.values, loadings, decoder, codes, movers)


def decode(codes: SparseCodes, decoder: Float[Tensor, "F D"]) -> Float[Tensor, "N D"]:
    """Sparse times dense: every row's active decoder rows, weighted and summed."""
    loadings = decoder.new_ones(1, codes.n_features)
    return moved_decode(codes, loadings, decoder)[0]

"""Sparse codes: a matrix of activations by its non-zeros.

Shape legend: N rows (positions), F features, Z non-zeros.
"""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

__all__ = ["ColumnOrder", "SparseCodes"]


class ColumnOrder(NamedTuple):
    """The non-zeros by feature, then row."""

    offsets: Int[Tensor, " F+1"]
    """Entry i is the number of non-zeros of the features before i."""
    entries: Int[Tensor, " Z"]
    """Index of the non-zero in the order by rows."""
    rows: Int[Tensor, " Z"]
    """Its row."""


@dataclass(frozen=True)
class SparseCodes:
    """An [N, F] matrix by its non-zeros, by row and then feature. ``values`` takes part in autograd, structure not."""

    row_offsets: Int[Tensor, " N+1"]
    """Entry n is the number of non-zeros in the rows before n."""
    columns: Int[Tensor, " Z"]
    """Feature of every non-zero, ascending within a row."""
    values: Float[Tensor, " Z"]
    n_features: int
    _derived: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    @property
    def n_rows(self) -> int:
        """Number of rows."""
        return len(self.row_offsets) - 1

    @property
    def rows(self) -> Int[Tensor, " Z"]:
        """Row of every non-zero."""
        if "rows" not in self._derived:
            numbers = torch.arange(self.n_rows, device=self.row_offsets.device)
            self._derived["rows"] = numbers.repeat_interleave(self.row_offsets.diff(), output_size=len(self.columns))
        return self._derived["rows"]

    @property
    def by_column(self) -> ColumnOrder:
        """The same non-zeros by feature."""
        if "by_column" not in self._derived:
            self._derived["by_column"] = self._column_order()
        return self._derived["by_column"]

    def _column_order(self) -> ColumnOrder:
        if self.columns.device.type == "cpu":
            from crosshead.maths import loops

            order = ColumnOrder(self.columns.new_empty(self.n_features + 1), torch.empty_like(self.columns),
                                torch.empty_like(self.columns))  # fmt: skip
            loops.column_order(self.row_offsets.numpy(), self.columns.numpy(), *(t.numpy() for t in order))
            return order
        entries = torch.argsort(self.columns, stable=True)
        counts = torch.bincount(self.columns, minlength=self.n_features)
        return ColumnOrder(torch.nn.functional.pad(counts.cumsum(0), (1, 0)), entries, self.rows[entries])

    def with_values(self, values: Float[Tensor, " Z"]) -> "SparseCodes":
        """The same structure with other values; what was derived from the structure is shared."""
        return SparseCodes(self.row_offsets, self.columns, values, self.n_features, self._derived)

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
        active = dense != 0 if active is None else active
        rows, columns = torch.nonzero(active, as_tuple=True)
        offsets = torch.nn.functional.pad(active.sum(1).cumsum(0), (1, 0))
        return cls(offsets, columns, dense[rows, columns], dense.shape[1])

    def feature_sums(self) -> Float[Tensor, " F"]:
        """sum_t f_ti for every feature, added in the order of rows."""
        if self.values.device.type == "cpu":
            return self.values.new_zeros(self.n_features).index_add(0, self.columns, self.values)
        return self._segment_sums()

    def _segment_sums(self) -> Float[Tensor, " F"]:
        """The same without atomic additions, which a GPU makes in any order."""
        order = self.by_column
        return torch.segment_reduce(self.values[order.entries], "sum", offsets=order.offsets)

    def fired(self) -> Bool[Tensor, " F"]:
        """Which features are not zero somewhere."""
        return torch.bincount(self.columns[self.values.detach() != 0], minlength=self.n_features) > 0

"""How sparse products are computed: tiles, and the choice between dense and sparse forms.

Both forms give the same numbers to float tolerance, not to the bit. So the choice is a pure function of a batch's
counts and of constants that belong to a run's inputs: a run that is stopped and taken up chooses alike.
"""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

__all__ = ["Costs", "Engine"]

Nanoseconds = Annotated[float, Field(gt=0)]


class Costs(BaseModel):
    """Prices measured on one machine; only their ratios matter. ``make calibrate`` measures them anew."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    dense: Nanoseconds = 0.012
    """One multiply-add of a dense product."""
    entry: Nanoseconds = 0.5
    """Writing, scaling and reading one entry of a dense [N, F] matrix."""
    plain: Nanoseconds = 0.04
    """One multiply-add of a sparse product without movers."""
    moved: Nanoseconds = 0.025
    """One multiply-add of a sparse product with movers."""


class Engine(BaseModel):
    """Settings of the sparse engine."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    tile_mib: Annotated[float, Field(gt=0)] = 8.0
    """Largest part of the encoder's product [N, F] that is in memory at once, in MiB."""
    shares_mib: Annotated[float, Field(gt=0)] = 8.0
    """Largest part of the movers' shares [N, M, D] that is in memory at once, in MiB; at least one context."""
    form: Literal["auto", "sparse", "dense"] = "auto"
    """Multiply non-zeros only, or dense matrices; auto takes the cheaper one, batch by batch."""
    costs: Costs = Costs()

    def prefers_dense(self, n_rows: int, n_features: int, n_movers: int, n_moves: int, width: int) -> bool:
        """Whether a product of N rows of codes with an [F, width] table should be dense.

        ``n_moves`` counts pairs of a non-zero and a mover that moves it: Z without movers, M Z with all of them.
        """
        if self.form != "auto":
            return self.form == "dense"
        costs = self.costs
        sparse = n_moves * width * (costs.plain if n_movers == 1 else costs.moved)
        dense = n_movers * n_rows * n_features * (width * costs.dense + costs.entry)
        return dense < sparse

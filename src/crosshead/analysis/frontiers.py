"""Comparisons of frontiers at matched L0, from run records.

MTC against Top-1: the geometric mean of the ratio of normalised MSEs over the L0 range both sweeps cover, with a
percentile bootstrap over held-out contexts (the same contexts for both; one seed each, so the interval says nothing
about training noise).

Two-layer value SAE against the sum of two one-layer SAEs: every combination of the two one-layer sweeps, filled in
log-linearly, is a point (sum of L0s, summed squared error over summed variance, every layer scaled to equal power);
their lower envelope stands beside the two-layer sweep. After Jermyn et al., Progress on Attention (2025).

L0 falls when two layers share features even where nothing is shared between their rows, so the L1 sweeps are held
against each other by their objective too, squared error plus penalty at equal coefficients, which simply adds up over
layers that do not share.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from pydantic import BaseModel

from crosshead.maths.frontier import Point, geometric_mean_ratio, log_interpolate, lower_envelope, overlap

__all__ = ["Comparison", "compare_objectives", "compare_series", "compare_with_sum", "points_of", "sum_points"]

Record = dict[str, Any]
_DRAWS = 500


class Comparison(BaseModel):
    """MSE of one frontier over that of another at equal L0; below 1 the first is better."""

    first: str
    second: str
    ratio: float | None
    """Geometric mean over the common range; None where the ranges do not meet."""
    interval: tuple[float, float] | None
    """95% percentile bootstrap over held-out contexts."""
    l0_range: tuple[float, float] | None
    at: list[dict[str, float]]
    """``{l0, first, second}`` interpolated MSEs at round values of L0 inside the range."""
    n_tokens: int
    n_contexts: int


def points_of(records: Sequence[Record], contexts: np.ndarray | None = None) -> list[Point]:
    """One point per record; with ``contexts``, the errors of those held-out contexts only (repetitions count)."""
    return [Point(r["l0"], _mse(r["evaluation"], contexts)) for r in records]


def _mse(evaluation: Record, contexts: np.ndarray | None) -> float:
    if contexts is None:
        return evaluation["normalised_mse"]
    errors, variances = evaluation["context_squared_error"], evaluation["context_variance"]
    return float(np.asarray(errors)[contexts].sum() / np.asarray(variances)[contexts].sum())


def sum_points(first: Sequence[Record], second: Sequence[Record], contexts: np.ndarray | None = None) -> list[Point]:
    """Lower envelope of all combinations of two one-layer sweeps.

    Each sweep is filled in log-linearly between its measured points first, as the sweep it is compared with is: without
    that, unequal combinations stand above the chord of their neighbours and a coarse sum looks worse than it is.
    """
    combined = []
    for a, variance_a in _filled(first, contexts):
        for b, variance_b in _filled(second, contexts):
            mse = (a.mse * variance_a + b.mse * variance_b) / (variance_a + variance_b)
            combined.append(Point(a.l0 + b.l0, mse))
    return lower_envelope(combined)


def _filled(records: Sequence[Record], contexts: np.ndarray | None, between: int = 6) -> list[tuple[Point, float]]:
    """Points of a sweep and log-linear ones between them, each with the variance its MSE refers to."""
    points = sorted(points_of(records, contexts))
    variances = np.asarray(records[0]["evaluation"]["context_variance"])
    variance = float(variances.sum() if contexts is None else variances[contexts].sum())
    filled = points[:1]
    for left, right in pairwise(points):
        for share in np.linspace(0, 1, between + 1)[1:]:
            mse = float(np.exp((1 - share) * np.log(left.mse) + share * np.log(right.mse)))
            filled.append(Point(float((1 - share) * left.l0 + share * right.l0), mse))
    return [(point, variance) for point in filled]


def compare_series(first: Sequence[Record], second: Sequence[Record]) -> Comparison:
    """Two sweeps at equal L0."""
    return _compare(
        (_name(first), lambda contexts: points_of(first, contexts)),
        (_name(second), lambda contexts: points_of(second, contexts)),
        [*first, *second],
    )


def compare_with_sum(both: Sequence[Record], one: Sequence[Record], other: Sequence[Record]) -> Comparison:
    """A two-layer sweep against the sum of two one-layer sweeps at equal total L0."""
    return _compare(
        (_name(both), lambda contexts: points_of(both, contexts)),
        (f"{_name(one)} + {_name(other)}", lambda contexts: sum_points(one, other, contexts)),
        [*both, *one, *other],
    )


def compare_objectives(
    both: Sequence[Record], one: Sequence[Record], other: Sequence[Record]
) -> list[dict[str, float]]:
    """The held-out objective of a two-layer L1 sweep over the summed objective of two one-layer ones.

    One row ``{coefficient, seed, first, second, ratio}`` for every coefficient and seed that all three sweeps have, in
    squared error per held-out position. A one-layer SAE of each layer, stacked, is itself a two-layer SAE with that
    summed objective (and as many features as both), so with equal total features a ratio above 1 measures training.
    The small second penalty, on negative pre-activations, is left out. Runs with another sparsity have no row.
    """
    objectives = [_objectives(records) for records in (both, one, other)]
    rows = []
    for coefficient, seed in sorted(set.intersection(*(set(found) for found in objectives))):
        joint, first, second = (found[coefficient, seed] for found in objectives)
        rows.append({"coefficient": coefficient, "seed": seed, "first": joint, "second": first + second,
                     "ratio": joint / (first + second)})  # fmt: skip
    return rows


def _objectives(records: Sequence[Record]) -> dict[tuple[float, int], float]:
    found = {}
    for r in records:
        if r["sparsity"]["kind"] == "l1":
            coefficient = float(r["sparsity"]["coefficient"])
            error = sum(r["evaluation"]["context_squared_error"]) / r["n_tokens"]
            found[coefficient, int(r["seed"])] = error + coefficient * r["evaluation"]["l1"]
    return found


def _name(records: Sequence[Record]) -> str:
    return records[0]["series"] if records else "(no runs)"


Points = Callable[[np.ndarray | None], list[Point]]


def _compare(first: tuple[str, Points], second: tuple[str, Points], records: Sequence[Record]) -> Comparison:
    a, b = first[1](None), second[1](None)
    common, ratio = overlap(a, b), geometric_mean_ratio(a, b)
    n_contexts = min((len(r["evaluation"]["context_squared_error"]) for r in records), default=0)
    interval = None
    if ratio is not None and n_contexts > 1:
        generator = np.random.default_rng(0)
        ratios = []
        for _ in range(_DRAWS):
            contexts = generator.integers(0, n_contexts, n_contexts)
            drawn = geometric_mean_ratio(first[1](contexts), second[1](contexts), grid=9)
            if drawn is not None:
                ratios.append(drawn)
        low, high = np.quantile(ratios, [0.025, 0.975])
        interval = (float(low), float(high))
    return Comparison(
        first=first[0], second=second[0], ratio=ratio, interval=interval, l0_range=common,
        at=_table(a, b, common), n_tokens=min((r["n_tokens"] for r in records), default=0), n_contexts=n_contexts,
    )  # fmt: skip


def _table(a: Sequence[Point], b: Sequence[Point], common: tuple[float, float] | None) -> list[dict[str, float]]:
    if common is None:
        return []
    rows = []
    for l0 in (10, 20, 30, 40, 60, 80, 100, 120, 160, 190, 240, 300, 400, 500):
        first, second = log_interpolate(a, l0), log_interpolate(b, l0)
        if first is not None and second is not None:
            rows.append({"l0": float(l0), "first": first, "second": second})
    return rows

"""Comparisons of frontiers at matched L0, from run records.

MTC against Top-1: the geometric mean of the ratio of normalised MSEs over the L0 range both sweeps cover, seed by seed,
then over the seeds both have; with a bootstrap over held-out contexts and seeds (``resampling``). One frontier may lie
below another at few active features and above it at many, so the two halves of the range are also compared by
themselves.

Two-layer value SAE against the sum of two one-layer SAEs: every combination of the two one-layer sweeps, filled in
log-linearly, is a point (sum of L0s, summed squared error over summed variance, every layer scaled to equal power);
their lower envelope stands beside the two-layer sweep. After Jermyn et al., Progress on Attention (2025).

L0 falls when two layers share features even where nothing is shared between their rows, so the L1 sweeps are held
against each other by their objective too, squared error plus penalty at equal coefficients, which simply adds up over
layers that do not share.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel

from crosshead.analysis.resampling import DRAWS, Interval, bootstrap_intervals, geometric_mean
from crosshead.maths.frontier import Point, geometric_mean_ratio, log_interpolate, lower_envelope, overlap

__all__ = [
    "Comparison", "Part", "compare_objectives", "compare_series", "compare_with_sum", "null_record", "points_of",
    "sum_points",
]  # fmt: skip

Record = dict[str, Any]
Range = tuple[float, float]
_PARTS = ("low", "high")
_DRAWS = DRAWS
_BETWEEN = 48
"""Points filled in between two of a sweep: more changes the sum by less than 0.2%."""


class Part(BaseModel):
    """A comparison over a part of the common range of L0; all None where there is none."""

    ratio: float | None = None
    interval: tuple[float, float] | None = None
    """From the same draws as the whole's."""
    l0_range: tuple[float, float] | None = None


class Comparison(BaseModel):
    """MSE of one frontier over that of another at equal L0; below 1 the first is better."""

    first: str
    second: str
    ratio: float | None
    """Geometric mean over the common range; None where the ranges do not meet."""
    interval: tuple[float, float] | None
    """95% percentile bootstrap over held-out contexts and seeds."""
    l0_range: tuple[float, float] | None
    """Covered by both sweeps at every seed."""
    parts: dict[Literal["low", "high"], Part]
    """Below and above the geometric mean of the ends of ``l0_range``."""
    at: list[dict[str, float]]
    """``{l0, first, second}`` interpolated MSEs at round values of L0 inside the range, geometric means over seeds."""
    seed_ratios: dict[str, float]
    """The ratio of every seed that both sweeps have."""
    n_sparsities: int
    """Measured points of the shorter sweep."""
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
    """Lower envelope of all combinations of two one-layer sweeps of one seed.

    Each sweep is filled in log-linearly between its measured points first, as the sweep it is compared with is: without
    that, unequal combinations stand above the chord of their neighbours and a coarse sum looks worse than it is.
    """
    if not first or not second:
        return []
    (l0_a, mse_a), (l0_b, mse_b) = (_filled(points_of(records, contexts)) for records in (first, second))
    share = [_variance(records[0], contexts) for records in (first, second)]
    mse = (mse_a[:, None] * share[0] + mse_b * share[1]) / sum(share)
    return lower_envelope(np.stack([(l0_a[:, None] + l0_b).ravel(), mse.ravel()], axis=1))


def _filled(points: Sequence[Point]) -> tuple[np.ndarray, np.ndarray]:
    """L0 and MSE of a sweep's points and of log-linear ones between them."""
    points = sorted(points)
    shares = np.linspace(0, 1, _BETWEEN, endpoint=False)
    l0 = [np.concatenate([a.l0 + shares * (b.l0 - a.l0) for a, b in pairwise(points)] or [[]]), [points[-1].l0]]
    dense = np.concatenate(l0)
    return dense, np.exp(np.interp(dense, [p.l0 for p in points], np.log([p.mse for p in points])))


def _variance(record: Record, contexts: np.ndarray | None) -> float:
    variances = np.asarray(record["evaluation"]["context_variance"])
    return float(variances.sum() if contexts is None else variances[contexts].sum())


def compare_series(first: Sequence[Record], second: Sequence[Record]) -> Comparison:
    """Two sweeps at equal L0."""
    a, b = _by_seed(first), _by_seed(second)
    return _compare(
        (_name(first), lambda seed, contexts: points_of(a[seed], contexts)),
        (_name(second), lambda seed, contexts: points_of(b[seed], contexts)),
        [a, b],
    )


def compare_with_sum(both: Sequence[Record], one: Sequence[Record], other: Sequence[Record]) -> Comparison:
    """A two-layer sweep against the sum of two one-layer sweeps at equal total L0."""
    joint, a, b = _by_seed(both), _by_seed(one), _by_seed(other)
    return _compare(
        (_name(both), lambda seed, contexts: points_of(joint[seed], contexts)),
        (f"{_name(one)} + {_name(other)}", lambda seed, contexts: sum_points(a[seed], b[seed], contexts)),
        [joint, a, b],
    )


def _by_seed(records: Sequence[Record]) -> dict[int, list[Record]]:
    found: dict[int, list[Record]] = {}
    for record in records:
        found.setdefault(int(record["seed"]), []).append(record)
    return found


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


Points = Callable[[int, np.ndarray | None], list[Point]]


def _compare(
    first: tuple[str, Points], second: tuple[str, Points], sweeps: Sequence[dict[int, list[Record]]]
) -> Comparison:
    seeds = sorted(set.intersection(*(set(sweep) for sweep in sweeps)))
    records = [record for sweep in sweeps for seed in seeds for record in sweep[seed]]
    curves = {seed: (first[1](seed, None), second[1](seed, None)) for seed in seeds}
    common = _common_range(list(curves.values()))
    ranges = [None, *_halves(common)]
    found = {seed: _ratios(*pair, ranges) for seed, pair in curves.items()}
    ratios = {seed: of_seed for seed, of_seed in found.items() if of_seed[0] is not None}
    n_contexts = min((len(r["evaluation"]["context_squared_error"]) for r in records), default=0)
    intervals: list[Interval | None] = [None] * len(ranges)
    if ratios and n_contexts > 1:
        intervals = bootstrap_intervals(
            lambda seed, contexts: _ratios(first[1](seed, contexts), second[1](seed, contexts), ranges),
            sorted(ratios), n_contexts, _DRAWS,
        )  # fmt: skip
    means = [geometric_mean(of_seed[i] for of_seed in ratios.values()) for i in range(len(ranges))]
    whole, *parts = [Part(ratio=ratio, interval=interval, l0_range=part)
                     for ratio, interval, part in zip(means, intervals, ranges, strict=True)]  # fmt: skip
    return Comparison(
        first=first[0], second=second[0], ratio=whole.ratio, interval=whole.interval, l0_range=common,
        parts=dict(zip(_PARTS, parts or (Part(), Part()), strict=True)), at=_table(list(curves.values()), common),
        seed_ratios={str(seed): of_seed[0] for seed, of_seed in ratios.items() if of_seed[0] is not None},
        n_sparsities=min((len(sweep[seed]) for sweep in sweeps for seed in seeds), default=0),
        n_tokens=min((r["n_tokens"] for r in records), default=0), n_contexts=n_contexts,
    )  # fmt: skip


def _halves(common: Range | None) -> list[Range]:
    """A range of L0 below and above the geometric mean of its ends."""
    if common is None:
        return []
    middle = (common[0] * common[1]) ** 0.5
    return [(common[0], middle), (middle, common[1])]


def _ratios(first: list[Point], second: list[Point], ranges: Sequence[Range | None]) -> list[float | None]:
    """At one seed, over every range; None stands for all that both cover."""
    return [geometric_mean_ratio(first, second, within=l0_range) for l0_range in ranges]


Curves = Sequence[tuple[Sequence[Point], Sequence[Point]]]


def _common_range(curves: Curves) -> Range | None:
    ranges = [overlap(*pair) for pair in curves]
    known = [r for r in ranges if r is not None]
    if not known or len(known) < len(ranges):
        return None
    low, high = max(r[0] for r in known), min(r[1] for r in known)
    return (low, high) if low < high else None


def _table(curves: Curves, common: Range | None) -> list[dict[str, float]]:
    if common is None:
        return []
    rows = []
    for l0 in (10, 20, 30, 40, 60, 80, 100, 120, 160, 190, 240, 300, 400, 500):
        columns = [[log_interpolate(curve, l0) for curve in side] for side in zip(*curves, strict=True)]
        first, second = (geometric_mean(column) for column in columns)
        if first is not None and second is not None and not any(None in column for column in columns):
            rows.append({"l0": float(l0), "first": first, "second": second})
    return rows


def null_record(target: Mapping[str, Any], rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The null as the report holds it.

    ``target`` is what ``target.json`` says of it: teacher_normalised_mse is on the real target, noise_share the
    teacher's own error on the planted one, the least that a student can reach. ``comparisons`` sets every series with
    more than one head per feature against the Top-1 rows at equal L0.
    """
    one = [row for row in rows if row["heads_per_feature"] == 1]
    series = dict.fromkeys(row["series"] for row in rows if row["heads_per_feature"] != 1)
    found = {name: compare_series([row for row in rows if row["series"] == name], one) for name in series}
    return {
        **target,
        "rows": list(rows),
        "comparisons": {
            name: comparison.model_dump(mode="json") | {"n_seeds": len(comparison.seed_ratios)}
            for name, comparison in found.items()
        },
    }

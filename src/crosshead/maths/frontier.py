"""Frontiers of normalised MSE over L0: interpolation, envelopes and sums.

A frontier is compared at equal L0, by interpolating log MSE linearly in L0 between measured points; nothing is ever
extrapolated.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = ["Point", "geometric_mean_ratio", "log_interpolate", "lower_envelope", "overlap"]


class Point(NamedTuple):
    """One measured point of a frontier."""

    l0: float
    mse: float


def log_interpolate(points: Sequence[Point], l0: float) -> float | None:
    """MSE at ``l0``, log-linear between the two measured neighbours; None outside the measured range."""
    points = sorted(points)
    if not points or not points[0].l0 <= l0 <= points[-1].l0:
        return None
    return float(np.exp(np.interp(l0, [p.l0 for p in points], np.log([p.mse for p in points]))))


def lower_envelope(points: Sequence[Point] | NDArray[np.float64]) -> list[Point]:
    """The points that no other point beats in both L0 and MSE, by rising L0 and falling MSE. Arrays are [n, 2]."""
    if not len(points):
        return []
    array = np.asarray(points, dtype=float)
    array = array[np.lexsort((array[:, 1], array[:, 0]))]
    best_before = np.concatenate([[np.inf], np.minimum.accumulate(array[:-1, 1])])
    return [Point(float(l0), float(mse)) for l0, mse in array[array[:, 1] < best_before]]


def overlap(a: Sequence[Point], b: Sequence[Point]) -> tuple[float, float] | None:
    """The range of L0 that both frontiers cover; None where they do not meet."""
    if not a or not b:
        return None
    low = max(min(p.l0 for p in a), min(p.l0 for p in b))
    high = min(max(p.l0 for p in a), max(p.l0 for p in b))
    return (low, high) if low < high else None


def geometric_mean_ratio(
    a: Sequence[Point], b: Sequence[Point], *, within: tuple[float, float] | None = None, grid: int = 33
) -> float | None:
    """Geometric mean of MSE(a) / MSE(b) over the L0 range both cover, or its part ``within`` a range of L0.

    None where they do not meet (there).
    """
    common = overlap(a, b)
    if common is not None and within is not None:
        low, high = max(common[0], within[0]), min(common[1], within[1])
        common = (low, high) if low < high else None
    if common is None:
        return None
    at = np.linspace(*common, grid)
    logs = [np.interp(at, [p.l0 for p in curve], np.log([p.mse for p in curve])) for curve in (sorted(a), sorted(b))]
    return float(np.exp(np.mean(logs[0] - logs[1])))

"""Hartigan's dip: how far a sample is from having one mode (Hartigan and Hartigan 1985).

The dip is the smallest distance sup |F - G| between the empirical distribution F and any G with one mode (convex before
it, concave after). The greatest convex minorant and the least concave majorant of F are compared on an interval that
shrinks to the modal one. The p-value is the share of uniform samples of the same size with a larger dip: uniform is the
one-mode distribution with the largest one, so the test errs towards one mode.
"""

from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = ["Unimodality", "dip", "unimodality"]

Floats = NDArray[np.float64]


class Unimodality(NamedTuple):
    """A test for one mode."""

    dip: float
    p_value: float
    """Small: more than one mode."""
    n: int


def unimodality(sample: Floats, simulations: int = 200, seed: int = 0) -> Unimodality | None:
    """Test a sample for one mode; None below four values. ValueError for values that are not finite."""
    values = np.asarray(sample, dtype=float)
    if not np.isfinite(values).all():
        raise ValueError("the dip needs finite values, got NaN or infinity; leave them out")
    if len(values) < 4:
        return None
    own = dip(values)
    null = _uniform_dips(len(values), simulations, seed)
    return Unimodality(own, float((1 + (null >= own).sum()) / (1 + simulations)), len(values))


@lru_cache(maxsize=64)
def _uniform_dips(n: int, simulations: int, seed: int) -> Floats:
    generator = np.random.default_rng(seed)
    return np.array([dip(generator.random(n)) for _ in range(simulations)])


def dip(sample: Floats) -> float:
    """The dip of a sample; at least 1 / (2 n), and 0 where all values are equal."""
    values, counts = np.unique(np.asarray(sample, dtype=float), return_counts=True)
    if len(values) < 2:
        return 0.0
    upper = np.cumsum(counts) / counts.sum()
    lower = upper - counts / counts.sum()
    first, last, largest = 0, len(values) - 1, 1.0 / len(sample)
    while True:
        x, low, high = (part[first : last + 1] for part in (values, lower, upper))
        minorant = _hull(x, low)
        majorant = _hull(x, -high)
        below, above = np.interp(x, x[minorant], low[minorant]), np.interp(x, x[majorant], high[majorant])
        gap = above - below
        at_minorant, at_majorant = gap[minorant].max(), gap[majorant].max()
        if at_minorant >= at_majorant:
            left = minorant[int(np.argmax(gap[minorant]))]
            right = majorant[majorant >= left][0]
        else:
            right = majorant[len(majorant) - 1 - int(np.argmax(gap[majorant][::-1]))]
            left = minorant[minorant <= right][-1]
        if max(at_minorant, at_majorant) <= largest:
            return largest / 2
        outside_left = (high[: left + 1] - below[: left + 1]).max()
        outside_right = (above[right:] - low[right:]).max()
        largest = max(largest, float(outside_left), float(outside_right))
        if right - left >= last - first:
            return largest / 2
        first, last = first + left, first + right


def _hull(x: Floats, y: Floats) -> NDArray[np.int64]:
    """Indices of the greatest convex minorant's corners."""
    corners: list[int] = []
    for i in range(len(x)):
        while len(corners) > 1:
            a, b = corners[-2], corners[-1]
            if (y[b] - y[a]) * (x[i] - x[b]) < (y[i] - y[b]) * (x[b] - x[a]):
                break
            corners.pop()
        corners.append(i)
    return np.array(corners)

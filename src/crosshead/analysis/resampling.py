"""Percentile bootstrap of ratios over held-out contexts and seeds.

A draw takes as many contexts as there are, with repetition and the same ones for both sides of a ratio, and as many
seeds. With one seed the interval says nothing about training noise.
"""

from collections.abc import Callable, Iterable, Sequence

import numpy as np

__all__ = ["DRAWS", "Interval", "bootstrap_intervals", "geometric_mean"]

Interval = tuple[float, float]
DRAWS = 500


def geometric_mean(values: Iterable[float | None]) -> float | None:
    """Of the values that exist; None if none does."""
    known = [value for value in values if value is not None]
    return float(np.exp(np.mean(np.log(known)))) if known else None


def bootstrap_intervals(
    ratios: Callable[[int, np.ndarray], Sequence[float | None]],
    seeds: Sequence[int],
    n_contexts: int,
    draws: int = DRAWS,
) -> list[Interval | None]:
    """95% intervals of several ratios from the same draws.

    ``ratios(seed, contexts)`` gives all of them for one seed on the given contexts (repetitions count), None for one
    that does not exist there; over the seeds of a draw the geometric mean is taken. None where no draw had any.
    """
    generator = np.random.default_rng(0)
    drawn_ratios: list[list[float | None]] = []
    for _ in range(draws):
        contexts = generator.integers(0, n_contexts, n_contexts)
        drawn = [int(seed) for seed in generator.choice(np.asarray(seeds), len(seeds))]
        of_seed = {seed: ratios(seed, contexts) for seed in set(drawn)}
        drawn_ratios.append([geometric_mean(column) for column in zip(*(of_seed[seed] for seed in drawn), strict=True)])
    return [_interval(column) for column in zip(*drawn_ratios, strict=True)]


def _interval(values: Iterable[float | None]) -> Interval | None:
    known = [value for value in values if value is not None]
    if not known:
        return None
    low, high = np.quantile(known, [0.025, 0.975])
    return float(low), float(high)

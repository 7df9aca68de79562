"""Does a comparison of two architectures depend on how they were trained?

The same two architectures at several settings of start, learning rate and number of steps, both sides of a comparison
at the same setting (design choice). A difference whose sign changes between settings is a difference of training.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from pydantic import BaseModel

from crosshead.analysis.frontiers import compare_series, points_of
from crosshead.analysis.resampling import bootstrap_intervals, geometric_mean

__all__ = ["Robustness", "Setting", "compare_settings"]

Record = dict[str, Any]


class _Key(NamedTuple):
    """What a setting is made of, as run records name it."""

    start: str | None
    learning_rate: float
    steps: int


class Setting(BaseModel):
    """One comparison at one setting of training."""

    start: str | None
    """Start of the dictionary; None for architectures that have one only."""
    learning_rate: float
    steps: int
    matched: str
    """What is equal: ``l0``, by interpolation in two sweeps; or ``sparsity``, run by run, for single runs, whose L0s
    differ a little (``l0``)."""
    ratio: float
    """MSE of the first architecture over that of the second, geometric mean; below 1 the first is better."""
    interval: tuple[float, float] | None
    """95% bootstrap over held-out contexts and seeds."""
    l0: tuple[float, float]
    """Mean L0 of either side's runs."""
    n_sparsities: int
    seeds: list[int]


class Robustness(BaseModel):
    """A comparison at every setting that both architectures were trained at."""

    settings: list[Setting]
    """By start, learning rate and steps."""
    ratio_range: tuple[float, float] | None
    """The smallest and the largest ratio; None without settings."""
    same_sign: bool | None
    """Whether the log of the ratio has the same sign at all settings; None for fewer than two."""
    unpaired: int
    """Settings at which only one of them was trained, or no two runs could be matched."""


def compare_settings(first: Sequence[Record], second: Sequence[Record]) -> Robustness:
    """Compare two architectures setting by setting, from the records of all their runs, of any series.

    Where both have two sparsities or more with a common range of L0, they are compared there; otherwise runs of equal
    sparsity and seed are. ValueError for two runs of one architecture that differ in nothing that is compared.
    """
    a, b = _by_setting(first), _by_setting(second)
    found = [_compare(key, a[key], b[key]) for key in sorted(set(a) & set(b), key=_order)]
    settings = [setting for setting in found if setting is not None]
    ratios = [setting.ratio for setting in settings]
    return Robustness(
        settings=settings,
        ratio_range=(min(ratios), max(ratios)) if ratios else None,
        same_sign=len({float(np.sign(np.log(ratio))) for ratio in ratios}) == 1 if len(ratios) > 1 else None,
        unpaired=len(set(a) | set(b)) - len(settings),
    )


def _by_setting(records: Sequence[Record]) -> dict[_Key, list[Record]]:
    found: dict[_Key, list[Record]] = {}
    for record in records:
        key = _Key(record["start"], float(record["learning_rate"]), int(record["steps"]))
        found.setdefault(key, []).append(record)
    return found


def _order(key: _Key) -> tuple[str, float, int]:
    return key.start or "", key.learning_rate, key.steps


def _compare(key: _Key, first: Sequence[Record], second: Sequence[Record]) -> Setting | None:
    a, b = _by_run(first), _by_run(second)
    described: dict[str, Any] = {**key._asdict(), "l0": (_mean_l0(first), _mean_l0(second))}
    sweeps = compare_series(first, second)
    if sweeps.ratio is not None:
        return Setting(**described, matched="l0", ratio=sweeps.ratio, interval=sweeps.interval,
                       n_sparsities=sweeps.n_sparsities, seeds=[int(seed) for seed in sweeps.seed_ratios])  # fmt: skip
    pairs = {run: (a[run], b[run]) for run in sorted(set(a) & set(b))}
    if not pairs:
        return None
    seeds = sorted({seed for seed, _ in pairs})

    def ratio(seed: int, contexts: np.ndarray | None) -> float | None:
        sides = [points_of(pair, contexts) for (of, _), pair in pairs.items() if of == seed]
        return geometric_mean(one.mse / other.mse for one, other in sides)

    mean = geometric_mean(ratio(seed, None) for seed in seeds)
    assert mean is not None, "every seed of a pair has a ratio"
    n_contexts = min(len(record["evaluation"]["context_squared_error"]) for pair in pairs.values() for record in pair)
    intervals = bootstrap_intervals(lambda seed, contexts: [ratio(seed, contexts)], seeds, n_contexts)
    return Setting(**described, matched="sparsity", ratio=mean, interval=intervals[0] if n_contexts > 1 else None,
                   n_sparsities=len({sparsity for _, sparsity in pairs}), seeds=seeds)  # fmt: skip


def _by_run(records: Sequence[Record]) -> dict[tuple[int, float], Record]:
    """By seed and sparsity."""
    found: dict[tuple[int, float], Record] = {}
    for record in records:
        run = int(record["seed"]), float(record["sparsity_value"])
        if run in found:
            raise ValueError(f"runs {found[run]['run']} and {record['run']} share start, learning rate, steps, "
                             "sparsity and seed; give runs of one architecture and as many features")  # fmt: skip
        found[run] = record
    return found


def _mean_l0(records: Sequence[Record]) -> float:
    return float(np.mean([record["l0"] for record in records]))

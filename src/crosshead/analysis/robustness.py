"""Does a comparison of architectures depend on how they were trained?

The same architectures at several settings of start, learning rate and number of steps, all sides of a comparison at the
same setting (design choice). A difference whose sign changes between settings is a difference of training.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from pydantic import BaseModel

from crosshead.analysis.frontiers import compare_objectives, compare_series, points_of
from crosshead.analysis.resampling import bootstrap_intervals, geometric_mean
from crosshead.analysis.rules import Decision, Record, Verdict

__all__ = [
    "SETTINGS", "SETTINGS_OF_ONE_START", "Robustness", "Setting", "compare_objective_settings", "compare_settings",
    "meaning_at_settings", "robustness_text", "unsettled", "unsettled_where",
]  # fmt: skip

SETTINGS = 18
"""Three starts, three learning rates, two lengths."""
SETTINGS_OF_ONE_START = 6
"""Three learning rates, two lengths: of what has one start only."""


class _Key(NamedTuple):
    """What a setting is made of, as run records name it."""

    start: str | None
    learning_rate: float
    steps: int


class Setting(BaseModel):
    """One comparison at one setting of training."""

    start: str | None
    """Start of the dictionaries that have several; None where none has."""
    learning_rate: float
    steps: int
    matched: str
    """What is equal: ``l0``, by interpolation in two sweeps; ``sparsity``, run by run, for single runs, whose L0s
    differ a little (``l0``); or ``coefficient``, where objectives are compared."""
    ratio: float
    """MSE of the first architecture over that of the second, geometric mean; below 1 the first is better. With
    ``coefficient`` the ratio of objectives."""
    interval: tuple[float, float] | None
    """95% bootstrap over held-out contexts and seeds; None for objectives."""
    l0: tuple[float, float]
    """Mean L0 of either side's runs."""
    n_sparsities: int
    seeds: list[int]


class Robustness(BaseModel):
    """A comparison at every setting that all its architectures were trained at."""

    settings: list[Setting]
    """By start, learning rate and steps."""
    ratio_range: tuple[float, float] | None
    """The smallest and the largest ratio; None without settings."""
    same_sign: bool | None
    """Whether the log of the ratio has the same sign at all settings; None for fewer than two."""
    unpaired: int
    """Settings at which one of them was not trained, or no runs could be matched."""


def compare_settings(first: Sequence[Record], second: Sequence[Record]) -> Robustness:
    """Compare two architectures setting by setting, from the records of all their runs, of any series.

    Where both have two sparsities or more with a common range of L0, they are compared there; otherwise runs of equal
    sparsity and seed are. An architecture that has one start only is held against every start of the other. Of runs
    that differ only in what is not compared (another schedule of the rate), the one of smaller error counts, on either
    side. ValueError where an architecture's runs have different numbers of features.
    """
    a, b = _at_every_start(*(_by_setting(_better(records)) for records in (first, second)))
    found = [_compare(key, a[key], b[key]) for key in sorted(set(a) & set(b), key=_order)]
    return _robustness(found, len(set(a) | set(b)))


def compare_objective_settings(both: Sequence[Record], one: Sequence[Record], other: Sequence[Record]) -> Robustness:
    """Two-layer value SAEs against the sum of one-layer ones, setting by setting.

    By their objectives at equal coefficients and seeds (``frontiers.compare_objectives``).
    """
    sides = [_by_setting(records) for records in (both, one, other)]
    found = []
    for key in sorted(set.intersection(*(set(side) for side in sides)), key=_order):
        records = [side[key] for side in sides]
        rows = compare_objectives(*records)
        ratio = geometric_mean(row["ratio"] for row in rows)
        joint, *apart = (_mean_l0(of_side) for of_side in records)
        found.append(None if ratio is None else Setting(
            **key._asdict(), matched="coefficient", ratio=ratio, interval=None, l0=(joint, sum(apart)),
            n_sparsities=len({row["coefficient"] for row in rows}), seeds=sorted({int(row["seed"]) for row in rows}),
        ))  # fmt: skip
    return _robustness(found, len(set().union(*sides)))


def unsettled(verdict: Verdict, robustness: Record | None, n_settings: int) -> Decision | None:
    """What keeps a verdict from holding however its dictionaries were trained; None where it does.

    It must hold at all of ``n_settings`` settings: their interval, or the ratio of objectives, on its side of 1.
    """
    settings = [] if robustness is None else robustness["settings"]
    if robustness is not None and robustness["unpaired"]:
        return _too_few_settings(len(settings), n_settings)
    return unsettled_where(
        [_ahead(setting) if verdict == "supports" else _behind(setting) for setting in settings], n_settings
    )


def unsettled_where(held: Sequence[bool], n_settings: int) -> Decision | None:
    """``unsettled`` where each setting is judged by itself: whether the verdict ``held`` there, measured or not."""
    if len(held) < n_settings:
        return _too_few_settings(len(held), n_settings)
    if not all(held):
        return Decision("inconclusive", f"holds at {sum(held)} of {len(held)} settings of start, rate and length")
    return None


def _too_few_settings(n: int, wanted: int) -> Decision:
    return Decision("inconclusive", f"{n} settings of start, rate and length were tried of {wanted}")


def meaning_at_settings(metrics: Record, *series: str) -> list[tuple[Record, ...]]:
    """What the features of one or two architectures mean at every setting at which all were described.

    One tuple a setting, with a record per architecture, read from the runs of ``<series>-settings``. An architecture
    that has one start only stands at every start of the other. Empty where nothing was described. ValueError where two
    runs of a series are described at one setting.
    """
    rows = {row["run"]: row for row in metrics["frontier"]}
    names = [f"{name}-settings" for name in series]
    sides: list[Sides] = [{} for _ in series]
    for run, found in ((metrics["meaning"] or {}).get("settings") or {}).items():
        if run in rows and rows[run]["series"] in names:
            own, key = sides[names.index(rows[run]["series"])], _key(rows[run])
            if key in own:
                raise ValueError(f"meaning.settings names two runs of {rows[run]['series']} with start {key.start}, "
                                 f"rate {key.learning_rate:g} and {key.steps} steps; take {run} out")  # fmt: skip
            own[key] = [found]
    if len(sides) == 2:
        sides = list(_at_every_start(*sides))
    shared = set.intersection(*(set(side) for side in sides))
    return [tuple(side[key][0] for side in sides) for key in sorted(shared, key=_order)]


def robustness_text(robustness: Record | None) -> str:
    """How far the ratio goes over all settings, as a sentence; empty where none were tried."""
    if robustness is None or not robustness["settings"]:
        return ""
    low, high = robustness["ratio_range"]
    objectives = robustness["settings"][0]["matched"] == "coefficient"
    where = f"{len(robustness['settings'])} settings of start, learning rate and length at one sparsity and seed"
    return f" Over {where}: {'objective ' if objectives else ''}{low:.3f} to {high:.3f}."


def _ahead(setting: Record) -> bool:
    if setting["matched"] == "coefficient":
        return setting["ratio"] < 1
    return setting["interval"] is not None and setting["interval"][1] < 1


def _behind(setting: Record) -> bool:
    if setting["matched"] == "coefficient":
        return setting["ratio"] > 1
    return setting["interval"] is not None and setting["interval"][0] > 1


Sides = dict[_Key, list[Record]]


def _at_every_start(first: Sides, second: Sides) -> tuple[Sides, Sides]:
    """Runs of an architecture with one start stand at every start of the other."""
    sides = first, second
    starts = [{key.start for key in side} for side in sides]
    spread = [
        {key._replace(start=start): records for key, records in side.items() for start in other or {None}}
        if own == {None} else side
        for side, own, other in zip(sides, starts, reversed(starts), strict=True)
    ]  # fmt: skip
    return spread[0], spread[1]


def _robustness(found: Sequence[Setting | None], n_settings: int) -> Robustness:
    settings = [setting for setting in found if setting is not None]
    ratios = [setting.ratio for setting in settings]
    return Robustness(
        settings=settings,
        ratio_range=(min(ratios), max(ratios)) if ratios else None,
        same_sign=len({float(np.sign(np.log(ratio))) for ratio in ratios}) == 1 if len(ratios) > 1 else None,
        unpaired=n_settings - len(settings),
    )


def _by_setting(records: Sequence[Record]) -> Sides:
    found: Sides = {}
    for record in records:
        found.setdefault(_key(record), []).append(record)
    return found


def _key(record: Record) -> _Key:
    return _Key(record["start"], float(record["learning_rate"]), int(record["steps"]))


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
    return {(int(record["seed"]), float(record["sparsity_value"])): record for record in records}


def _better(records: Sequence[Record]) -> list[Record]:
    """Of runs at one setting, sparsity and seed the one of smaller error."""
    features = sorted({record["features"] for record in records})
    if len(features) > 1:
        raise ValueError(f"runs of series {records[0]['series']} have {features[0]} to {features[-1]} features; "
                         "give runs of one architecture and as many features")  # fmt: skip
    found: dict[tuple[Any, ...], Record] = {}
    for record in sorted(records, key=lambda record: -record["normalised_mse"]):
        found[*_key(record), int(record["seed"]), float(record["sparsity_value"])] = record
    return list(found.values())


def _mean_l0(records: Sequence[Record]) -> float:
    return float(np.mean([record["l0"] for record in records]))

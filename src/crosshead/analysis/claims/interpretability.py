"""Are single-head features harder to read? What two tokens tell of their firing, and how broadly they attend."""

from collections.abc import Sequence
from typing import Any

from crosshead.analysis.robustness import SETTINGS, meaning_at_settings, unsettled_where
from crosshead.analysis.rules import (
    SEEDS_TO_DECIDE,
    Decision,
    Finding,
    Record,
    commands,
    separated,
    too_few,
)

__all__ = ["decide_interpretability", "findings", "matched_meaning", "meaning_text", "settings_text"]


def findings(metrics: Record, config: Any) -> list[Finding | None]:
    """Interpretability of Top-1. None where no meaning was measured."""
    return [_top1_interpretability(metrics, config)]


def _top1_interpretability(metrics: Record, config: Any) -> Finding | None:
    pairs = matched_meaning(metrics, config.mtc, config.top1)
    if not pairs:
        return None
    mtc, top1 = pairs[0]
    settings = meaning_at_settings(metrics, config.mtc, config.top1)
    verdict, reason = decide_interpretability(pairs, settings)
    return Finding(
        key="top1-interpretability",
        title="Single heads and interpretability",
        claim="Restricting MTC features to a single head makes them less interpretable.",
        figure=f"{meaning_text(mtc)}.{settings_text(settings, config.mtc, config.top1)}",
        control=f"{meaning_text(top1)}.",
        verdict=verdict,
        rule="Interpretability as numbers: the share of the bits of a feature's firing, where it moves from and where it "
        "moves to, that two tokens explain on held-out contexts, and breadth of attention. Supports when Top-1 is less "
        f"predictable on both sides at {SEEDS_TO_DECIDE} seeds or more and, by medians, at all of {SETTINGS} settings of "
        "start, learning rate and length; contradicts when more on both, likewise. Breadth is reported beside it.",
        reason=reason,
        picture=None,
        commands=commands(metrics, "meaning", "report"),
    )


def matched_meaning(metrics: Record, first: str, second: str) -> list[tuple[Record, Record]]:
    """Measured meaning of two series at the same seed and sparsity, lowest seed first."""
    if metrics["meaning"] is None:
        return []
    rows = {r["run"]: r for r in metrics["frontier"]}
    by_setting: dict[str, dict[tuple[int, float], Record]] = {first: {}, second: {}}
    for run, found in metrics["meaning"]["runs"].items():
        row = rows.get(run)
        if row is not None and row["series"] in by_setting:
            by_setting[row["series"]][row["seed"], row["sparsity_value"]] = found | {"run": run, "seed": row["seed"]}
    shared = sorted(by_setting[first].keys() & by_setting[second].keys())
    return [(by_setting[first][key], by_setting[second][key]) for key in shared]


def meaning_text(found: Record) -> str:
    """Predictability and breadth of one dictionary's features in words."""
    sides = ", ".join(
        f"moved {side} {value['bits']['median']:.1%} of bits ({value['bits']['interval'][0]:.1%} to "
        f"{value['bits']['interval'][1]:.1%}; shuffled {value['bits']['shuffled']:.1%}; {value['n_features']} features)"
        for side, value in found["predictability"].items()
        if value is not None
    )
    breadth = found["breadth"]
    broad = "" if breadth is None else f"; attends over {breadth['median']:.1f} tokens (median)"
    return f"{found['run']}: {sides}{broad}"


def decide_interpretability(pairs: Sequence[tuple[Record, Record]], settings: Sequence[tuple[Record, ...]]) -> Decision:
    """Supports when the first of every pair is the more predictable one on both sides.

    ``settings`` are pairs at other settings of training, at one seed, whose medians must lie the same way.
    """
    found = _at_every_seed(pairs)
    if found.verdict == "inconclusive":
        return found
    wanted = 1 if found.verdict == "supports" else -1
    held = [_more_predictable(first, second) == wanted for first, second in settings]
    return unsettled_where(held, SETTINGS) or found


def _more_predictable(first: Record, second: Record) -> int:
    """1 where the median of the first lies above that of the second on both sides, -1 where below, 0 otherwise."""
    sides = [(first["predictability"][side], second["predictability"][side]) for side in ("from", "to")]
    if any(one is None or other is None for one, other in sides):
        return 0
    above = {one["bits"]["median"] > other["bits"]["median"] for one, other in sides}
    equal = any(one["bits"]["median"] == other["bits"]["median"] for one, other in sides)
    return 0 if len(above) > 1 or equal else 1 if above.pop() else -1


def settings_text(settings: Sequence[tuple[Record, ...]], first_name: str, second_name: str) -> str:
    """At how many settings which of a pair is the more predictable one; empty where none were tried."""
    if not settings:
        return ""
    sides = [_more_predictable(first, second) for first, second in settings]
    return (f" Over {len(settings)} settings of start, learning rate and length at one sparsity and seed, by medians: features "
            f"of {first_name} are more predictable on both sides at {sides.count(1)}, those of {second_name} at "
            f"{sides.count(-1)}.")  # fmt: skip


def _at_every_seed(pairs: Sequence[tuple[Record, Record]]) -> Decision:
    seeds = {first["seed"] for first, _ in pairs}
    if (few := too_few(len(seeds))) is not None:
        return few
    if any(each["predictability"][side] is None for pair in pairs for each in pair for side in ("from", "to")):
        return Decision("inconclusive", "one side was not measured")
    sides = [separated(second["predictability"][side]["bits"], first["predictability"][side]["bits"])
             for first, second in pairs for side in ("from", "to")]  # fmt: skip
    if sides and all(side == -1 for side in sides):
        return Decision("supports", "less predictable on both sides at every seed and setting")
    if sides and all(side == 1 for side in sides):
        return Decision("contradicts", "more predictable on both sides at every seed and setting")
    return Decision("inconclusive", f"separated in {sum(side != 0 for side in sides)} of {len(sides)} comparisons, not all "
                    "in one direction")  # fmt: skip

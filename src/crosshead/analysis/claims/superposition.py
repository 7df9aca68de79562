"""Are attention features spread over heads? MTC against Top-1."""

from collections.abc import Mapping
from typing import Any

from crosshead.analysis.robustness import SETTINGS, robustness_text, unsettled
from crosshead.analysis.rules import (
    SEEDS_TO_DECIDE,
    Decision,
    Finding,
    Record,
    budget_text,
    commands,
    decide,
    lies_below,
    ratio_text,
    too_few,
)

__all__ = ["decide_superposition", "findings"]


def findings(metrics: Record, config: Any) -> list[Finding | None]:
    """MTC against Top-1. None where runs are missing."""
    return [_superposition(metrics, config)]


def _superposition(metrics: Record, config: Any) -> Finding | None:
    comparison = metrics["comparisons"].get("mtc_over_top1")
    if comparison is None:
        return None
    norms = {name: metrics["comparisons"].get(f"{name}_over_top1") for name in config.mtc_penalties}
    nulls = _nulls(metrics["nulls"])
    plain, both = (metrics["robustness"].get(f"mtc_over_top1{end}") for end in ("", "_schedules"))
    robustness = both or plain
    least = calibration(metrics["planted"])
    verdict, reason = decide_superposition(comparison, norms, nulls, robustness, config.mtc, least)
    planted = (
        ""
        if least is None
        else f" On planted layers with one head per feature the ratio lies down to {least:.2f} times the null's."
    )
    held = "not run"
    if config.mtc in nulls:
        held = (f"{_null_text(nulls[config.mtc])}, of a Top-1 teacher that explains all but "
                f"{metrics['nulls']['teacher_normalised_mse']:.3f} of the variance")  # fmt: skip
        if "own" in comparison:
            held += f"; the real target at the same sparsities: {ratio_text(comparison['own'])}"
    others = "".join(f" {name} over Top-1: {ratio_text(other)}; its null: "
                     + (_null_text(nulls[name]) if name in nulls else "not run") + "."
                     for name, other in norms.items() if other is not None)  # fmt: skip
    variants = {f"{name} over Top-1": f"{name}_over_top1" for name in config.variants}
    variants |= {f"{first} over {second}": f"{first}_over_{second}" for first, second in config.sensitivity}
    others += "".join(f" For the reader, {name}: {ratio_text(metrics['comparisons'][key])}."
                      for name, key in variants.items() if key in metrics["comparisons"])  # fmt: skip
    return Finding(
        key="superposition",
        title="Attention superposition",
        claim="Binding every MTC feature to a single attention head (Top-1) makes the reconstruction worse, which "
        "speaks for attention features spread over heads.",
        figure=f"MTC over Top-1: {ratio_text(comparison)}.{others}{robustness_text(plain)}{_schedules_text(both)}",
        control=f"Top-1 from the same start with the same learning rates, {budget_text(comparison)}; the linear Top-1 "
        f"reference is drawn. One-head null (the same comparison where one head per feature is the planted truth): {held}.{planted}",
        verdict=verdict,
        rule="Supports when the interval of the ratio lies below 1 and, at the null's sparsities, below that of the one-head "
        "null, its planted noise counted and not, times the least that planted one-head layers show of it (training alone "
        f"gives that much), with {SEEDS_TO_DECIDE} seeds or more, at equal tokens and features, under every norm of head "
        f"loadings against its own null, and the interval lies below 1 in all of {SETTINGS} settings of start, learning "
        "rate and length, at twice the rate with the better of two schedules on either side. Contradicts when the null's interval lies below.",
        reason=reason,
        picture="mtc_frontier.png",
        commands=commands(metrics, "nulls", "report"),
    )


def _nulls(nulls: Record | None) -> dict[str, Record]:
    """Comparisons on the null's target by series, each with ``above_noise``: its interval without the planted noise.

    The noise is the least that any student's error can be, so it dilutes a ratio: of errors a and b above noise n,
    (a - n) / (b - n) = (a/b - n/b) / (1 - n/b), taken where the noise is the largest share of a Top-1 error. None where
    a Top-1 error is no more than the noise.
    """
    if nulls is None:
        return {}
    errors = [row["normalised_mse"] for row in nulls["rows"] if row["heads_per_feature"] == 1]
    share = nulls["noise_share"] / min(errors) if errors else 1.0
    found = {}
    for name, comparison in nulls["comparisons"].items():
        interval = comparison["interval"]
        above = None if interval is None or share >= 1 else [(end - share) / (1 - share) for end in interval]
        found[name] = comparison | {"above_noise": above}
    return found


def _null_text(null: Record) -> str:
    above = null["above_noise"]
    return ratio_text(null) + ("" if above is None else "; above its planted noise {:.3f} to {:.3f}".format(*above))


def calibration(planted: Record | None) -> float | None:
    """The smallest ratio of errors over the null's on planted layers with one head per feature; None without any."""
    rows = [] if planted is None else planted["rows"]
    found = [row["ratio"] / row["null_ratio"] for row in rows
             if row["question"] == "superposition" and row["layer"] == "one-head" and row["null_ratio"]]  # fmt: skip
    return min(found, default=None)


def _schedules_text(both: Record | None) -> str:
    if both is None or both["ratio_range"] is None:
        return ""
    return " At twice the rate with the better of two schedules on either side: {:.3f} to {:.3f}.".format(
        *both["ratio_range"]
    )


def decide_superposition(
    comparison: Record,
    norms: Mapping[str, Record | None],
    nulls: Mapping[str, Record],
    robustness: Record | None,
    mtc: str,
    least: float | None,
) -> Decision:
    """A smaller error must beat the one-head null, under every norm; a larger one decides nothing.

    ``norms`` and ``nulls`` are comparisons with Top-1 by series; the null of ``mtc`` is among the latter. ``least`` is
    what planted one-head layers show of the null's ratio (``calibration``). A comparison of more sparsities than its
    null has brings itself at the null's (``own``).
    """
    found = decide(comparison)
    if found.verdict == "inconclusive":
        return found
    if found.verdict == "contradicts":
        return Decision(
            "inconclusive", "an MTC can be any Top-1 MTC, so one that loses was trained badly: find out why first"
        )
    for name, own in {mtc: comparison, **norms}.items():
        against = _against_null(name, own, nulls.get(name), least)
        if against is not None:
            return against
    if (why := unsettled(found.verdict, robustness, SETTINGS)) is not None:
        return why
    return Decision("supports", f"{found.reason} and below the null's, under every norm and setting")


def _against_null(name: str, comparison: Record | None, null: Record | None, least: float | None) -> Decision | None:
    """What keeps one norm from beating its null; None where it does."""
    if comparison is None:
        return Decision("inconclusive", f"{name} was not compared; the rule asks for every norm of head loadings")
    if (own := decide(comparison, sparsities=2)).verdict != "supports":
        return Decision("inconclusive", f"{name}: {own.reason}")
    if len({tuple(features) for features in comparison["features"]}) > 1:
        return Decision("inconclusive", f"{name}: the sweeps have different numbers of features")
    if null is None:
        return Decision("inconclusive", f"{name}: the one-head null was not run")
    if (few := too_few(null["n_seeds"], " of the null")) is not None:
        return few
    beside = comparison.get("own") or comparison
    if beside["interval"] is None or null["interval"] is None:
        return Decision("inconclusive", f"{name}: no common range of L0 with the one-head null")
    if lies_below(null, beside):
        return Decision(
            "contradicts", f"{name}: the one-head null shows a larger gain, so the gain needs no spread features"
        )
    if not lies_below(beside, null):
        return Decision("inconclusive", f"{name}: the interval meets that of the one-head null")
    if least is None:
        return Decision("inconclusive", "no planted layer with one head per feature to calibrate the null on")
    if null["above_noise"] is None:
        return Decision("inconclusive", f"{name}: no Top-1 error of the null exceeds its planted noise")
    for low, which in ((null["interval"][0], ""), (null["above_noise"][0], " above the null's noise")):
        bar = min(1.0, least) * low
        if beside["interval"][1] >= bar:
            return Decision("inconclusive", f"{name}: not below {bar:.3f}, which training alone may give{which}")
    return None

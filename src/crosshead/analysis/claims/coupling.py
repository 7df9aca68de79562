"""Is where information moves coupled to what moves? MTCs against SAE features moved through heads."""

from typing import Any

from crosshead.analysis.claims.interpretability import (
    decide_interpretability,
    matched_meaning,
    meaning_text,
    settings_text,
)
from crosshead.analysis.robustness import SETTINGS, meaning_at_settings, robustness_text, unsettled
from crosshead.analysis.rules import (
    Decision,
    Finding,
    Record,
    both_regimes,
    budget_text,
    commands,
    decide,
    ratio_text,
)

__all__ = ["decide_best_head", "decide_joint", "findings"]


def findings(metrics: Record, config: Any) -> list[Finding | None]:
    """SAE through its best head, joint SAE and MTC, their features' interpretability."""
    return [_best_head(metrics, config), _joint(metrics, config), _interpretability(metrics, config)]


def _best_head(metrics: Record, config: Any) -> Finding | None:
    comparison = metrics["comparisons"].get("mtc_over_best_head")
    if comparison is None:
        return None
    robustness = metrics["robustness"].get("mtc_over_best_head")
    verdict, reason = decide_best_head(comparison, robustness)
    read = matched_meaning(metrics, config.mtc, config.best_head)
    beside = "".join(f" {meaning_text(each)}." for each in (read[0] if read else ()))
    return Finding(
        key="coupling-best-head",
        title="QK/OV coupling, SAE through its best head",
        claim="MTC features explain what attention moves better than SAE features moved through the head that moves them "
        "most in a context, because where and what are coupled.",
        figure=f"MTC over SAE through its best head: {ratio_text(comparison)}.{robustness_text(robustness)}",
        control=f"The SAE chooses its head anew in every context, which the MTC cannot; the MTC may use several. "
        f"{budget_text(comparison)}.{_beside_references(metrics, config.best_head)} Features on the same contexts:"
        f"{beside or ' not described.'}",
        verdict=verdict,
        rule=f"Supports when the interval lies below 1 at four sparsities and three seeds, and at all of {SETTINGS} settings of "
        "start (the MTC's), learning rate and length.",
        reason=reason,
        picture="coupling_frontier.png",
        commands=commands(metrics, "report"),
    )


def _beside_references(metrics: Record, series: str) -> str:
    """How strong a baseline the SAE is: its errors, and those of what needs no dictionary."""
    errors = [row["normalised_mse"] for row in metrics["frontier"] if row["series"] == series]
    linear = metrics["references"]["own_position_linear"]
    if not errors or linear is None:
        return ""
    return f" The SAE's own errors are {min(errors):.3f} to {max(errors):.3f}, the best linear map of the own position has {linear:.3f}."


def decide_best_head(comparison: Record, robustness: Record | None) -> Decision:
    """A ratio that holds however the two were trained."""
    found = decide(comparison)
    return (None if found.verdict == "inconclusive" else unsettled(found.verdict, robustness, SETTINGS)) or found


def _joint(metrics: Record, config: Any) -> Finding | None:
    top1 = metrics["comparisons"].get("top1_over_joint_top1")
    if top1 is None:
        return None
    full = metrics["comparisons"].get("mtc_over_joint_mtc")
    robustness = metrics["robustness"].get("top1_over_joint_top1")
    verdict, reason = decide_joint(top1, full, robustness)
    held = "not run" if full is None else ratio_text(full)
    return Finding(
        key="coupling-joint",
        title="QK/OV coupling, joint training",
        claim="A Top-1 MTC whose features are learned for moving beats one whose features are those of a jointly trained "
        "SAE (the source: except in one regime of L0), so where and what are coupled.",
        figure=f"Top-1 over joint SAE + Top-1: {ratio_text(top1)}; {_parts(top1)}.{robustness_text(robustness)}",
        control=f"The same with all heads, so that coupling is told from superposition, MTC over joint SAE + MTC: {held}. "
        f"{budget_text(top1)}.",
        verdict=verdict,
        rule="Supports when Top-1 lies below its joint twin in the lower and in the upper half of L0 and at all of "
        f"{SETTINGS} settings of start (the Top-1 MTC's), learning rate and length, and the MTC below its own; contradicts "
        "when both lie above.",
        reason=reason,
        picture="coupling_frontier.png",
        commands=commands(metrics, "report"),
    )


def _parts(comparison: Record) -> str:
    listed = []
    for name, part in comparison["parts"].items():
        if part["ratio"] is not None and part["interval"] is not None:
            low, high = part["interval"]
            listed.append(f"{name} L0 {part['ratio']:.3f} ({low:.3f} to {high:.3f})")
    return ", ".join(listed) or "no parts"


def decide_joint(top1: Record, full: Record | None, robustness: Record | None) -> Decision:
    """Both decoders must agree; the Top-1 one in both regimes of L0 and at every setting."""
    found = both_regimes(top1)
    if found.verdict == "inconclusive":
        return found
    if full is None:
        return Decision(
            "inconclusive", "the joint SAE + full MTC was not run, so coupling and superposition are not separated"
        )
    other = decide(full, sparsities=2)
    if other.verdict != found.verdict:
        return Decision("inconclusive", f"Top-1: {found.reason}; all heads: {other.reason}")
    if (why := unsettled(found.verdict, robustness, SETTINGS)) is not None:
        return why
    return Decision(found.verdict, f"Top-1: {found.reason}; all heads: {other.reason}")


def _interpretability(metrics: Record, config: Any) -> Finding | None:
    pairs = matched_meaning(metrics, config.top1, config.joint_top1)
    if not pairs:
        return None
    top1, joint = pairs[0]
    settings = meaning_at_settings(metrics, config.top1, config.joint_top1)
    verdict, reason = decide_interpretability(pairs, settings)
    return Finding(
        key="coupling-interpretability",
        title="QK/OV coupling, interpretability",
        claim="SAE features moved through a single-head MTC decoder attend more broadly or are more polysemantic than the "
        "features of a Top-1 MTC.",
        figure=f"{meaning_text(joint)}.{_matched_text(metrics, config.top1, config.joint_top1)}"
        f"{settings_text(settings, config.top1, config.joint_top1)}",
        control=f"{meaning_text(top1)}.",
        verdict=verdict,
        rule="Supports when the joint model's features are less predictable from two tokens on both sides at three seeds or "
        f"more and, by medians, at all of {SETTINGS} settings of start (the Top-1 MTC's), learning rate and length; "
        "contradicts when more on both, likewise.",
        reason=reason,
        picture=None,
        commands=commands(metrics, "meaning", "report"),
    )


def _matched_text(metrics: Record, first: str, second: str) -> str:
    """What differs between features that both dictionaries have; empty where none were matched."""
    series = {row["run"]: row["series"] for row in metrics["frontier"]}
    for found in (metrics["meaning"] or {}).get("matches", []):
        if (series.get(found["first"]), series.get(found["second"])) != (first, second):
            continue
        named = {"breadth of attention": found["measures"]["breadth"], "tokens": found["measures"]["tokens"]}
        changes = [f"{label} {measure['ratio']:.2f} times ({measure['interval'][0]:.2f} to {measure['interval'][1]:.2f})"
                   for label, measure in named.items() if measure is not None]  # fmt: skip
        if changes:
            return (f" On the {found['n_matched']:,} features that {found['first']} has as well, {found['second']} against it: "
                    f"{', '.join(changes)} (median of the ratio, 95% over features).")  # fmt: skip
    return ""

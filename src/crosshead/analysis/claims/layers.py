"""Do attention features span layers? Two-layer value SAEs against sums of one-layer ones."""

import math
from collections.abc import Sequence
from typing import Any

from crosshead.analysis.robustness import SETTINGS_OF_ONE_START, robustness_text, unsettled
from crosshead.analysis.rules import (
    NO_GAP,
    Decision,
    Finding,
    Record,
    commands,
    decide,
    lies_below,
    objective_text,
    objectives,
    of_series,
    ratio_text,
    too_few,
)

__all__ = ["decide_layers", "findings"]

MATCHED = 0.8
"""Share of held-out positions at which control (ii) must keep at least the current token."""


def findings(metrics: Record, config: Any) -> list[Finding | None]:
    """The far pair of layers and, where it was run, the adjacent one."""
    return [
        _pair(metrics, "cross-layer", "two layers that lie apart", config.two_layer, _controls(config, ""), "value_frontier.png"),
        _pair(metrics, "cross-layer-adjacent", "two adjacent layers", (config.two_layer_near,), _controls(config, "near"),
              None),
    ]  # fmt: skip


def _controls(config: Any, which: str) -> dict[str, str]:
    if which == "near":
        base = config.two_layer_near
        return {
            "other contexts": f"{base}-control",
            "matched tokens": f"{base}-matched",
            "shared input": f"{base}-shared",
        }
    return {"other contexts": config.two_layer_control, "matched tokens": config.two_layer_matched,
            "shared input": config.two_layer_shared}  # fmt: skip


def _pair(
    metrics: Record, key: str, which: str, series: tuple[str, ...], controls: dict[str, str], picture: str | None
) -> Finding | None:
    comparisons = [metrics["comparisons"].get(f"{name}_over_sum") for name in series]
    if comparisons[0] is None:
        return None
    held = {label: metrics["comparisons"].get(f"{name}_over_sum") for label, name in controls.items()}
    labels = ("equal total features", "equal features each")
    figures = [f"{label}: {ratio_text(c)}{objective_text(c)}"
               for label, c in zip(labels, comparisons, strict=False) if c is not None]  # fmt: skip
    matched = of_series(metrics, controls["matched tokens"])
    names = (series[0], controls["other contexts"])
    settings, control_settings = (metrics["robustness"].get(f"{name}_over_sum") for name in names)
    verdict, reason = decide_layers(comparisons[0], held, matched, settings, control_settings)
    texts = {
        "other contexts": "(i) Second layer's rows from other contexts",
        "matched tokens": f"(ii) from other contexts at the same current and previous token{_shares(matched)}",
        "shared input": "(iii) second layer's values recomputed from the first layer's input",
    }
    listed = "; ".join(f"{text}: {_control_text(held[label])}" for label, text in texts.items())
    return Finding(
        key=key,
        title=f"Cross-layer representations, {which}",
        claim="A value SAE over two layers reaches a better frontier than two one-layer value SAEs together, which speaks "
        f"for attention features that span layers ({which}).",
        figure=f"Two-layer over the sum of one-layer SAEs, {'; '.join(figures)}.{robustness_text(settings)}",
        control=f"{listed}.{robustness_text(control_settings).replace(' Over', ' (i) over', 1)}",
        verdict=verdict,
        rule="Supports only when the interval lies below 1, at every coefficient the objective lies more than 2% below 1 and "
        f"below that of control (i), control (ii) matches at least one token at {MATCHED:.0%} of positions, and ratio and "
        "every objective lie below those of (ii) and (iii) at the same coefficients, without which the gap may be shared "
        f"input; and at {SETTINGS_OF_ONE_START} settings of learning rate and length the objective lies below 1 and below that of (i). "
        "Contradicts when the interval lies above 1 although the objective of control (i) is within 2% of 1 at every "
        "coefficient.",
        reason=reason,
        picture=picture,
        commands=commands(metrics, "report"),
    )


def _control_text(control: Record | None) -> str:
    if control is None:
        return "not run"
    own = control.get("own")
    beside = "" if own is None else f" (two layers at the same coefficients: {ratio_text(own)}{objective_text(own)})"
    return f"{ratio_text(control)}{objective_text(control)}{beside}"


def _shares(matched: Sequence[Record]) -> str:
    """How well the control's donors match on held-out contexts."""
    shares = matched[0]["control_detail"] if matched else None
    return (
        ""
        if shares is None
        else f" where there is one ({shares['pair']:.0%} of positions; {shares['token']:.0%} the token)"
    )


_SHARED_INPUT = (("matched tokens", "(ii)"), ("shared input", "(iii)"))


def decide_layers(
    comparison: Record, controls: dict[str, Record | None], matched: Sequence[Record] = (),
    settings: Record | None = None, control_settings: Record | None = None,
) -> Decision:  # fmt: skip
    """See ``_decide``. A ratio below 1 that does not beat controls (ii) and (iii) is called shared input in any case."""
    found = _decide(comparison, controls, matched, settings, control_settings)
    held = [(name, control) for label, name in _SHARED_INPUT if (control := controls[label]) is not None]
    unbeaten = [name for name, control in held if objectives(control) and not _beats(comparison, control)]
    if found.verdict != "inconclusive" or comparison["ratio"] is None or comparison["ratio"] >= 1 or not unbeaten:
        return found
    return Decision(
        "inconclusive", f"{found.reason}; the gap does not beat control {' and '.join(unbeaten)}: shared input"
    )


def _decide(
    comparison: Record, controls: dict[str, Record | None], matched: Sequence[Record], settings: Record | None,
    control_settings: Record | None,
) -> Decision:  # fmt: skip
    """A gap must show no twin where nothing is shared, and must beat what a shared input alone gives.

    By frontier and by objective: L0 falls whenever features are shared, even where rows share nothing, so control (i) is
    judged by the objective, which adds up over layers, coefficient by coefficient: training too short for a small one
    must not be made up for by a large one. A control of fewer coefficients brings the comparison at the same ones
    (``own``). ``matched`` are the runs of control (ii), the settings those of two layers and of control (i).
    """
    names = {"other contexts": "(i)", "matched tokens": "(ii)", "shared input": "(iii)"}
    found = decide(comparison)
    if found.verdict == "inconclusive":
        return found
    needed = names if found.verdict == "supports" else {"other contexts": "(i)"}
    for label, name in needed.items():
        control = controls[label]
        if control is None or control["interval"] is None:
            return Decision("inconclusive", f"control {name} was not compared")
        if (few := too_few(control["n_seeds"], f" of control {name}")) is not None:
            return few
    held = {label: control for label, control in controls.items() if control is not None}
    plain = objectives(held["other contexts"])
    if not plain:
        return Decision("inconclusive", "control (i) has no L1 runs, and L0 falls even where nothing is shared")
    if found.verdict == "contradicts":
        furthest = max(plain.values(), key=lambda ratio: abs(ratio - 1))
        if abs(furthest - 1) > NO_GAP:
            return Decision("inconclusive", f"an objective of control (i), where no gap may remain, is {furthest:.3f}")
        return unsettled("contradicts", settings, SETTINGS_OF_ONE_START) or found
    details = [row["control_detail"] for row in matched]
    if not details or None in details:
        return Decision("inconclusive", "it is not known at how many positions control (ii) matches a token")
    least = min(detail["pair"] + detail["token"] for detail in details)
    if least < MATCHED:
        return Decision(
            "inconclusive", f"control (ii) matches a token at {least:.0%} of positions; the rule asks {MATCHED:.0%}"
        )
    gaps = objectives(held["other contexts"].get("own") or comparison)
    if gaps.keys() != plain.keys():
        return Decision("inconclusive", "two layers and control (i) have no objective at the same coefficients")
    for coefficient, gap in gaps.items():
        bar = min(1.0, plain[coefficient]) - NO_GAP
        if gap >= bar:
            return Decision("inconclusive", f"no gap at coefficient {coefficient:g}: the objective is {gap:.3f}, that of "
                            f"control (i) {plain[coefficient]:.3f}")  # fmt: skip
    without = [name for label, name in _SHARED_INPUT if not objectives(held[label])]
    if without:
        return Decision("inconclusive", f"control {' and '.join(without)} has no L1 runs")
    if not all(_beats(comparison, held[label]) for label, _ in _SHARED_INPUT):
        return Decision("inconclusive", "a gap at every coefficient")
    if (why := unsettled("supports", settings, SETTINGS_OF_ONE_START)) is not None:
        return why
    if (why := _not_below(settings, control_settings)) is not None:
        return why
    return Decision("supports", "below 1 and below controls (ii) and (iii), by frontier and objective")


def _beats(comparison: Record, control: Record) -> bool:
    """Whether two layers lie below a control by frontier and, at every coefficient that it has, by objective."""
    against = control.get("own") or comparison
    own, other = objectives(against), objectives(control)
    above = [c for c, ratio in other.items() if own.get(c, math.inf) >= ratio]
    return not above and lies_below(against, control)


def _not_below(settings: Record | None, control_settings: Record | None) -> Decision | None:
    """What keeps two layers from lying below control (i) at every setting; None where they do."""
    own, held = ({(row["learning_rate"], row["steps"]): row["ratio"] for row in (side or {"settings": []})["settings"]}
                 for side in (settings, control_settings))  # fmt: skip
    above = [setting for setting, ratio in own.items() if ratio >= held.get(setting, -math.inf)]
    if not above:
        return None
    return Decision("inconclusive", f"not below control (i) at {len(above)} of {len(own)} settings of rate and length")

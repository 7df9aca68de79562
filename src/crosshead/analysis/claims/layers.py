"""Do attention features span layers? Two-layer value SAEs against sums of one-layer ones."""

from collections.abc import Sequence
from typing import Any

from crosshead.analysis.rules import (
    NO_GAP,
    Decision,
    Finding,
    Record,
    commands,
    decide,
    lies_below,
    objective_text,
    of_series,
    ratio_text,
)

__all__ = ["decide_layers", "findings"]


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
    verdict, reason = decide_layers(comparisons[0], held)
    matched = of_series(metrics, controls["matched tokens"])
    texts = {
        "other contexts": "(i) Second layer's rows from other contexts",
        "matched tokens": f"(ii) from other contexts at the same current and previous token{_shares(matched)}",
        "shared input": "(iii) second layer's values recomputed from the first layer's input",
    }
    listed = "; ".join(f"{text}: " + ("not run" if (c := held[label]) is None else f"{ratio_text(c)}{objective_text(c)}")
                       for label, text in texts.items())  # fmt: skip
    return Finding(
        key=key,
        title=f"Cross-layer representations, {which}",
        claim="A value SAE over two layers reaches a better frontier than two one-layer value SAEs together, which speaks "
        f"for attention features that span layers ({which}).",
        figure=f"Two-layer over the sum of one-layer SAEs, {'; '.join(figures)}.",
        control=f"{listed}.",
        verdict=verdict,
        rule="Supports only when the interval lies below 1, control (i) shows no gap, and the ratio lies below those of "
        "(ii) and (iii), without which the gap may be shared input.",
        reason=reason,
        picture=picture,
        commands=commands(metrics, "report"),
    )


def _shares(matched: Sequence[Record]) -> str:
    """How well the control's donors match on held-out contexts."""
    shares = matched[0]["control_detail"] if matched else None
    return (
        ""
        if shares is None
        else f" where there is one ({shares['pair']:.0%} of positions; {shares['token']:.0%} the token)"
    )


def decide_layers(comparison: Record, controls: dict[str, Record | None]) -> Decision:
    """A gap must show no twin where nothing is shared, and must beat what a shared input alone gives."""
    plain = controls["other contexts"]
    if plain is None or plain["interval"] is None:
        return Decision("inconclusive", "the control was not compared")
    if plain["interval"][1] < 1 - NO_GAP or plain["interval"][0] > 1 + NO_GAP:
        return Decision(
            "inconclusive",
            "control (i), where no gap may remain, shows one of its own: L0 falls whenever features are shared, so "
            "read the objective beside it, which adds up over layers that share nothing",
        )
    found = decide(comparison)
    if found.verdict != "supports":
        return found
    for label, name in (("matched tokens", "(ii)"), ("shared input", "(iii)")):
        control = controls[label]
        if control is None or control["interval"] is None:
            return Decision("inconclusive", f"control {name} was not compared: the gap may be shared input")
        if not lies_below(comparison, control):
            return Decision("inconclusive", f"the gap does not beat control {name}: shared input")
    return Decision("supports", "below 1 and below controls (ii) and (iii)")

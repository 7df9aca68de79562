"""Attention output SAEs: what their features are, and induction features on induction heads."""

from collections.abc import Sequence
from typing import Any

from crosshead.analysis.robustness import SETTINGS, SETTINGS_OF_ONE_START, meaning_at_settings, unsettled_where
from crosshead.analysis.rules import COHERENT_LIFT, SEEDS_TO_DECIDE, Decision, Finding, Record, commands, too_few

__all__ = ["decide_heads", "decide_labels", "findings"]

_WANTED = ("induction", "succession")
_SIGNIFICANT = 0.05


def findings(metrics: Record, config: Any) -> list[Finding | None]:
    """Induction and succession among attention-output features; MTC induction features on induction heads."""
    return [_attention_output(metrics, config), _induction_heads(metrics, config)]


def _attention_output(metrics: Record, config: Any) -> Finding | None:
    rows = [r for r in metrics["frontier"] if r["series"] == config.attention_output]
    mtc = [r for r in metrics["frontier"] if r["series"] == config.mtc]
    if not rows or not mtc:
        return None
    at = min(rows, key=lambda r: (r["seed"], abs(r["l0"] - 60)))
    near = min(mtc, key=lambda r: (r["seed"], abs(r["l0"] - at["l0"])))
    labelled = _labelled(metrics, config.attention_output)
    settings = [own["labels"] for (own,) in meaning_at_settings(metrics, config.attention_output)]
    verdict, reason = decide_labels([(seed, found["labels"]) for seed, _, found in labelled], settings)
    counts = "".join(
        f" {run}: "
        + ", ".join(
            f"{found['labels'][label]['count']} {label} features ({found['labels'][label]['expected']:.1f} expected{_as_many(found['labels'][label])})"
            for label in _WANTED
            if label in found["labels"]
        )
        + f" of {found['n_live']:,} live."
        for _, run, found in labelled[:1]
    )
    return Finding(
        key="attention-output",
        title="Attention output SAE",
        claim="SAEs on attention outputs find interpretable features, induction and succession features among them.",
        figure=f"{at['run']}: normalised MSE {at['normalised_mse']:.4f} at L0 {at['l0']:.0f} (query side), "
        f"{at['dead_fraction']:.0%} of features dead on {at['n_tokens']:,} held-out tokens, cross-entropy recovered "
        f"{_share(at['ce_recovered'])} ({at['n_tokens_spliced']:,} tokens).{counts}{_label_settings(settings)}",
        control=f"{near['run']}, which predicts the same output from the layer's input: {near['normalised_mse']:.4f} at L0 "
        f"{near['l0']:.0f} (key side), {near['dead_fraction']:.0%} dead, {_share(near['ce_recovered'])} recovered. Expected "
        "label counts are those of keys drawn at random and of exchanged pairs; a layer with induction heads exceeds them "
        "easily.",
        verdict=verdict,
        rule=f"Supports when both kinds are found at {SEEDS_TO_DECIDE} seeds or more, {COHERENT_LIFT:g} times as often as "
        f"expected, succession features also more than in 95% of exchanges of ordered and shuffled lists, and so at all of "
        f"{SETTINGS_OF_ONE_START} settings of learning rate and length; contradicts when neither is at any seed or setting.",
        reason=reason,
        picture="attention_output_frontier.png",
        commands=commands(metrics, "meaning", "report"),
    )


def _labelled(metrics: Record, series: str) -> list[tuple[int, str, Record]]:
    if metrics["meaning"] is None:
        return []
    rows = {row["run"]: row for row in metrics["frontier"]}
    return sorted(((rows[run]["seed"], run, found) for run, found in metrics["meaning"]["runs"].items()
                   if run in rows and rows[run]["series"] == series), key=lambda item: item[:2])  # fmt: skip


def decide_labels(labels: Sequence[tuple[int, Record]], settings: Sequence[Record]) -> Decision:
    """``labels``: seed and ``{label: {count, expected}}`` of every attention-output SAE.

    ``settings`` are the labels of SAEs at other settings of training.
    """
    seeds = {seed for seed, _ in labels}
    if (few := too_few(len(seeds))) is not None:
        return few
    found = {label: [_many(own, label) for _, own in labels] for label in _WANTED}
    if all(all(each) for each in found.values()):
        held = [all(_many(own, label) for label in _WANTED) for own in settings]
        return unsettled_where(held, SETTINGS_OF_ONE_START) or Decision(
            "supports", "both kinds at every seed and setting"
        )
    if not any(any(each) for each in found.values()):
        held = [not any(_many(own, label) for label in _WANTED) for own in settings]
        return unsettled_where(held, SETTINGS_OF_ONE_START) or Decision(
            "contradicts", "neither kind at any seed or setting"
        )
    return Decision(
        "inconclusive", "; ".join(f"{label} at {sum(each)} of {len(each)}" for label, each in found.items())
    )


def _many(labels: Record, name: str) -> bool:
    if name not in labels:
        return False
    found, p_value = labels[name], labels[name]["p_value"]
    return found["count"] >= COHERENT_LIFT * max(1.0, found["expected"]) and (p_value is None or p_value < _SIGNIFICANT)


def _as_many(label: Record) -> str:
    return "" if label["p_value"] is None else f", as many in {label['p_value']:.1%} of draws"


def _label_settings(settings: Sequence[Record]) -> str:
    found = {label: [own[label]["count"] for own in settings if label in own] for label in _WANTED}
    listed = ", ".join(f"{min(each)} to {max(each)} {label} features" for label, each in found.items() if each)
    where = f"{len(settings)} settings of learning rate and length at one sparsity and seed"
    return f" Over {where}: {listed}." if listed else ""


def _induction_heads(metrics: Record, config: Any) -> Finding | None:
    labelled = [(seed, run, found) for seed, run, found in _labelled(metrics, config.mtc) if found["induction_heads"]]
    if not labelled:
        return None
    _, run, found = labelled[0]
    heads = found["induction_heads"]
    settings = [own["induction_heads"] for (own,) in meaning_at_settings(metrics, config.mtc)]
    verdict, reason = decide_heads([(seed, each["induction_heads"]) for seed, _, each in labelled], settings)
    return Finding(
        key="induction-heads",
        title="Induction features on induction heads",
        claim="Induction features are moved by the heads that attend like induction heads.",
        figure=f"{run}: {_percent(heads['share_on_survey_heads'])}{_range(heads['interval'])} of what its induction features move goes through the "
        f"survey's induction heads ({', '.join('{layer}.{head}'.format(**head) for head in heads['survey_heads'])}); "
        f"{found['labels']['induction']['count']} induction features.{_head_settings(settings)}",
        control=f"All features of the same dictionary: {_percent(heads['expected_share'])}.",
        verdict=verdict,
        rule=f"Supports when the interval of the share over induction features (ten or more) lies above the share of all "
        f"features at {SEEDS_TO_DECIDE} seeds or more and at all of {SETTINGS} settings of start, learning rate and length, "
        "contradicts when below at every one of either. Features are called induction "
        "features by the places they move from, through the same heads, so this is a check of consistency.",
        reason=reason,
        picture=None,
        commands=commands(metrics, "meaning", "report"),
    )


def decide_heads(shares: Sequence[tuple[int, Record]], settings: Sequence[Record | None]) -> Decision:
    """``shares``: seed and ``{interval, expected_share}`` of every MTC; ``settings``: of MTCs trained otherwise."""
    known = [(seed, s) for seed, s in shares if s["interval"] is not None and s["expected_share"] is not None]
    seeds = {seed for seed, _ in known}
    if (few := too_few(len(seeds))) is not None:
        return few
    if len(known) < len(shares):
        return Decision(
            "inconclusive", f"{len(shares) - len(known)} of {len(shares)} MTCs have too few induction features"
        )
    above = [_side(s) == 1 for _, s in known]
    if all(above):
        held = [s is not None and _side(s) == 1 for s in settings]
        return unsettled_where(held, SETTINGS) or Decision(
            "supports", "the whole interval lies above at every seed and setting"
        )
    if all(_side(s) == -1 for _, s in known):
        held = [s is not None and _side(s) == -1 for s in settings]
        return unsettled_where(held, SETTINGS) or Decision(
            "contradicts", "the whole interval lies below at every seed and setting"
        )
    return Decision("inconclusive", f"the whole interval lies above at {sum(above)} of {len(above)} seeds")


def _side(share: Record) -> int:
    """1 where the interval lies above what is expected, -1 where below, 0 where it holds it or there is none."""
    if share["interval"] is None or share["expected_share"] is None:
        return 0
    low, high = share["interval"]
    return int(low > share["expected_share"]) - int(high < share["expected_share"])


def _head_settings(settings: Sequence[Record | None]) -> str:
    found = [s["share_on_survey_heads"] for s in settings if s is not None and s["share_on_survey_heads"] is not None]
    if not found:
        return ""
    return (f" Over {len(found)} settings of start, learning rate and length at one sparsity and seed: {min(found):.0%} to "
            f"{max(found):.0%}.")  # fmt: skip


def _share(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.2f}"


def _range(interval: Sequence[float] | None) -> str:
    return "" if interval is None else f" (95% over features {interval[0]:.0%} to {interval[1]:.0%})"


def _percent(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.0%}"

"""Do the instruments tell the truth where it is known? Planted layers and trained toys."""

from collections.abc import Sequence
from typing import Any

from crosshead.analysis.rules import SEEDS_TO_DECIDE, Decision, Finding, Record, commands, too_few

__all__ = ["called_right", "decide_planted", "findings"]

_RECOVERED = 0.95
_EQUAL_L0 = 1.05
"""An MTC that uses up to 5% more features per position than Top-1 is compared with it at equal L0."""


def findings(metrics: Record, config: Any) -> list[Finding | None]:
    """One row about the instruments themselves; None where no planted layer was trained on."""
    if metrics["planted"] is None:
        return [None]
    rows = metrics["planted"]["rows"]
    verdict, reason = decide_planted(rows)
    return [Finding(
        key="planted-truth",
        title="Instruments, where the truth is known",
        claim="Not of the source: on layers of known features an MTC finds them, Top-1 fails where features are spread over "
        "heads and only there, and the analysis calls a layer what it is.",
        figure=f"{_recovered(rows)}{_told(rows)}",
        control="Half of the layers hold one head per feature; of the pairs of layers a third shares no feature, and a third has its second "
        "layer from other contexts.",
        verdict=verdict,
        rule=f"Supports when, at {SEEDS_TO_DECIDE} seeds or more, an MTC recovers {_RECOVERED:.0%} of the features of every "
        "layer, Top-1 less than half of the spread ones and more than half of the others, and every layer, pair and toy is "
        f"called what it is (a toy's call counts where the MTC's L0 is at most {_EQUAL_L0 - 1:.0%} above Top-1's); "
        "contradicts when an MTC recovers less than half, or most calls are wrong.",
        reason=reason,
        picture="planted_phases.png" if any(row["question"] == "phases" for row in rows) else None,
        commands=commands(metrics, "planted", "report"),
    )]  # fmt: skip


def _of(rows: Sequence[Record], **wanted: Any) -> list[Record]:
    return [row for row in rows if all(row.get(key) == value for key, value in wanted.items())]


def _recovered(rows: Sequence[Record]) -> str:
    texts = []
    for architecture, name in (("mtc", "an MTC"), ("top1", "Top-1")):
        for layer in ("one-head", "superposed"):
            shares = [
                r["share_recovered"] for r in _of(rows, question="recovery", architecture=architecture, layer=layer)
            ]
            if shares:
                texts.append(f"{name} {sum(shares) / len(shares):.0%} on {layer} layers (least {min(shares):.0%}, "
                             f"{len(shares)} seed{'s' if len(shares) > 1 else ''})")  # fmt: skip
    return f"Features recovered: {'; '.join(texts)}." if texts else ""


def called_right(row: Record) -> bool | None:
    """Whether the analysis called a layer, a pair of layers or a toy what it is; None for rows of other questions.

    A toy is superposed; its call counts where the MTC uses no more features per position than Top-1, or hardly more.
    """
    match row["question"]:
        case "superposition":
            return row["superposed"] == (row["layer"] == "superposed")
        case "shared_layers":
            return row["found"] == (row["layers"] == "shared")
        case "toys":
            return row["superposed"] and row["mtc_l0"] <= _EQUAL_L0 * row["top1_l0"]
        case _:
            return None


def _calls(rows: Sequence[Record]) -> list[bool]:
    return [right for row in rows if (right := called_right(row)) is not None]


def _told(rows: Sequence[Record]) -> str:
    right = _calls(rows)
    return f" Called what they are: {sum(right)} of {len(right)} layers, pairs and toys." if right else ""


def decide_planted(rows: Sequence[Record]) -> Decision:
    """See the rule in ``findings``."""
    mtc = _of(rows, question="recovery", architecture="mtc")
    spread, alone = (_of(rows, question="recovery", architecture="top1", layer=layer)
                     for layer in ("superposed", "one-head"))  # fmt: skip
    right = _calls(rows)
    if not mtc:
        return Decision("inconclusive", "no recovery was measured")
    if not right:
        return Decision("inconclusive", "no layer, pair or toy was called anything")
    if (few := too_few(len({row["seed"] for row in mtc}))) is not None:
        return few
    least = min(row["share_recovered"] for row in mtc)
    most = max((row["share_recovered"] for row in spread), default=1.0)
    fewest = min((row["share_recovered"] for row in alone), default=0.0)
    if least < 0.5 or sum(right) < len(right) / 2:
        return Decision("contradicts", f"least recovered {least:.0%}, {sum(right)} of {len(right)} calls right")
    if least >= _RECOVERED and most < 0.5 < fewest and all(right):
        return Decision("supports", f"least recovered {least:.0%}, all {len(right)} calls right")
    return Decision("inconclusive", f"least recovered {least:.0%}, Top-1 {most:.0%} at most of spread features and {fewest:.0%} at "
                    "least of the others, "
                    f"{sum(right)} of {len(right)} calls right")  # fmt: skip

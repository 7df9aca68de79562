"""Rules that turn measured numbers into verdicts. docs/verdicts.md says them in words, and which came after numbers.

A verdict is ``inconclusive`` unless its rule is met. One trained dictionary never decides, nor does one seed.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict

__all__ = [
    "COHERENT_LIFT",
    "NO_GAP",
    "SEEDS_TO_DECIDE",
    "SPARSITIES_TO_DECIDE",
    "Decision",
    "Finding",
    "Record",
    "Verdict",
    "both_regimes",
    "budget_text",
    "commands",
    "decide",
    "lies_below",
    "objective_text",
    "objectives",
    "of_interval",
    "of_series",
    "ratio_text",
    "separated",
    "too_few",
]

Record = dict[str, Any]
Verdict = Literal["supports", "contradicts", "inconclusive"]

SEEDS_TO_DECIDE = 3
SPARSITIES_TO_DECIDE = 4
NO_GAP = 0.02
"""A control within 2% of 1 shows no gap."""
COHERENT_LIFT = 3.0
"""A label or an enrichment counts when there are this many times as many as its control expects."""


class Finding(BaseModel):
    """One claim of the source and what we measured about it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    key: str
    title: str
    """The claim in a few words: its heading, and its line in the table of verdicts."""
    claim: str
    """What the source says, in our words."""
    figure: str
    """Our number, with its sample size."""
    control: str
    """What the number is held against."""
    verdict: Verdict
    rule: str
    """When the claim counts as supported or contradicted."""
    reason: str
    """Why the rule gives this verdict."""
    picture: str | None
    """File under figures/."""
    commands: str
    """What regenerates it."""


class Decision(NamedTuple):
    """A verdict and why."""

    verdict: Verdict
    reason: str


def decide(comparison: Record | None, sparsities: int = SPARSITIES_TO_DECIDE) -> Decision:
    """Of a ratio of errors: below 1 with its whole interval and enough runs supports; above 1 likewise contradicts.

    Enough: three seeds or more, ``sparsities`` or more in both sweeps (two for ablations), equal tokens.
    """
    if comparison is None:
        return Decision("inconclusive", "these sweeps were not run")
    if comparison["ratio"] is None or comparison["interval"] is None:
        return Decision("inconclusive", "no common range of L0")
    if (few := too_few(comparison["n_seeds"])) is not None:
        return few
    n_points = comparison["n_sparsities"]
    if n_points < sparsities:
        return Decision("inconclusive", f"{n_points} sparsities in a sweep; the rule asks for {sparsities}")
    if not comparison["equal_tokens"]:
        return Decision("inconclusive", "the sweeps were trained on different numbers of tokens")
    return of_interval(comparison["interval"])


def of_interval(interval: Sequence[float]) -> Decision:
    """Of the interval of a ratio of errors."""
    low, high = interval
    if high < 1:
        return Decision("supports", "the whole interval lies below 1")
    if low > 1:
        return Decision("contradicts", "the whole interval lies above 1")
    return Decision("inconclusive", "the interval holds 1")


def too_few(n_seeds: int, what: str = "") -> Decision | None:
    """The decision where fewer seeds were trained than any rule asks for; None where there are enough."""
    if n_seeds >= SEEDS_TO_DECIDE:
        return None
    plural = "" if n_seeds == 1 else "s"
    return Decision("inconclusive", f"{n_seeds} seed{plural}{what}; the rule asks for {SEEDS_TO_DECIDE}")


def lies_below(first: Record, second: Record) -> bool:
    """Whether the whole interval of the first ratio lies below the whole interval of the second."""
    return first["interval"] is not None and second["interval"] is not None and (
        first["interval"][1] < second["interval"][0])  # fmt: skip


def separated(first: Record, second: Record) -> int:
    """-1 where the first median's interval lies below the second's, 1 where above, 0 where they meet."""
    if first["interval"][1] < second["interval"][0]:
        return -1
    return int(first["interval"][0] > second["interval"][1])


def both_regimes(comparison: Record) -> Decision:
    """``decide``, and the same sign in the lower and the upper half of the common range of L0."""
    found = decide(comparison)
    if found.verdict == "inconclusive":
        return found
    sides = {name: _side(part) for name, part in comparison["parts"].items()}
    wanted = -1 if found.verdict == "supports" else 1
    against = [name for name, side in sides.items() if side != wanted]
    if against:
        return Decision("inconclusive", f"over the whole range {found.reason}, but not at {' and '.join(against)} L0")
    return Decision(found.verdict, f"{found.reason}, at low and at high L0")


def _side(part: Record) -> int:
    if part["interval"] is None:
        return 0
    low, high = part["interval"]
    return -1 if high < 1 else int(low > 1)


def ratio_text(comparison: Record) -> str:
    """A comparison in words, with its interval, range and sample size."""
    if comparison["ratio"] is None:
        return "the two sweeps do not overlap in L0"
    interval = "no interval"
    if comparison["interval"] is not None:
        drawn = "contexts and seeds" if comparison["n_seeds"] > 1 else "contexts"
        low, high = comparison["interval"]
        interval = f"95% over {drawn} {low:.3f} to {high:.3f}"
    where = "" if comparison["l0_range"] is None else " at L0 {:.0f} to {:.0f}".format(*comparison["l0_range"])
    seeds = f"{comparison['n_seeds']} seed{'s' if comparison['n_seeds'] > 1 else ''}"
    sample = f"{comparison['n_tokens']:,} held-out tokens in {comparison['n_contexts']} contexts, {seeds}"
    return f"normalised MSE ratio {comparison['ratio']:.3f} ({interval}){where}; {sample}"


def objectives(comparison: Record) -> dict[float, float]:
    """By coefficient, largest first, the objective ratio: geometric mean over seeds. Empty without L1 runs."""
    ratios: dict[float, list[float]] = {}
    for row in comparison["objective"]:
        ratios.setdefault(row["coefficient"], []).append(math.log(row["ratio"]))
    largest_first = sorted(ratios.items(), reverse=True)
    return {coefficient: math.exp(sum(found) / len(found)) for coefficient, found in largest_first}


def objective_text(comparison: Record) -> str:
    """Objective ratios, one figure per coefficient; empty where no L1 run was compared."""
    listed = ", ".join(f"{ratio:.3f} ({coefficient:g})" for coefficient, ratio in objectives(comparison).items())
    return f"; objective ratio (coefficient) {listed}" if listed else ""


def budget_text(comparison: Record) -> str:
    """Whether features and tokens were equal."""
    features = [", ".join(f"{n:,}" for n in found) for found in comparison["features"]]
    equal = f"{features[0]} features each" if len(set(features)) == 1 else f"{' against '.join(features)} features"
    return f"{equal}, {'equal' if comparison['equal_tokens'] else 'UNEQUAL'} tokens"


def commands(metrics: Mapping[str, Any], *stages: str) -> str:
    """What to type to regenerate the outputs of some stages."""
    profile = metrics["profile"]
    pipeline = "" if profile == "laptop" else f"flows/profiles/{profile}/dvc.yaml:"
    return " ".join(["dvc repro", *(f"{pipeline}{stage}" for stage in stages)])


def of_series(metrics: Mapping[str, Any], series: str) -> Sequence[Record]:
    """Rows of the frontier of one series."""
    return [row for row in metrics["frontier"] if row["series"] == series]

"""Are attention features spread over heads? MTC against Top-1, heads per feature, the identity head."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
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
    of_series,
    ratio_text,
    separated,
    too_few,
)

__all__ = ["decide_interpretability", "decide_superposition", "findings", "matched_meaning", "meaning_text"]

_NEAR_L0 = 60
_LONGER = "-long"
"""What the names of series end in that were trained longer than the series without it."""


def findings(metrics: Record, config: Any) -> list[Finding | None]:
    """Superposition, heads per feature, interpretability of Top-1, identity. None where runs are missing."""
    return [
        _superposition(metrics, config),
        _heads(metrics, config),
        _top1_interpretability(metrics, config),
        _identity(metrics),
    ]


# ---- MTC against Top-1 ----


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


# ---- heads per feature ----


def _heads(metrics: Record, config: Any) -> Finding | None:
    rows = [r for r in metrics["frontier"] if r["superposition"] is not None and r["target"] == "attn_out"]
    top1 = [r for r in rows if r["series"] == config.top1]
    mtc = [r for r in rows if r["series"] == config.mtc]
    if not top1 or not mtc:
        return None
    held = [{r["sparsity_value"] for r in rows if r["series"] == name} for name in config.few_heads]
    shared = set.intersection(*held) if held else set()
    candidates = [r for r in mtc if r["sparsity_value"] in shared] or mtc
    at = min(candidates, key=lambda r: (r["seed"], abs(r["l0"] - _NEAR_L0)))
    same = min(top1, key=lambda r: (r["seed"] != at["seed"], abs(r["l0"] - at["l0"])))
    few = [r for r in rows if r["series"] in config.few_heads and r["seed"] == same["seed"]
           and abs(r["l0"] - at["l0"]) < 0.25 * at["l0"]]  # fmt: skip
    dose = "; ".join(f"{r['heads_per_feature']}: {r['normalised_mse']:.4f} at L0 {r['l0']:.0f}"
                     for r in sorted([*few, same], key=lambda r: r["heads_per_feature"]))  # fmt: skip
    spread = at["superposition"]
    null = _null_spread(metrics, config, at["sparsity_value"])
    verdict, reason = _decide_heads(metrics, config)
    return Finding(
        key="heads-per-feature",
        title="Heads per feature",
        claim="Features of an MTC use more than one head.",
        figure=f"Contributions of {at['run']} spread over {spread['participation_ratio_mean']:.2f} heads per feature "
        f"(median {spread['participation_ratio_median']:.2f}; {spread['n_features']:,} live features, "
        f"{at['n_tokens_detail']:,} held-out tokens). Normalised MSE by movers a feature may have, trained so - all: "
        f"{at['normalised_mse']:.4f} at L0 {at['l0']:.0f}; {dose} ({at['n_tokens']:,} held-out tokens).{_longer_text(metrics, config)} {_pruned(at)}",
        control=f"Top-1 by construction: {same['superposition']['participation_ratio_mean']:.2f}. An MTC trained where one "
        f"head per feature is the planted truth, in the same activations: {null}.",
        verdict=verdict,
        rule="Supports when, under gram, l1 and l2 alike and at every seed, features spread over more heads than those of "
        "the one-head null do, and the trained dose-response falls from one mover over two and four to all, at every "
        "sparsity (where all four were trained longer too, those count).",
        reason=reason,
        picture="mtc_frontier.png",
        commands=commands(metrics, "nulls", "report"),
    )


def _null_rows(metrics: Record, series: str) -> list[Record]:
    rows = (metrics["nulls"] or {}).get("rows", [])
    return [r for r in rows if r["series"] == series and r["participation_ratio_mean"] is not None]


def _null_spread(metrics: Record, config: Any, sparsity: float) -> str:
    rows = _null_rows(metrics, config.mtc)
    same = [r for r in rows if float(r["k"]) == sparsity]
    ratios = [r["participation_ratio_mean"] for r in same or rows]
    return f"{min(ratios):.2f} to {max(ratios):.2f}" if ratios else "not run"


def _decide_heads(metrics: Record, config: Any) -> Decision:
    above: list[bool] = []
    for name in (config.mtc, *config.mtc_penalties):
        rows = [r for r in of_series(metrics, name) if r["superposition"]]
        if not rows:
            return Decision("inconclusive", f"{name} was not run; the rule asks for every norm of head loadings")
        if (few := too_few(len({r["seed"] for r in rows}), f" of {name}")) is not None:
            return few
        null = _null_rows(metrics, name)
        shared = {r["sparsity_value"] for r in rows} & {float(r["k"]) for r in null}
        if not shared:
            return Decision("inconclusive", f"the one-head null of {name} was not run")
        for k in shared:
            real = [r["superposition"]["participation_ratio_mean"] for r in rows if r["sparsity_value"] == k]
            planted = [r["participation_ratio_mean"] for r in null if float(r["k"]) == k]
            above.append(min(real) > max(planted))
            if max(real) <= min(planted):
                return Decision("contradicts", f"{name} at k={k:g}: no more heads than in the null")
    if not all(above):
        return Decision("inconclusive", f"above the null at {sum(above)} of {len(above)} norms and sparsities")
    falls, why = _dose_response(metrics, config)
    return Decision(
        "supports" if falls else "inconclusive", f"more heads than the null at every norm, seed, sparsity; {why}"
    )


def _dose_response(metrics: Record, config: Any) -> tuple[bool, str]:
    """Whether the error falls from one over two and four movers to all, at every sparsity, on average over seeds.

    All movers can do what four do, so an error that rises was trained badly: where all were trained longer, that counts.
    """
    names = (config.top1, *config.few_heads, config.mtc)
    doses = _doses(metrics, names) | _doses(metrics, [f"{name}{_LONGER}" for name in names])
    if not doses:
        return False, "one, few and all movers were not trained at three seeds"
    for sparsity, means in sorted(doses.items()):
        for (fewer, a), (more, b) in pairwise(means.items()):
            if a <= b:
                return False, f"at k={sparsity:g} the error does not fall from {fewer} ({a:.4f}) to {more} ({b:.4f})"
    return True, "the dose-response falls at every sparsity"


def _doses(metrics: Record, names: Sequence[str]) -> dict[float, dict[str, float]]:
    """By sparsity the error of every series, mean over seeds, where all have the same three seeds or more."""
    errors = {name: {(r["seed"], r["sparsity_value"]): r["normalised_mse"] for r in of_series(metrics, name)}
              for name in names}  # fmt: skip
    shared = set.intersection(*(set(own) for own in errors.values()))
    found: dict[float, dict[str, float]] = {}
    for sparsity in {sparsity for _, sparsity in shared}:
        keys = [key for key in shared if key[1] == sparsity]
        if len(keys) >= SEEDS_TO_DECIDE:
            found[sparsity] = {name: sum(errors[name][key] for key in keys) / len(keys) for name in names}
    return found


def _longer_text(metrics: Record, config: Any) -> str:
    names = [f"{name}{_LONGER}" for name in (config.top1, *config.few_heads, config.mtc)]
    listed = ["; ".join(f"{name} {error:.4f}" for name, error in means.items()) + f" at k={sparsity:g}"
              for sparsity, means in sorted(_doses(metrics, names).items())]  # fmt: skip
    return f" Trained longer, mean over seeds - {'; '.join(listed)}." if listed else ""


def _pruned(row: Record) -> str:
    if not row["pruned"]:
        return ""
    kept = "; ".join(f"{p['movers']}: {p['normalised_mse']:.4f}" for p in row["pruned"])
    return (f"{row['run']} itself, every feature cut to its strongest movers and one gain each refitted - {kept} "
            f"({row['pruned'][0]['n_tokens']:,} held-out tokens).")  # fmt: skip


# ---- interpretability of Top-1 ----


def _top1_interpretability(metrics: Record, config: Any) -> Finding | None:
    pairs = matched_meaning(metrics, config.mtc, config.top1)
    if not pairs:
        return None
    shown = [text for mtc, top1 in pairs[:1] for text in (meaning_text(mtc), meaning_text(top1))]
    verdict, reason = decide_interpretability(pairs)
    return Finding(
        key="top1-interpretability",
        title="Single heads and interpretability",
        claim="Restricting MTC features to a single head makes them less interpretable.",
        figure=f"{shown[0]}.",
        control=f"{shown[1]}.",
        verdict=verdict,
        rule="Interpretability as numbers: the share of the bits of a feature's firing, where it moves from and where it "
        "moves to, that two tokens explain on held-out contexts, and breadth of attention. Supports when Top-1 is less "
        f"predictable on both sides at {SEEDS_TO_DECIDE} seeds or more, contradicts when more on both; breadth is reported "
        f"beside it.",
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


def decide_interpretability(pairs: Sequence[tuple[Record, Record]]) -> Decision:
    """Supports when the first of every pair is the more predictable one on both sides."""
    seeds = {first["seed"] for first, _ in pairs}
    if (few := too_few(len(seeds))) is not None:
        return few
    if any(each["predictability"][side] is None for pair in pairs for each in pair for side in ("from", "to")):
        return Decision("inconclusive", "one side was not measured")
    sides = [separated(second["predictability"][side]["bits"], first["predictability"][side]["bits"])
             for first, second in pairs for side in ("from", "to")]  # fmt: skip
    if sides and all(side == -1 for side in sides):
        return Decision("supports", "less predictable on both sides at every seed")
    if sides and all(side == 1 for side in sides):
        return Decision("contradicts", "more predictable on both sides at every seed")
    return Decision("inconclusive", f"separated in {sum(side != 0 for side in sides)} of {len(sides)} comparisons, not all "
                    "in one direction")  # fmt: skip


# ---- identity ----


def _identity(metrics: Record) -> Finding | None:
    rows = [r for r in metrics["frontier"] if r["target"] == "resid_out" and r["superposition"] is not None]
    if not rows:
        return None
    row = rows[0]
    own = [r for r in metrics["frontier"]
           if r["architecture"] == "mtc" and r["target"] == "attn_out" and r["heads_per_feature"] == "all"
           and r["sparsity"] == row["sparsity"]]  # fmt: skip
    shares = [r["superposition"]["identity_share"] for r in own if r["superposition"] is not None]
    control = f"attention-output target at the same sparsity: {shares[0]:.1%}" if shares else "none run"
    return Finding(
        key="identity",
        title="Identity head",
        claim="With the residual stream as target, an identity head lets the MTC fuse attention with MLP-like work.",
        figure=f"{row['superposition']['identity_share']:.1%} of the written energy went through the identity "
        f"({row['n_tokens_detail']:,} held-out tokens); normalised MSE {row['normalised_mse']:.4f} at L0 {row['l0']:.0f} "
        f"({row['n_tokens']:,} held-out tokens).",
        control=f"Identity share for the {control}.",
        verdict="inconclusive",
        rule="None: a share says that the identity is used, not that the fused operation is simpler.",
        reason="no rule decides this",
        picture=None,
        commands=commands(metrics, f"train@{row['run']}", "report"),
    )

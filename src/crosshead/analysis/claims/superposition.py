"""Are attention features spread over heads? MTC against Top-1, heads per feature, the identity head."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

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

__all__ = ["findings"]

_NEAR_L0 = 60


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
    penalties = {name: metrics["comparisons"].get(f"{name}_over_top1") for name in config.mtc_penalties}
    null = (metrics["nulls"] or {}).get("comparison")
    verdict, reason = decide_superposition(comparison, penalties, null, metrics["robustness"])
    held = "not run" if null is None else f"{ratio_text(null)}, of a Top-1 teacher that explains all but " \
        f"{metrics['nulls']['teacher_normalised_mse']:.3f} of the variance"  # fmt: skip
    return Finding(
        key="superposition",
        title="Attention superposition",
        claim="Binding every MTC feature to a single attention head (Top-1) makes the reconstruction worse, which "
        "speaks for attention features spread over heads.",
        figure=f"MTC over Top-1: {ratio_text(comparison)}.",
        control=f"Top-1 from the same start with the same learning rates, {budget_text(comparison)}; the linear Top-1 "
        f"reference is drawn. One-head null (the same comparison where one head per feature is the planted truth): {held}.",
        verdict=verdict,
        rule=f"Supports when the interval of the ratio lies below 1 and below that of the one-head null, with "
        f"{SEEDS_TO_DECIDE} seeds or more, at equal tokens and features, under every norm of head loadings, with the same "
        f"sign for every start, learning rate and length tried.",
        reason=reason,
        picture="mtc_frontier.png",
        commands=commands(metrics, "nulls", "report"),
    )


def decide_superposition(
    comparison: Record,
    penalties: Mapping[str, Record | None],
    null: Record | None,
    robustness: Record | None,
) -> Decision:
    """A smaller error must beat the one-head null and hold under every norm; a larger one decides nothing."""
    found = decide(comparison)
    if found.verdict == "inconclusive":
        return found
    if len({tuple(features) for features in comparison["features"]}) > 1:
        return Decision("inconclusive", "the sweeps have different numbers of features")
    if found.verdict == "contradicts":
        return Decision(
            "inconclusive", "an MTC can be any Top-1 MTC, so one that loses was trained badly: find out why first"
        )
    for name, other in penalties.items():
        if other is None:
            return Decision("inconclusive", f"{name} was not compared; the rule asks for every norm of head loadings")
        if (own := decide_penalty(other)).verdict != "supports":
            return Decision("inconclusive", f"{name}: {own.reason}")
    if null is None:
        return Decision("inconclusive", "the one-head null was not run")
    if not lies_below(comparison, null):
        if null["interval"] is not None and comparison["interval"][0] >= null["interval"][0]:
            return Decision(
                "contradicts", "the one-head null shows as large a gain, so the gain needs no spread features"
            )
        return Decision("inconclusive", "the interval meets that of the one-head null")
    if robustness is None or not robustness["settings"]:
        return Decision("inconclusive", "no other start, learning rate or length was tried")
    if not robustness["same_sign"]:
        return Decision("inconclusive", "the sign changes with start, learning rate or length")
    return Decision("supports", f"{found.reason} and below the null's, under every norm and setting")


def decide_penalty(comparison: Record) -> Decision:
    """As ``decide``, with two sparsities: the other norms are ablations."""
    return decide(comparison | {"n_sparsities": max(comparison["n_sparsities"], 4) if comparison["n_sparsities"] >= 2
                                else comparison["n_sparsities"]})  # fmt: skip


# ---- heads per feature ----


def _heads(metrics: Record, config: Any) -> Finding | None:
    rows = [r for r in metrics["frontier"] if r["superposition"] is not None and r["target"] == "attn_out"]
    top1 = [r for r in rows if r["series"] == config.top1]
    mtc = [r for r in rows if r["series"] == config.mtc]
    if not top1 or not mtc:
        return None
    at = min(mtc, key=lambda r: (r["seed"], abs(r["l0"] - _NEAR_L0)))
    same = min(top1, key=lambda r: (r["seed"] != at["seed"], abs(r["l0"] - at["l0"])))
    few = [r for r in rows if isinstance(r["heads_per_feature"], int) and r["heads_per_feature"] > 1
           and r["architecture"] == "mtc" and r["seed"] == same["seed"]
           and abs(r["l0"] - at["l0"]) < 0.25 * at["l0"]]  # fmt: skip
    dose = "; ".join(f"{r['heads_per_feature']}: {r['normalised_mse']:.4f} at L0 {r['l0']:.0f}"
                     for r in sorted([*few, same], key=lambda r: r["heads_per_feature"]))  # fmt: skip
    spread = at["superposition"]
    null = _null_spread(metrics, config)
    verdict, reason = _decide_heads(metrics, config)
    return Finding(
        key="heads-per-feature",
        title="Heads per feature",
        claim="Features of an MTC use more than one head.",
        figure=f"Contributions of {at['run']} spread over {spread['participation_ratio_mean']:.2f} heads per feature "
        f"(median {spread['participation_ratio_median']:.2f}; {spread['n_features']:,} live features, "
        f"{at['n_tokens_detail']:,} held-out tokens). Normalised MSE by movers a feature may have, trained so - all: "
        f"{at['normalised_mse']:.4f} at L0 {at['l0']:.0f}; {dose} ({at['n_tokens']:,} held-out tokens). {_pruned(at)}",
        control=f"Top-1 by construction: {same['superposition']['participation_ratio_mean']:.2f}. An MTC trained where one "
        f"head per feature is the planted truth, in the same activations: {null}.",
        verdict=verdict,
        rule="Supports when, under gram, l1 and l2 alike and at every seed, features spread over more heads than those of "
        "the one-head null do, and the trained dose-response falls from one mover to all.",
        reason=reason,
        picture="mtc_frontier.png",
        commands=commands(metrics, "nulls", "report"),
    )


def _null_ratios(metrics: Record, config: Any) -> list[float]:
    rows = (metrics["nulls"] or {}).get("rows", [])
    return [r["participation_ratio_mean"] for r in rows
            if r["series"] == config.mtc and r["participation_ratio_mean"] is not None]  # fmt: skip


def _null_spread(metrics: Record, config: Any) -> str:
    ratios = _null_ratios(metrics, config)
    return f"{min(ratios):.2f} to {max(ratios):.2f}" if ratios else "not run"


def _decide_heads(metrics: Record, config: Any) -> Decision:
    null = _null_ratios(metrics, config)
    if not null:
        return Decision("inconclusive", "the one-head null was not run")
    ratios: list[float] = []
    for name in (config.mtc, *config.mtc_penalties):
        own = [r["superposition"]["participation_ratio_mean"] for r in of_series(metrics, name) if r["superposition"]]
        seeds = {r["seed"] for r in of_series(metrics, name)}
        if not own:
            return Decision("inconclusive", f"{name} was not run; the rule asks for every norm of head loadings")
        if (few := too_few(len(seeds), f" of {name}")) is not None:
            return few
        ratios += own
    if max(ratios) <= min(null):
        return Decision("contradicts", f"at most {max(ratios):.2f} heads, no more than in the null")
    if min(ratios) <= max(null):
        return Decision("inconclusive", f"{min(ratios):.2f} to {max(ratios):.2f} heads meet the null's range")
    falls, why = _dose_response(metrics, config)
    return Decision("supports" if falls else "inconclusive", f"{min(ratios):.2f} heads or more everywhere; {why}")


def _dose_response(metrics: Record, config: Any) -> tuple[bool, str]:
    """Whether two and four movers lie between one and all, on average over the seeds and sparsities they share."""
    names = (config.top1, *config.few_heads, config.mtc)
    errors = {name: {(r["seed"], r["sparsity_value"]): r["normalised_mse"] for r in of_series(metrics, name)}
              for name in names}  # fmt: skip
    shared = set.intersection(*(set(own) for own in errors.values()))
    if not shared:
        return False, "no sparsity at which one, few and all movers were trained"
    means = [sum(errors[name][key] for key in shared) / len(shared) for name in names]
    falls = all(a > b for a, b in pairwise(means))
    return falls, "the dose-response " + ("falls throughout" if falls else "does not fall throughout")


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
    shown = [text for mtc, top1 in pairs[:1] for text in (_meaning_text(mtc), _meaning_text(top1))]
    verdict, reason = decide_interpretability(pairs)
    return Finding(
        key="top1-interpretability",
        title="Single heads and interpretability",
        claim="Restricting MTC features to a single head makes them less interpretable.",
        figure=f"{shown[0]}.",
        control=f"{shown[1]}.",
        verdict=verdict,
        rule="Interpretability as numbers: held-out average precision with which two tokens predict where a feature "
        "moves from and to, over that of shuffled firings, and breadth of attention. Supports when Top-1 is less "
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


def _meaning_text(found: Record) -> str:
    parts = [
        f"{found['run']}: average precision "
        + ", ".join(
            f"moved {side} {value['median']:.3f} ({value['interval'][0]:.3f} to {value['interval'][1]:.3f}; shuffled "
            f"{value['shuffled']:.3f})"
            for side, value in found["predictability"].items()
            if value is not None
        )
    ]
    if found["breadth"] is not None:
        parts.append(f"attends over {found['breadth']['median']:.1f} tokens (median)")
    return "; ".join(parts) + f" ({found['n_live']:,} live features)"


def decide_interpretability(pairs: Sequence[tuple[Record, Record]]) -> Decision:
    """Supports when the first of every pair is the more predictable one on both sides."""
    seeds = {first["seed"] for first, _ in pairs}
    if (few := too_few(len(seeds))) is not None:
        return few
    sides = [separated(second["predictability"][side], first["predictability"][side])
             for first, second in pairs for side in ("from", "to")
             if first["predictability"][side] is not None and second["predictability"][side] is not None]  # fmt: skip
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

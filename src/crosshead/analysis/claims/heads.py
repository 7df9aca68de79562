"""How many heads does a feature use, and what goes through the identity?"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from crosshead.analysis.robustness import SETTINGS, unsettled_where
from crosshead.analysis.rules import (
    SEEDS_TO_DECIDE,
    Decision,
    Finding,
    Record,
    commands,
    of_series,
    too_few,
)

__all__ = ["findings"]

_NEAR_L0 = 60
_LONGER = "-long"
"""What the names of series end in that were trained longer than the series without it."""


def findings(metrics: Record, config: Any) -> list[Finding | None]:
    """Heads per feature, the identity head. None where runs are missing."""
    return [_heads(metrics, config), _identity(metrics)]


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
        f"{at['normalised_mse']:.4f} at L0 {at['l0']:.0f}; {dose} ({at['n_tokens']:,} held-out tokens).{_longer_text(metrics, config)}{_settings_text(metrics, config)}{_variants_text(metrics, config)} {_pruned(at)}",
        control=f"Top-1 by construction: {same['superposition']['participation_ratio_mean']:.2f}. An MTC trained where one "
        f"head per feature is the planted truth, in the same activations: {null}.",
        verdict=verdict,
        rule="Supports when, under gram, l1 and l2 alike and at every seed, features spread over more heads than those of "
        "the one-head null do, and the trained dose-response falls from one mover over two and four to all, at every "
        "sparsity (where all four were trained longer too, those count), and at all of "
        f"{SETTINGS} settings of start, learning rate and length features spread over more heads than those of the null "
        "trained alike. Contradicts when under some norm, at some sparsity, they spread over no more heads than the null's "
        "at any seed, nor at any setting.",
        reason=reason,
        picture="mtc_frontier.png",
        commands=commands(metrics, "nulls", "report"),
    )


def _null_rows(metrics: Record, series: str) -> list[Record]:
    rows = (metrics["nulls"] or {}).get("rows", [])
    return [r for r in rows if r["series"] == series and r["participation_ratio_mean"] is not None]


def _settings_text(metrics: Record, config: Any) -> str:
    found = _at_settings(metrics, config)
    if not found:
        return ""
    real, planted = (f"{min(side):.2f} to {max(side):.2f}" for side in zip(*found, strict=True))
    return (f" At {len(found)} settings of start, learning rate and length, one sparsity and seed: {real} heads per feature, "
            f"the null trained alike {planted}, more at {sum(own > null for own, null in found)} of them.")  # fmt: skip


def _variants_text(metrics: Record, config: Any) -> str:
    """Heads per feature where loadings have a sign, or a norm that is a penalty instead of a weight in top-k."""
    listed = []
    for name in (*config.variants, *(first for first, _ in config.sensitivity)):
        spreads = [row["superposition"]["participation_ratio_mean"] for row in of_series(metrics, name)
                   if row["superposition"] and row["heads_per_feature"] == "all" and row["target"] == "attn_out"]  # fmt: skip
        if spreads:
            listed.append(f"{name} {min(spreads):.2f} to {max(spreads):.2f}")
    return f" For the reader, heads per feature without a null: {'; '.join(listed)}." if listed else ""


def _null_spread(metrics: Record, config: Any, sparsity: float) -> str:
    rows = _null_rows(metrics, config.mtc)
    same = [r for r in rows if float(r["k"]) == sparsity]
    ratios = [r["participation_ratio_mean"] for r in same or rows]
    return f"{min(ratios):.2f} to {max(ratios):.2f}" if ratios else "not run"


def _decide_heads(metrics: Record, config: Any) -> Decision:
    above, below = [], ""
    for name in (config.mtc, *config.mtc_penalties):
        rows = [r for r in of_series(metrics, name) if r["superposition"]]
        if not rows:
            return Decision("inconclusive", f"{name} was not run; the rule asks for every norm of head loadings")
        null = _null_rows(metrics, name)
        shared = {r["sparsity_value"] for r in rows} & {float(r["k"]) for r in null}
        if not shared:
            return Decision("inconclusive", f"the one-head null of {name} was not run")
        for k in sorted(shared):
            real = {r["seed"]: r["superposition"]["participation_ratio_mean"] for r in rows if r["sparsity_value"] == k}
            planted = {r["seed"]: r["participation_ratio_mean"] for r in null if float(r["k"]) == k}
            for seeds, where in ((real, name), (planted, f"the one-head null of {name}")):
                if (few := too_few(len(seeds), f" of {where} at k={k:g}")) is not None:
                    return few
            above.append(min(real.values()) > max(planted.values()))
            if max(real.values()) <= min(planted.values()):
                below = below or f"{name} at k={k:g}: no more heads than in the null"
    settings = _at_settings(metrics, config)
    if below:
        return unsettled_where([real <= null for real, null in settings], SETTINGS) or Decision("contradicts", below)
    if not all(above):
        return Decision("inconclusive", f"above the null at {sum(above)} of {len(above)} norms and sparsities")
    falls, why = _dose_response(metrics, config)
    if not falls:
        return Decision("inconclusive", f"more heads than the null at every norm, seed, sparsity; {why}")
    return unsettled_where([real > null for real, null in settings], SETTINGS) or Decision(
        "supports", f"more heads than the null at every norm, seed, sparsity and setting; {why}"
    )


def _at_settings(metrics: Record, config: Any) -> list[tuple[float, float]]:
    """Heads per feature of an MTC and of its null, at every other setting of start, learning rate and length."""
    nulls = {row["run"]: row["participation_ratio_mean"] for row in (metrics["nulls"] or {}).get("settings", [])}
    return [
        (row["superposition"]["participation_ratio_mean"], nulls[row["run"]])
        for row in of_series(metrics, f"{config.mtc}-settings")
        if row["superposition"] is not None and nulls.get(row["run"]) is not None
    ]


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

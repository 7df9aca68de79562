"""Do attention replacement layers work? Signs of life among their heads, and many simple heads against few."""

from collections.abc import Sequence
from math import comb
from typing import Any

import numpy as np

from crosshead.analysis.resampling import bootstrap_intervals
from crosshead.analysis.rules import (
    COHERENT_LIFT,
    SEEDS_TO_DECIDE,
    Decision,
    Finding,
    Record,
    commands,
    of_interval,
    too_few,
)

__all__ = ["LEVEL", "chance_of", "compare_widths", "decide_life", "decide_width", "findings"]

LEVEL = 0.05
"""Chance of as many confirmed skip trigrams among unrelated ones, below which they count as found."""


def findings(metrics: Record, config: Any) -> list[Finding | None]:
    """Signs of life; many heads against as many as the base layer has."""
    return [_life(metrics), _width(metrics)]


# ---- signs of life ----


def _life(metrics: Record) -> Finding | None:
    rows = (metrics.get("replacements") or {}).get("heads") or []
    if not rows:
        return None
    verdict, reason = decide_life(rows)
    row = rows[0]
    trigrams, induction = row["skip_trigrams"], row["induction"]
    examples = "; ".join(
        f"[{t['query']!r} after {t['key']!r} -> {t['token']!r}] {t['fall']:.3f}"
        for t in trigrams["triples"]
        if t["confirmed"]
    )
    removal = induction["removal"]
    loss = (
        ""
        if removal is None
        else f" Without them the loss on the repetition rises by {removal['without_found'] - removal['clean']:.3f} nats, "
        f"without as many others by {removal['without_others'] - removal['clean']:.3f}."
    )
    return Finding(
        key="replacement-life",
        title="Attention replacement layers: signs of life",
        claim="Wide replacement layers of simple heads show skip-trigram heads and induction heads.",
        figure=f"{row['run']}: {trigrams['n_confirmed']} of {trigrams['n_heads']} skip trigrams confirmed by removing "
        f"what the head moves from the key token, held-out{f' ({examples}; fall of the logit)' if examples else ''}; {induction['n_found']} induction "
        f"heads of {induction['n_live']:,} live, best score {induction['best_score']:.2f} (base layer "
        f"{max(induction['base_scores']):.2f}; {induction['n_tokens']:,} random tokens).{loss}",
        control=f"Removing another listed head, the logit of another triple's token, the same head at other pairs' "
        f"places: {trigrams['chance']:.0%} are confirmed by chance. Tokens of the repetition in another order: {induction['n_found_by_control']} heads pass.",
        verdict=verdict,
        rule=f"Supports when at {SEEDS_TO_DECIDE} seeds or more each layer has more confirmed skip trigrams than chance "
        f"gives ({LEVEL:.0%}, binomial) and {COHERENT_LIFT:g} times as many induction heads as its control, one at least; "
        "contradicts when none has either.",
        reason=reason,
        picture=None,
        commands=commands(metrics, "replacements", "report"),
    )


def decide_life(rows: Sequence[Record]) -> Decision:
    """``rows``: seed, skip_trigrams and induction of every replacement layer looked into."""
    if (few := too_few(len({row["seed"] for row in rows}))) is not None:
        return few
    trigrams = [chance_of(row["skip_trigrams"]) < LEVEL for row in rows]
    induction = [row["induction"]["n_found"] >= max(1, COHERENT_LIFT * row["induction"]["n_found_by_control"])
                 for row in rows]  # fmt: skip
    if all(trigrams) and all(induction):
        return Decision("supports", "both kinds in every layer")
    if not any(trigrams) and not any(induction):
        return Decision("contradicts", "neither kind in any layer")
    return Decision("inconclusive", f"skip trigrams in {sum(trigrams)}, induction heads in {sum(induction)} of "
                    f"{len(rows)} layers")  # fmt: skip


def chance_of(trigrams: Record) -> float:
    """Chance of as many confirmed triples or more, if each were confirmed with the chance of unrelated ones."""
    n, p = trigrams["n_heads"], trigrams["chance"]
    return sum(comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(trigrams["n_confirmed"], n + 1))


# ---- many heads against few ----


def _width(metrics: Record) -> Finding | None:
    rows = [row for row in metrics.get("attention") or [] if row["architecture"] == "replacement"]
    narrow = [row for row in rows if row["series"].endswith("-narrow")]
    wide = [row for row in rows if row["series"].endswith("-wide")]
    if not narrow or not wide:
        return None
    comparison = compare_widths(wide, narrow)
    verdict, reason = decide_width(comparison)
    first, other = wide[0], narrow[0]
    interval = comparison["interval"]
    spread = "no interval" if interval is None else f"95% {interval[0]:.3f} to {interval[1]:.3f}"
    return Finding(
        key="replacement-width",
        title="Attention replacement layers: many heads against few",
        claim="A replacement layer of many narrower heads gets closer to the base layer than one of as many heads as the "
        "base layer has, from random starts.",
        figure=f"{first['features']:,} heads over {other['features']}: normalised MSE ratio {comparison['ratio']:.3f} "
        f"({spread}); {first['run']} {first['normalised_mse']:.4f}, {first['evaluation']['heads_alive']:,} alive, "
        f"{first['l0']:.0f} active per position.",
        control=f"{other['run']}: {other['normalised_mse']:.4f}, equal steps, batches and schedule; "
        f"{first['parameters']:,} parameters against {other['parameters']:,}.",
        verdict=verdict,
        rule=f"Supports when the ratio's interval over held-out contexts and {SEEDS_TO_DECIDE} seeds or more lies below 1 "
        "at equal steps, contradicts when above.",
        reason=reason,
        picture="replacement_errors.png",
        commands=commands(metrics, "attention", "report"),
    )


def compare_widths(wide: Sequence[Record], narrow: Sequence[Record]) -> Record:
    """Ratio of errors, seed by seed, with a bootstrap over held-out contexts and seeds."""
    by_seed = [{row["seed"]: row["evaluation"] for row in rows} for rows in (wide, narrow)]
    seeds = sorted(by_seed[0].keys() & by_seed[1].keys())
    tokens = {row["tokens_trained"] for row in (*wide, *narrow)}
    if not seeds:
        return {"ratio": float("nan"), "interval": None, "n_seeds": 0, "equal_tokens": len(tokens) == 1}
    errors = [{seed: np.asarray(own[seed]["context_squared_error"]) for seed in seeds} for own in by_seed]

    def ratios(seed: int, contexts: np.ndarray) -> list[float]:
        return [float(errors[0][seed][contexts].sum() / errors[1][seed][contexts].sum())]

    n_contexts = len(errors[0][seeds[0]])
    everything = [ratios(seed, np.arange(n_contexts))[0] for seed in seeds]
    return {
        "ratio": float(np.exp(np.mean(np.log(everything)))),
        "interval": bootstrap_intervals(ratios, seeds, n_contexts)[0],
        "n_seeds": len(seeds),
        "equal_tokens": len(tokens) == 1,
    }


def decide_width(comparison: Record) -> Decision:
    """``comparison``: what ``compare_widths`` returns."""
    if (few := too_few(comparison["n_seeds"])) is not None:
        return few
    if not comparison["equal_tokens"]:
        return Decision("inconclusive", "the layers were trained on different numbers of tokens")
    return of_interval(comparison["interval"])

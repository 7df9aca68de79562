"""Clusters in head-loading space: what they mean, how large they are, whether OV dimensions come in families."""

from collections.abc import Sequence
from typing import Any

from crosshead.analysis.robustness import SETTINGS, meaning_at_settings, unsettled_where
from crosshead.analysis.rules import COHERENT_LIFT, SEEDS_TO_DECIDE, Decision, Finding, Record, commands, too_few

__all__ = ["decide_dimensions", "decide_power_law", "decide_semantic", "findings"]

_ALPHA = 0.1  # Clauset, Shalizi and Newman's bar for ruling a power law out
_BOOTSTRAPS_TO_DECIDE = 1000
_SIZES_TO_DECIDE = 3  # values of k
_CHANCE = 0.2
"""Fits of a true power law that may be ruled out: a tenth by their p-values, some more by one rival of several."""
_NULLS = ("shuffled", "gaussian", "sphere")
_POWER = 0.8


def findings(metrics: Record, config: Any) -> list[Finding | None]:
    """Semantic clusters, OV dimensions, power laws of every clustered series."""
    by_series = _clustered_by_series(metrics)
    return [
        _semantic(metrics, config),
        _dimensions(metrics, config),
        *(_power_law(metrics, series, sources) for series, sources in by_series.items()),
    ]


def _clustered_by_series(metrics: Record) -> dict[str, list[str]]:
    """Clustered runs by the series they belong to, in the order of the parameters."""
    series = {row["run"]: row["series"] for row in metrics["frontier"]}
    found: dict[str, list[str]] = {}
    for source in metrics["cluster_features"]:
        found.setdefault(series.get(source, source), []).append(source)
    return found


# ---- meaning ----


def _semantic(metrics: Record, config: Any) -> Finding | None:
    if metrics["meaning"] is None:
        return None
    rows = {row["run"]: row for row in metrics["frontier"]}
    summary = {run: found for run, found in metrics["meaning"]["enrichment_summary"].items()
               if run in rows and rows[run]["series"] == config.mtc}  # fmt: skip
    if not summary:
        return None
    labels: dict[str, int] = {}
    for e in metrics["meaning"]["enrichment"]:
        if e["run"] in summary and e["q_value"] <= 0.05:
            labels[e["label"]] = labels.get(e["label"], 0) + 1
    listed = ", ".join(
        f"{label.replace('_', ' ')} {n}" for label, n in sorted(labels.items(), key=lambda item: -item[1])
    )
    first = next(iter(summary))
    settings = [own["enrichment_summary"] for (own,) in meaning_at_settings(metrics, config.mtc)]
    verdict, reason = decide_semantic([(rows[run]["seed"], found) for run, found in summary.items()], settings)
    return Finding(
        key="clusters-semantic",
        title="Clusters and meaning",
        claim="Clusters in head-loading space are semantically meaningful: induction, delimiters, code.",
        figure=f"{sum(s['discoveries'] for s in summary.values())} enriched pairs of cluster and label at a false discovery "
        f"rate of 5% in {len(summary)} MTC{'s' if len(summary) > 1 else ''} ({listed or 'none'}), "
        f"{sum(s['content_discoveries'] for s in summary.values())} of them in labels of content (delimiter, code, "
        f"succession); {metrics['meaning']['runs'][first]['n_live']:,} live features in {first}.{_semantic_settings(settings)}",
        control="Labels shuffled among features, all and of content: " + ", ".join(
            f"{s['expected_under_shuffle']:.1f} and {s['content_expected_under_shuffle']:.1f} expected for {run}"
            for run, s in summary.items()) + ".",
        verdict=verdict,
        rule="Labels of position (induction among them) follow from the loadings that are clustered, so labels of content "
        f"decide. Supports when every MTC of {SEEDS_TO_DECIDE} seeds or more has at least {COHERENT_LIFT:g} times the pairs "
        f"that shuffled labels give (counting at least one), and at all of {SETTINGS} settings of start, learning rate and "
        "length; contradicts when none has, at any seed or setting.",
        reason=reason,
        picture=None,
        commands=commands(metrics, "meaning", "report"),
    )  # fmt: skip


def decide_semantic(summaries: Sequence[tuple[int, Record]], settings: Sequence[Record | None]) -> Decision:
    """``summaries``: seed and ``{content_discoveries, content_expected_under_shuffle}`` of every MTC.

    ``settings`` are those of MTCs at other settings of training, None where there were too few features to cluster.
    """
    if (few := too_few(len({seed for seed, _ in summaries}))) is not None:
        return few
    enough = [_enough(s) for _, s in summaries]
    if any(enough) and not all(enough):
        return Decision("inconclusive", f"enough at {sum(enough)} of {len(enough)}")
    held = [s is not None and _enough(s) == all(enough) for s in settings]
    if (why := unsettled_where(held, SETTINGS)) is not None:
        return why
    if all(enough):
        return Decision("supports", "many more enriched clusters than shuffled labels give, at every seed and setting")
    return Decision("contradicts", f"enough at none of {len(enough)} seeds and at no setting")


def _enough(summary: Record) -> bool:
    return summary["content_discoveries"] >= COHERENT_LIFT * max(1.0, summary["content_expected_under_shuffle"])


def _semantic_settings(settings: Sequence[Record | None]) -> str:
    pairs = [s["content_discoveries"] for s in settings if s is not None]
    if not pairs:
        return ""
    return (f" Over {len(pairs)} settings of start, learning rate and length at one sparsity and seed: {min(pairs)} to "
            f"{max(pairs)} pairs of content.")  # fmt: skip


# ---- OV dimensions ----


def _dimensions(metrics: Record, config: Any) -> Finding | None:
    if metrics["meaning"] is None:
        return None
    rows = {row["run"]: row for row in metrics["frontier"]}
    modality = {run: found["ov_dimension"] for run, found in metrics["meaning"]["modality"].items()
                if run in rows and rows[run]["series"] == config.mtc and found["ov_dimension"] is not None}  # fmt: skip
    if not modality:
        return None
    shown = next(iter(modality))
    own = [d for d in metrics["meaning"]["ov_dimensions"] if d["run"] == shown]
    outside = sum(not d["random_low"] <= d["effective_rank"] <= d["random_high"] for d in own)
    correlations = [metrics["meaning"]["size_correlations"].get(run) or {} for run in modality]
    sizes = ""
    for name in dict.fromkeys(name for found in correlations for name in found):
        each = [found[name] for found in correlations if found.get(name) is not None]
        listed = ", ".join(f"{one['rho']:.2f} (p {one['p_value']:.2f})" for one in each)
        sizes += f" Cluster size against share of {name.replace('_', '-')}s: rho {listed}." if each else ""
    of_loadings = [metrics["meaning"]["modality"][run].get("loadings") for run in modality]
    loadings = [test["p_value"] for test in of_loadings if test is not None]
    sizes += (f" The loadings themselves, by their first principal coordinate: p {min(loadings):.2f} to {max(loadings):.2f} "
              "(groups of features on the same heads, whatever their dimension; no rule).") if loadings else ""  # fmt: skip
    settings = [(own["modality"] or {}).get("ov_dimension")
                for (own,) in meaning_at_settings(metrics, config.mtc)]  # fmt: skip
    verdict, reason = decide_dimensions([(rows[run]["seed"], test) for run, test in modality.items()], settings)
    return Finding(
        key="ov-dimension",
        title="OV dimension",
        claim="Attention features have no preferred OV dimensions: clusters form a continuum rather than discrete families.",
        figure=f"OV dimensions of {len(own)} clusters of {shown}, over those of random sets as large: test for one mode "
        f"(dip) p {modality[shown]['p_value']:.2f}, power {modality[shown]['power']:.0%} for two modes a factor of 4 apart "
        f"({modality[shown]['n']} clusters of four features or more).{sizes}{_dimension_settings(settings)}",
        control=f"Size-matched random sets of features: {outside} of {len(own)} clusters lie outside their 95% range; "
        f"chance gives {0.05 * len(own):.1f}.",
        verdict=verdict,
        rule=f"Contradicts when one mode is rejected at 5% (Bonferroni over dictionaries) at {SEEDS_TO_DECIDE} seeds or "
        f"more; supports when it is rejected at none of as many and each test has a power of {_POWER:.0%}. Either must hold "
        f"at all of {SETTINGS} settings of start, learning rate and length as well (5% over all of them, no power asked).",
        reason=reason,
        picture="ov_dimensions.png",
        commands=commands(metrics, "meaning", "report"),
    )


def decide_dimensions(tests: Sequence[tuple[int, Record]], settings: Sequence[Record | None]) -> Decision:
    """``tests``: seed and ``{p_value, power}`` of every MTC's test for one mode.

    ``settings`` are those of MTCs at other settings of training (no power is asked for there), None without a test.
    """
    found = _one_mode(tests)
    if found.verdict == "inconclusive":
        return found
    bar = 0.05 / max(1, len(settings))
    held = [test is not None and (test["p_value"] < bar) == (found.verdict == "contradicts") for test in settings]
    return unsettled_where(held, SETTINGS) or found


def _dimension_settings(settings: Sequence[Record | None]) -> str:
    found = [test["p_value"] for test in settings if test is not None]
    if not found:
        return ""
    return (f" Over {len(found)} settings of start, learning rate and length at one sparsity and seed: p {min(found):.4f} to "
            f"{max(found):.4f}, the bar {0.05 / len(settings):.4f}.")  # fmt: skip


def _one_mode(tests: Sequence[tuple[int, Record]]) -> Decision:
    if (few := too_few(len({seed for seed, _ in tests}))) is not None:
        return few
    rejected = [test["p_value"] < 0.05 / len(tests) for _, test in tests]
    if all(rejected):
        return Decision("contradicts", "one mode is rejected at every seed and setting")
    if any(rejected):
        return Decision("inconclusive", f"one mode is rejected in {sum(rejected)} of {len(tests)}")
    weakest = min(test["power"] for _, test in tests)
    if weakest < _POWER:
        return Decision("inconclusive", f"the test would see two modes in {weakest:.0%} of samples only")
    return Decision("supports", "one mode is rejected at no seed or setting, with power to see two")


# ---- power laws ----


def _power_law(metrics: Record, series: str, sources: Sequence[str]) -> Finding:
    every = [c for c in metrics["clusters"] if c["source"] in sources]
    null_fits = [c for c in metrics["clusters"] if c["source"].split("/")[0] in sources and "/" in c["source"]]
    n = ", ".join(f"{metrics['cluster_features'][source]:,}" for source in sources)
    verdict, reason = decide_power_law(metrics, sources, every, null_fits)
    return Finding(
        key=f"power-law-{series}",
        title=f"Power law of {series}",
        claim=f"Sizes of clusters in head-loading space follow a power law (loadings of {series}).",
        figure=f"{', '.join(sources)}: {n} live features, {_fit_text(every)}.",
        control=f"{_null_text(null_fits)}.",
        verdict=verdict,
        rule=f"Of the fits of {SEEDS_TO_DECIDE} trained dictionaries or more at {_SIZES_TO_DECIDE} values of k or more each "
        f"({_BOOTSTRAPS_TO_DECIDE:,} bootstraps), a share is ruled out at p <= {_ALPHA} or beaten by a rival; sizes that "
        f"allow no fit count as ruled out. Supports when it is at most {_CHANCE:.0%}, which a true power law gives by "
        "chance, while most fits of every kind of null are (sizes without a fit left out, one fit at least); contradicts "
        "when most are; where data and nulls pass alike nothing is learned.",
        reason=reason,
        picture=f"clusters_{sources[0]}.png",
        commands=commands(metrics, "cluster", "report"),
    )


def _fit_text(every: Sequence[Record]) -> str:
    fits = [c for c in every if c["alpha"] is not None]
    if not fits:
        return "no clustering had enough sizes for a fit"
    without = f", {len(every) - len(fits)} of them without a fit" if len(fits) < len(every) else ""
    largest = max(c["k"] for c in fits)
    rows = [c for c in fits if c["k"] == largest]
    return (f"k={largest}: alpha {_spread(rows, 'alpha')}, p {_spread(rows, 'p_value')} over {len(rows)} clusterings; "
            f"{sum(rejected(c) for c in every)} of {len(every)} fits (k >= {min(c['k'] for c in every)}) ruled out or beaten "
            f"by a rival{without}")  # fmt: skip


def _null_text(nulls: Sequence[Record]) -> str:
    listed = [f"{kind} {sum(rejected(c) for c in own)} of {len(own)} ruled out, alpha {_spread(own, 'alpha')}"
              for kind, own in _fits_by_kind(nulls).items() if own]  # fmt: skip
    return "Nulls: " + "; ".join(listed) if listed else "No null had a fit"


def _fits_by_kind(nulls: Sequence[Record]) -> dict[str, list[Record]]:
    """Every kind of null that was run, with those of its clusterings that had a fit."""
    kinds: dict[str, list[Record]] = {}
    for clustering in nulls:
        own = kinds.setdefault(clustering["source"].split("/")[1], [])
        own += [clustering] if clustering["alpha"] is not None else []
    return kinds


def decide_power_law(
    metrics: Record, sources: Sequence[str], fits: Sequence[Record], nulls: Sequence[Record]
) -> Decision:
    """See the rule in ``_power_law``."""
    seeds = {row["seed"] for row in metrics["frontier"] if row["run"] in sources}
    if (few := too_few(len(seeds))) is not None:
        return few
    fewest = min(len({c["k"] for c in fits if c["source"] == source and c["alpha"] is not None}) for source in sources)
    if fewest < _SIZES_TO_DECIDE:
        return Decision("inconclusive", f"fits at {fewest} values of k")
    if metrics["cluster_bootstraps"] < _BOOTSTRAPS_TO_DECIDE:
        return Decision("inconclusive", f"{metrics['cluster_bootstraps']:,} bootstraps")
    share = sum(rejected(c) for c in fits) / len(fits)
    if share > 0.5:
        return Decision("contradicts", f"{share:.0%} of the fits are ruled out or beaten")
    by_kind = {kind: [rejected(c) for c in own] for kind, own in _fits_by_kind(nulls).items()}
    if any(not by_kind.get(kind) for kind in _NULLS):
        return Decision("inconclusive", "a kind of null was not run, or none of its sizes had a fit")
    if share <= _CHANCE and all(sum(found) / len(found) > 0.5 for found in by_kind.values()):
        return Decision("supports", f"{share:.0%} of the fits are ruled out, and most of every null's are")
    alike = [kind for kind, found in by_kind.items() if sum(found) / len(found) <= max(share, 0.5)]
    if alike:
        return Decision("inconclusive", f"{share:.0%} of the fits are ruled out or beaten, and of the {' and the '.join(alike)} "
                        "nulls' no more or at most half: k-means makes such sizes by itself")  # fmt: skip
    return Decision("inconclusive", f"{share:.0%} of the fits are ruled out or beaten")


def rejected(fit: Record) -> bool:
    """Whether a fit is ruled out by its p-value, beaten by a rival at 5%, or not to be had at all."""
    if fit["alpha"] is None:
        return True
    beaten = any(r["ratio"] < 0 and r["p_value"] < 0.05 for r in fit["likelihood_ratios"].values())
    return fit["p_value"] <= _ALPHA or beaten


def _spread(rows: Sequence[Record], key: str) -> str:
    values = [row[key] for row in rows]
    return f"{min(values):.2f} to {max(values):.2f}"

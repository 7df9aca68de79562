"""From records to findings: every number of the report, and what it says of the source's claims.

``collect`` gathers what the stages measured into one document, the content of ``reports/metrics.json``
(docs/metrics.md has the schema). ``judge`` reads it and states, claim by claim, our figure, its sample size, its
control and a verdict.

A verdict is ``inconclusive`` unless its rule, written beside the claim, is met. One seed never decides.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from crosshead.analysis.frontiers import Comparison, compare_objectives, compare_series, compare_with_sum, points_of
from crosshead.maths.frontier import Point, log_interpolate

__all__ = ["SCHEMA", "Finding", "ReportConfig", "collect", "judge"]

SCHEMA = 1
Record = dict[str, Any]
Verdict = Literal["supports", "contradicts", "inconclusive"]

_SEEDS_TO_DECIDE = 3
_SPARSITIES_TO_DECIDE = 4
_LEVELS = (30, 60, 100, 160, 190)
_NO_GAP = 0.02  # a control within 2% of 1 shows no gap
_FLAT = (
    "run", "series", "architecture", "layers", "target", "features", "heads_per_feature", "sparsity", "sparsity_value",
    "seed", "control", "l0", "normalised_mse", "ce_recovered", "ce_recovered_zero", "dead_fraction", "n_tokens",
    "parameters", "steps", "tokens_trained",
)  # fmt: skip


class ReportConfig(BaseModel):
    """Parameters of the report stage: which series are compared."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    mtc: str = "mtc"
    """Series of the multitoken transcoder's frontier."""
    top1: str = "top1"
    """Series of its single-head baseline."""
    mtc_penalties: tuple[str, ...] = ("mtc-penalty-l1", "mtc-penalty-l2")
    """Series of the multitoken transcoder under the other norms of head loadings: a verdict must hold under all."""
    mtc_l1: str = "mtc-l1"
    """Series of the multitoken transcoder in the source's L1 form."""
    attention_output: str = "attn-out-sae"
    """Series of the attention output SAE."""
    one_layer: tuple[str, str] = ("value-first", "value-second")
    """Series of the two one-layer value SAEs."""
    two_layer: tuple[str, ...] = ("value-both", "value-both-equal")
    """Series of the two-layer value SAE, one per convention for the number of features."""
    two_layer_control: str = "value-both-control"
    """Series of the two-layer value SAE whose second layer's rows come from other contexts."""


class Finding(BaseModel):
    """One claim of the source and what we measured about it."""

    key: str
    claim: str
    """What the source says, in our words."""
    figure: str
    """Our number, with its sample size."""
    control: str
    """What the number is held against."""
    verdict: Verdict
    reason: str
    """The rule, and why it gives this verdict."""
    picture: str | None
    """File under figures/."""
    commands: str
    """What regenerates it."""


def collect(
    records: Sequence[Record],
    *,
    profile: str,
    config: ReportConfig,
    provenance: Record,
    corpus: Record,
    layers: Record,
    layers_chosen_by: str,
    survey: Sequence[Record],
    references: Record,
    clusters: Record,
    audit: Record,
    inputs: Mapping[str, Record],
) -> Record:
    """The content of metrics.json. ``inputs`` are finished metrics of other profiles, by label."""
    series = _by_series(records)
    return {
        "schema": SCHEMA,
        "profile": profile,
        "model": {k: provenance.get(k) for k in ("id", "source", "revision", "sha256", "quantisation", "note")},
        "corpus": {k: corpus.get(k) for k in ("context_length", "n_contexts", "fingerprint", "sources")},
        "layers": layers,
        "layers_chosen_by": layers_chosen_by,
        "survey": list(survey),
        "frontier": [{k: record[k] for k in _FLAT} | _details(record) for record in records],
        "comparisons": _comparisons(series, config),
        "matched_l0": _matched(series, references, config),
        "references": references,
        "clusters": clusters["clusters"],
        "cluster_agreement": clusters["agreement"],
        "cluster_features": clusters["n_features"],
        "audit": audit,
        "inputs": {label: _labelled(label, other) for label, other in inputs.items()},
    }


def _labelled(label: str, other: Any) -> Record:
    """What the report shows of another profile's metrics.json. ValueError when the file is none."""
    keys = ("profile", "frontier", "comparisons")
    if not isinstance(other, dict) or other.get("schema") != SCHEMA or any(key not in other for key in keys):
        raise ValueError(f"the input {label!r} is no metrics.json of schema {SCHEMA}; run that profile with this version, or "
                         "take the file out of the inputs directory")  # fmt: skip
    return {key: other[key] for key in keys}


def _by_series(records: Sequence[Record]) -> dict[str, list[Record]]:
    series: dict[str, list[Record]] = {}
    for record in records:
        series.setdefault(record["series"], []).append(record)
    return series


def _details(record: Record) -> Record:
    evaluation, splicing = record["evaluation"], record["splicing"]
    names = ("normalised_mse_refit", "shrinkage", "l1", "density_histogram", "density_edges", "l0_query", "l0_triples",
             "superposition", "pruned", "n_tokens_detail")  # fmt: skip
    return {name: evaluation[name] for name in names} | {
        "kl": splicing["kl"],
        "delta_ce": splicing["delta_ce"],
        "n_tokens_spliced": splicing["n_tokens"],
    }


def _matched(series: Mapping[str, list[Record]], references: Record, config: ReportConfig) -> list[Record]:
    """Normalised MSE on the attention output at round values of L0, log-linear between measured points (lowest seed)."""
    curves = {name: points_of([r for r in series[of] if r["seed"] == min(q["seed"] for q in series[of])])
              for name, of in (("mtc", config.mtc), ("top1", config.top1), ("mtc_l1", config.mtc_l1),
                               ("attention_output_sae", config.attention_output)) if of in series}  # fmt: skip
    curves["linear_top1"] = [Point(r["l0"], r["normalised_mse"]) for r in references["linear_top1"]]
    return [{"l0": l0} | {name: log_interpolate(points, l0) for name, points in curves.items()} for l0 in _LEVELS]


def _comparisons(series: Mapping[str, list[Record]], config: ReportConfig) -> Record:
    found: Record = {}
    for name in (config.mtc, *config.mtc_penalties):
        if {name, config.top1} <= series.keys():
            key = "mtc_over_top1" if name == config.mtc else f"{name}_over_top1"
            comparison = compare_series(series[name], series[config.top1])
            found[key] = _seeded(comparison, series[name], series[config.top1])
    one, other = config.one_layer
    for name in (*config.two_layer, config.two_layer_control):
        if {name, one, other} <= series.keys():
            comparison = compare_with_sum(series[name], series[one], series[other])
            objectives = compare_objectives(series[name], series[one], series[other])
            found[f"{name}_over_sum"] = _seeded(comparison, series[name], series[one], series[other]) | {
                "objective": objectives
            }
    return found


def _seeded(comparison: Comparison, *sweeps: Sequence[Record]) -> Record:
    """With what the verdicts ask for: seeds that all sweeps have, and whether all were trained on as many tokens."""
    tokens = {record["tokens_trained"] for sweep in sweeps for record in sweep}
    return comparison.model_dump(mode="json") | {
        "n_seeds": len(comparison.seed_ratios),
        "equal_tokens": len(tokens) == 1,
        "features": [sorted({record["features"] for record in sweep}) for sweep in sweeps],
    }


def judge(metrics: Record, config: ReportConfig) -> list[Finding]:
    """Findings in the order of the report. Claims whose runs are missing are left out."""
    found = [
        _superposition_finding(metrics, config),
        _heads_finding(metrics, config),
        _identity_finding(metrics),
        _cross_layer_finding(metrics, config),
        _attention_output_finding(metrics, config),
        *_power_law_findings(metrics),
    ]
    return [finding for finding in found if finding is not None]


def _ratio_text(comparison: Record) -> str:
    if comparison["ratio"] is None:
        return "the two sweeps do not overlap in L0"
    interval = "no interval"
    if comparison["interval"] is not None:
        drawn = "contexts and seeds" if comparison["n_seeds"] > 1 else "contexts"
        low, high = comparison["interval"]
        interval = f"95% over {drawn} {low:.3f} to {high:.3f}"
    where = "" if comparison["l0_range"] is None else " at L0 {:.0f} to {:.0f}".format(*comparison["l0_range"])
    return (
        f"normalised MSE ratio {comparison['ratio']:.3f} ({interval}){where}; {comparison['n_tokens']:,} held-out tokens in {comparison['n_contexts']} contexts, "
        f"{comparison['n_seeds']} seed{'s' if comparison['n_seeds'] > 1 else ''}"
    )


def _objective_text(comparison: Record) -> str:
    """Mean over seeds, one figure per coefficient."""
    ratios: dict[float, list[float]] = {}
    for row in comparison["objective"]:
        ratios.setdefault(row["coefficient"], []).append(row["ratio"])
    if not ratios:
        return ""
    largest_first = sorted(ratios.items(), reverse=True)
    listed = ", ".join(f"{sum(found) / len(found):.3f} ({coefficient:g})" for coefficient, found in largest_first)
    return f"; objective ratio (coefficient) {listed}"


def _decide(comparison: Record) -> tuple[Verdict, str]:
    """Below 1 with its whole interval and enough seeds supports; above 1 likewise contradicts."""
    if comparison["ratio"] is None or comparison["interval"] is None:
        return "inconclusive", "no common range of L0"
    n_seeds, n_points = comparison["n_seeds"], comparison["n_sparsities"]
    if n_seeds < _SEEDS_TO_DECIDE:
        return "inconclusive", f"{n_seeds} seed{'s' if n_seeds > 1 else ''}; the rule asks for {_SEEDS_TO_DECIDE}"
    if n_points < _SPARSITIES_TO_DECIDE:
        return "inconclusive", f"{n_points} sparsities in a sweep; the rule asks for {_SPARSITIES_TO_DECIDE}"
    if not comparison["equal_tokens"]:
        return "inconclusive", "the sweeps were trained on different numbers of tokens"
    low, high = comparison["interval"]
    if high < 1:
        return "supports", "the whole interval lies below 1"
    if low > 1:
        return "contradicts", "the whole interval lies above 1"
    return "inconclusive", "the interval holds 1"


def _budget(comparison: Record) -> str:
    features = [", ".join(f"{n:,}" for n in found) for found in comparison["features"]]
    equal = f"{features[0]} features each" if len(set(features)) == 1 else f"{' against '.join(features)} features"
    return f"{equal}, {'equal' if comparison['equal_tokens'] else 'UNEQUAL'} tokens"


def _decide_superposition(comparison: Record, penalties: Mapping[str, Record | None]) -> tuple[Verdict, str]:
    """As ``_decide``, but a smaller error must hold under every norm of loadings, and a larger one decides nothing."""
    verdict, reason = _decide(comparison)
    if verdict == "inconclusive":
        return verdict, reason
    if len({tuple(features) for features in comparison["features"]}) > 1:
        return "inconclusive", "the sweeps have different numbers of features"
    if verdict == "contradicts":
        return "inconclusive", "an MTC can be any Top-1 MTC, so one that loses was trained badly: find out why first"
    for name, other in penalties.items():
        if other is None:
            return "inconclusive", f"{name} was not compared; the rule asks for every norm of head loadings"
        if (found := _decide(other))[0] != "supports":
            return "inconclusive", f"{name}: {found[1]}"
    return "supports", f"{reason}, under every norm of head loadings"


def _superposition_finding(metrics: Record, config: ReportConfig) -> Finding | None:
    comparison = metrics["comparisons"].get("mtc_over_top1")
    if comparison is None:
        return None
    penalties = {name: metrics["comparisons"].get(f"{name}_over_top1") for name in config.mtc_penalties}
    verdict, reason = _decide_superposition(comparison, penalties)
    return Finding(
        key="superposition",
        claim="Binding every MTC feature to a single attention head (Top-1) makes the reconstruction worse, which "
        "speaks for attention features spread over heads.",
        figure=f"MTC over Top-1: {_ratio_text(comparison)}.",
        control=f"Top-1 from the same start with the same learning rates, {_budget(comparison)}; the linear Top-1 reference "
        "is drawn.",
        verdict=verdict,
        reason=f"Supports when the interval of the ratio lies below 1 with {_SEEDS_TO_DECIDE} seeds or more, at equal tokens and "
        f"features, under every norm of head loadings: {reason}.",
        picture="mtc_frontier.png",
        commands=_commands(metrics, "report"),
    )


def _heads_finding(metrics: Record, config: ReportConfig) -> Finding | None:
    rows = [r for r in metrics["frontier"] if r["superposition"] is not None and r["target"] == "attn_out"]
    top1 = [r for r in rows if r["series"] == config.top1]
    mtc = [r for r in rows if r["series"] == config.mtc]
    if not top1 or not mtc:
        return None
    at = min(mtc, key=lambda r: (r["seed"], abs(r["l0"] - 60)))
    same = min(top1, key=lambda r: (r["seed"] != at["seed"], abs(r["l0"] - at["l0"])))
    few = [r for r in rows if r["heads_per_feature"] not in ("all", 1) and r["seed"] == same["seed"]
           and abs(r["l0"] - at["l0"]) < 0.25 * at["l0"]]  # fmt: skip
    dose = "; ".join(f"{r['heads_per_feature']}: {r['normalised_mse']:.4f} at L0 {r['l0']:.0f}"
                     for r in sorted([*few, same], key=lambda r: r["heads_per_feature"]))  # fmt: skip
    s = at["superposition"]
    return Finding(
        key="heads-per-feature",
        claim="Features of an MTC use more than one head.",
        figure=f"Contributions of {at['run']} spread over {s['participation_ratio_mean']:.2f} heads per feature (median "
        f"{s['participation_ratio_median']:.2f}; {s['n_features']:,} live features, {at['n_tokens_detail']:,} held-out "
        f"tokens). Normalised MSE by movers a feature may have, trained so - all: {at['normalised_mse']:.4f} at L0 "
        f"{at['l0']:.0f}; {dose} ({at['n_tokens']:,} held-out tokens). {_pruned_text(at)}",
        control=f"Top-1 by construction: {same['superposition']['participation_ratio_mean']:.2f}.",
        verdict="inconclusive",
        reason="The number of heads depends on the penalty on loadings; the rule asks for gram, l1 and l2 to agree, and "
        "for a planted one-head null.",
        picture="mtc_frontier.png",
        commands=_commands(metrics, "report"),
    )


def _pruned_text(row: Record) -> str:
    if not row["pruned"]:
        return ""
    kept = "; ".join(f"{p['movers']}: {p['normalised_mse']:.4f}" for p in row["pruned"])
    return (f"{row['run']} itself, every feature cut to its strongest movers and one gain each refitted - {kept} "
            f"({row['pruned'][0]['n_tokens']:,} held-out tokens).")  # fmt: skip


def _identity_finding(metrics: Record) -> Finding | None:
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
        claim="With the residual stream as target, an identity head lets the MTC fuse attention with MLP-like work.",
        figure=f"{row['superposition']['identity_share']:.1%} of the written energy went through the identity "
        f"({row['n_tokens_detail']:,} held-out tokens); normalised MSE {row['normalised_mse']:.4f} at L0 {row['l0']:.0f} "
        f"({row['n_tokens']:,} held-out tokens).",
        control=f"Identity share for the {control}.",
        verdict="inconclusive",
        reason="A share says that the identity is used, not that the fused operation is simpler; no rule yet.",
        picture=None,
        commands=_commands(metrics, f"train@{row['run']}", "report"),
    )


def _cross_layer_finding(metrics: Record, config: ReportConfig) -> Finding | None:
    comparisons = [metrics["comparisons"].get(f"{name}_over_sum") for name in config.two_layer]
    control = metrics["comparisons"].get(f"{config.two_layer_control}_over_sum")
    if comparisons[0] is None:
        return None
    labels = ("equal total features", "equal features each")
    figures = [f"{label}: {_ratio_text(c)}{_objective_text(c)}"
               for label, c in zip(labels, comparisons, strict=False) if c is not None]  # fmt: skip
    verdict, reason = _decide(comparisons[0])
    if verdict == "supports":
        verdict, reason = (
            "inconclusive",
            "the gap may be shared input: controls (ii) and (iii) are not among these runs",
        )
    if control is None or control["interval"] is None:
        verdict, reason = "inconclusive", "the control was not compared"
    elif control["interval"][1] < 1 - _NO_GAP or control["interval"][0] > 1 + _NO_GAP:
        verdict, reason = (
            "inconclusive",
            "the control, where no gap may remain, shows one of its own: L0 falls whenever features are shared, so "
            "read the objective beside it, which adds up over layers that share nothing",
        )
    return Finding(
        key="cross-layer",
        claim="A value SAE over two layers reaches a better frontier than two one-layer value SAEs together, which speaks "
        "for attention features that span layers.",
        figure=f"Two-layer over the sum of one-layer SAEs, {'; '.join(figures)}.",
        control="Second layer's rows from other contexts: "
        + (f"{_ratio_text(control)}{_objective_text(control)}" if control is not None else "not run")
        + ".",
        verdict=verdict,
        reason=f"Supports only when the gap also beats rows matched by token and values recomputed from the first layer's "
        f"input: {reason}.",
        picture="value_frontier.png",
        commands=_commands(metrics, "report"),
    )


def _attention_output_finding(metrics: Record, config: ReportConfig) -> Finding | None:
    rows = [r for r in metrics["frontier"] if r["series"] == config.attention_output]
    mtc = [r for r in metrics["frontier"] if r["series"] == config.mtc]
    if not rows or not mtc:
        return None
    at = min(rows, key=lambda r: abs(r["l0"] - 60))
    near = min(mtc, key=lambda r: abs(r["l0"] - at["l0"]))
    return Finding(
        key="attention-output",
        claim="SAEs on attention outputs find interpretable features, induction and succession among them, but show less "
        "than MTC features, which also have a key side and fixed heads.",
        figure=f"{at['run']}: normalised MSE {at['normalised_mse']:.4f} at L0 {at['l0']:.0f} (query side), "
        f"{at['dead_fraction']:.0%} of features dead on {at['n_tokens']:,} held-out tokens, cross-entropy recovered "
        f"{_share(at['ce_recovered'])} ({at['n_tokens_spliced']:,} tokens).",
        control=f"{near['run']}, which predicts the same output from the layer's input: {near['normalised_mse']:.4f} at L0 "
        f"{near['l0']:.0f} (key side), {near['dead_fraction']:.0%} dead, {_share(near['ce_recovered'])} recovered.",
        verdict="inconclusive",
        reason="The claim is about what features mean, and features are not labelled in this profile; L0s of different "
        "sides are not comparable.",
        picture="attention_output_frontier.png",
        commands=_commands(metrics, "report"),
    )


def _commands(metrics: Record, *stages: str) -> str:
    profile = metrics["profile"]
    pipeline = "" if profile == "laptop" else f"flows/profiles/{profile}/dvc.yaml:"
    return " ".join(["dvc repro", *(f"{pipeline}{stage}" for stage in stages)])


def _share(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.2f}"


def _power_law_findings(metrics: Record) -> list[Finding]:
    sources = dict.fromkeys(c["source"] for c in metrics["clusters"] if "/" not in c["source"])
    return [_power_law_finding(metrics, source) for source in sources]


def _power_law_finding(metrics: Record, source: str) -> Finding:
    own = [c for c in metrics["clusters"] if c["source"] == source and c["alpha"] is not None]
    nulls = [c for c in metrics["clusters"] if c["source"].startswith(f"{source}/") and c["alpha"] is not None]
    n = metrics["cluster_features"][source]
    if not own:
        text = "no clustering had enough sizes for a fit"
    else:
        largest = max(c["k"] for c in own)
        rows = [c for c in own if c["k"] == largest]
        text = (f"k={largest}: alpha {_spread(rows, 'alpha')}, p {_spread(rows, 'p_value')} over {len(rows)} seeds; "
                f"{sum(_rejected(c) for c in own)} of {len(own)} fits (k >= {min(c['k'] for c in own)}) rejected at "
                "p <= 0.1 or beaten by a rival")  # fmt: skip
    null_text = (f"{sum(_rejected(c) for c in nulls)} of {len(nulls)} fits of shuffled and Gaussian loadings rejected; "
                 f"their alpha {_spread(nulls, 'alpha')}") if nulls else "no null had a fit"  # fmt: skip
    return Finding(
        key=f"power-law-{source}",
        claim="Sizes of clusters in head-loading space follow a power law; there are no discrete families of OV dimension "
        f"(loadings of {source}).",
        figure=f"{source}, {n:,} live features, {text}.",
        control=f"{null_text}.",
        verdict="inconclusive",
        reason="One trained dictionary never decides. The rule asks for three training seeds, three values of k with 1,000 "
        "bootstraps each, and data and nulls that differ; it says nothing of OV dimensions, which are not measured here.",
        picture=f"clusters_{source}.png",
        commands=_commands(metrics, "cluster", "report"),
    )


def _rejected(fit: Record) -> bool:
    beaten = any(r["ratio"] < 0 and r["p_value"] < 0.05 for r in fit["likelihood_ratios"].values())
    return fit["p_value"] <= 0.1 or beaten


def _spread(rows: Sequence[Record], key: str) -> str:
    values = [row[key] for row in rows]
    return f"{min(values):.2f} to {max(values):.2f}"

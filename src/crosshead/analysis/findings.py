"""From records to findings: every number of the report.

``collect`` gathers what the stages measured into one document, the content of ``reports/metrics.json``
(docs/metrics.md has the schema). ``verdicts.judge`` reads it and states, claim by claim, our figure, its sample size,
its control and a verdict.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict

from crosshead.analysis.frontiers import Comparison, compare_objectives, compare_series, compare_with_sum, points_of
from crosshead.analysis.robustness import compare_objective_settings, compare_settings
from crosshead.maths.frontier import Point, log_interpolate

__all__ = ["SCHEMA", "ReportConfig", "collect"]

SCHEMA = 2
Record = dict[str, Any]

_LEVELS = (30, 60, 100, 160, 190)
_FLAT = (
    "run", "series", "architecture", "layers", "target", "features", "heads_per_feature", "sparsity", "sparsity_value",
    "seed", "control", "control_detail", "start", "learning_rate",
    "l0", "normalised_mse", "ce_recovered", "ce_recovered_zero", "dead_fraction", "n_tokens",
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
    two_layer_matched: str = "value-both-matched"
    """Series of the two-layer value SAE whose second layer's rows come from other contexts with the same two tokens."""
    two_layer_shared: str = "value-both-shared"
    """Series of the two-layer value SAE whose second layer's values are computed from the first layer's input."""
    second_shared: str = "value-second-shared"
    """Series of the one-layer value SAE on those values."""
    two_layer_near: str = "value-near"
    """Series of the two-layer value SAE over adjacent layers; its controls end in -control, -matched and -shared."""
    one_layer_near: tuple[str, str] = ("value-first", "value-adjacent")
    """Series of its two one-layer value SAEs; the shared-input control's second one ends in -shared."""
    joint_top1: str = "joint-top1"
    """Series of the joint SAE + Top-1 MTC."""
    joint_mtc: str = "joint-mtc"
    """Series of the joint SAE + MTC."""
    best_head: str = "sae-best-head"
    """Series of the SAE whose features go through the head that moves them most."""
    robustness: Mapping[str, tuple[str, ...]] = {
        "mtc_over_top1": ("mtc-settings", "top1-settings"),
        "mtc_over_best_head": ("mtc-settings", "sae-best-head-settings"),
        "top1_over_joint_top1": ("top1-settings", "joint-top1-settings"),
        "value-both_over_sum": ("value-both-settings", "value-first-settings", "value-second-settings"),
        "value-both-control_over_sum": ("value-both-control-settings", "value-first-settings", "value-second-settings"),
    }
    """Series trained from other starts, at other learning rates and lengths, by the comparison they repeat: two for
    errors, a two-layer one and two one-layer ones for objectives."""
    second_schedule: str = "-annealed"
    """What names of runs end in that repeat a setting with another schedule: they count for MTC over Top-1 alone,
    beside the comparison without them (``mtc_over_top1_schedules``)."""
    few_heads: tuple[str, ...] = ("heads2", "heads4")
    """Series of MTCs that keep few movers per feature, fewest first."""
    variants: tuple[str, ...] = ("mtc-nonnegative", "top1-fixed")
    """Series that are held against Top-1 for the reader: other signs of loadings, heads that never change."""
    sensitivity: tuple[tuple[str, str], ...] = (
        ("mtc-resid", "top1-resid"), ("mtc-l1", "top1-l1"), ("mtc-l1-norm-l1", "top1-l1-norm-l1"),
        ("mtc-l1-norm-l2", "top1-l1-norm-l2"),
    )  # fmt: skip
    """MTC and Top-1 side by side for the reader: another target, and the three norms of loadings as L1 penalties."""


def collect(
    records: Sequence[Record],
    *,
    profile: str,
    revision: str = "unknown",
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
    nulls: Record | None = None,
    planted: Record | None = None,
    meaning: Record | None = None,
    attention: Sequence[Record] = (),
    explain: Record | None = None,
    replacements: Record | None = None,
) -> Record:
    """The content of metrics.json. ``inputs`` are finished metrics of other profiles, by label; ``revision`` is the
    commit whose code made them.

    ``nulls``, ``planted``, ``meaning``, ``explain`` and ``replacements`` are what those stages wrote, ``attention`` the
    records of attention runs; claims that need one that is missing stay open.
    """
    series = _by_series(records)
    return {
        "schema": SCHEMA,
        "profile": profile,
        "revision": revision,
        "model": {k: provenance.get(k) for k in ("id", "source", "revision", "sha256", "quantisation", "note")},
        "corpus": {k: corpus.get(k) for k in ("context_length", "n_contexts", "fingerprint", "sources")},
        "layers": layers,
        "layers_chosen_by": layers_chosen_by,
        "survey": list(survey),
        "frontier": [{k: record[k] for k in _FLAT} | _details(record) for record in records],
        "comparisons": _beside_null(_comparisons(series, config), series, nulls, config),
        "matched_l0": _matched(series, references, config),
        "references": references,
        "clusters": clusters["clusters"],
        "cluster_agreement": clusters["agreement"],
        "cluster_features": clusters["n_features"],
        "cluster_hdbscan": clusters["hdbscan"],
        "cluster_bootstraps": clusters["bootstraps"],
        "nulls": nulls,
        "planted": planted,
        "meaning": meaning,
        "attention": [_attention(record) for record in attention],
        "explain": explain,
        "replacements": replacements,
        "robustness": _robustness(series, config),
        "audit": audit,
        "inputs": {label: _labelled(label, other) for label, other in inputs.items()},
    }


def _attention(record: Record) -> Record:
    """An attention run's record without its counts per head, of which a wide layer has a thousand."""
    evaluation = {name: value for name, value in record["evaluation"].items() if name != "head_counts"}
    return record | {"evaluation": evaluation}


def _labelled(label: str, other: Any) -> Record:
    """What the report shows of another profile's metrics.json. ValueError when the file is none."""
    keys = ("profile", "frontier", "comparisons")
    if not isinstance(other, dict) or other.get("schema") != SCHEMA or any(key not in other for key in keys):
        raise ValueError(f"the input {label!r} is no metrics.json of schema {SCHEMA}; run that profile with this "
                         "version, or take the file out of the inputs directory")  # fmt: skip
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
    """Normalised MSE on the attention output at round L0, log-linear between measured points (lowest seed).

    A curve that ends within 1% of a round L0 is read at its end: BatchTopK comes to 30.009 as to 29.991.
    """
    curves = {name: points_of([r for r in series[of] if r["seed"] == min(q["seed"] for q in series[of])])
              for name, of in (("mtc", config.mtc), ("top1", config.top1), ("mtc_l1", config.mtc_l1),
                               ("attention_output_sae", config.attention_output)) if of in series}  # fmt: skip
    curves["linear_top1"] = [Point(r["l0"], r["normalised_mse"]) for r in references["linear_top1"]]
    return [{"l0": l0} | {name: _at(points, l0) for name, points in curves.items()} for l0 in _LEVELS]


def _at(points: Sequence[Point], l0: float) -> float | None:
    if not points:
        return None
    inside = min(max(l0, min(point.l0 for point in points)), max(point.l0 for point in points))
    return log_interpolate(points, inside) if abs(inside - l0) <= 0.01 * l0 else None


def _comparisons(series: Mapping[str, list[Record]], config: ReportConfig) -> Record:
    pairs = {"mtc_over_top1": (config.mtc, config.top1)}
    pairs |= {f"{name}_over_top1": (name, config.top1) for name in (*config.mtc_penalties, *config.variants)}
    pairs |= {f"{first}_over_{second}": (first, second) for first, second in config.sensitivity}
    pairs |= {
        "mtc_over_best_head": (config.mtc, config.best_head),
        "top1_over_joint_top1": (config.top1, config.joint_top1),
        "mtc_over_joint_mtc": (config.mtc, config.joint_mtc),
    }
    found: Record = {}
    for key, (first, second) in pairs.items():
        if {first, second} <= series.keys():
            sweeps = _alike(series[first], series[second])
            found[key] = _seeded(compare_series(*sweeps), *sweeps)
    for name, one, other in _two_layer_sweeps(config):
        if {name, one, other} <= series.keys():
            found[f"{name}_over_sum"] = _over_sum(*_alike(series[name], series[one], series[other]))
    for control, name, one, other in _controlled_sweeps(config):
        if {name, one, other} <= series.keys() and f"{control}_over_sum" in found:
            # A control of fewer coefficients is held against its own two layers at the same ones.
            alike = _alike(series[name], series[one], series[other], series[control])[:3]
            if len(alike[0]) < len(series[name]):
                found[f"{control}_over_sum"]["own"] = _over_sum(*alike)
    return found


def _beside_null(
    comparisons: Record, series: Mapping[str, list[Record]], nulls: Record | None, config: ReportConfig
) -> Record:
    """With ``own`` where a sweep has more sparsities than its one-head null: the comparison at the null's."""
    for name in (config.mtc, *config.mtc_penalties):
        key = "mtc_over_top1" if name == config.mtc else f"{name}_over_top1"
        planted = {float(row["k"]) for row in (nulls or {"rows": []})["rows"] if row["series"] == name}
        if key in comparisons:
            sweeps = _alike(series[name], series[config.top1])
            own = tuple([record for record in sweep if record["sparsity_value"] in planted] for sweep in sweeps)
            if len(planted) >= 2 and len(own[0]) < len(sweeps[0]):
                comparisons[key]["own"] = _seeded(compare_series(*own), *own)
    return comparisons


def _alike(*sweeps: list[Record]) -> tuple[list[Record], ...]:
    """Of every sweep the sparsities that all have: a line through two points lies above a convex curve through four,
    so a coarse sweep would look worse than a fine one. As they are where fewer than two are shared, and where a number
    of active features means another thing over one layer and over two.
    """
    shared = set.intersection(*({record["sparsity_value"] for record in sweep} for sweep in sweeps))
    records = [record for sweep in sweeps for record in sweep]
    mixed = len({len(r["layers"]) for r in records}) > 1 and {r["sparsity"]["kind"] for r in records} != {"l1"}
    if len(shared) < 2 or mixed:
        return sweeps
    return tuple([record for record in sweep if record["sparsity_value"] in shared] for sweep in sweeps)


def _over_sum(two: list[Record], one: list[Record], other: list[Record]) -> Record:
    sweeps = two, one, other
    return _seeded(compare_with_sum(*sweeps), *sweeps) | {"objective": compare_objectives(*sweeps)}


def _robustness(series: Mapping[str, list[Record]], config: ReportConfig) -> Record:
    found: Record = {}
    for comparison, names in config.robustness.items():
        if not set(names) <= series.keys():
            continue
        sides = [series[name] for name in names]
        plain = [[r for r in side if not r["run"].endswith(config.second_schedule)] for side in sides]
        compare = compare_settings if len(names) == 2 else compare_objective_settings
        found[comparison] = compare(*plain).model_dump(mode="json")
        if comparison == "mtc_over_top1" and plain != sides:
            found[f"{comparison}_schedules"] = compare_settings(*sides).model_dump(mode="json")
    return found


def _two_layer_sweeps(config: ReportConfig) -> list[tuple[str, str, str]]:
    """Every two-layer series with the two one-layer series it is held against.

    Rows from other contexts are the second layer's own, so its one-layer sweep serves; values computed from the first
    layer's input are another target and have a one-layer sweep of their own.
    """
    one, other = config.one_layer
    sweeps = [(name, one, other) for name in (*config.two_layer, config.two_layer_control, config.two_layer_matched)]
    sweeps.append((config.two_layer_shared, one, config.second_shared))
    one, other = config.one_layer_near
    near = config.two_layer_near
    sweeps += [(name, one, other) for name in (near, f"{near}-control", f"{near}-matched")]
    return [*sweeps, (f"{near}-shared", one, f"{other}-shared")]


def _controlled_sweeps(config: ReportConfig) -> list[tuple[str, str, str, str]]:
    """Every control with the two-layer series it is a control of, and that one's two one-layer series."""
    controls = (config.two_layer_control, config.two_layer_matched, config.two_layer_shared)
    found = [(control, config.two_layer[0], *config.one_layer) for control in controls]
    near = config.two_layer_near
    return [*found, *((f"{near}-{end}", near, *config.one_layer_near) for end in ("control", "matched", "shared"))]


def _seeded(comparison: Comparison, *sweeps: Sequence[Record]) -> Record:
    """With what the verdicts ask for: seeds that all sweeps have, and whether all were trained on as many tokens."""
    tokens = {record["tokens_trained"] for sweep in sweeps for record in sweep}
    return comparison.model_dump(mode="json") | {
        "n_seeds": len(comparison.seed_ratios),
        "equal_tokens": len(tokens) == 1,
        "features": [sorted({record["features"] for record in sweep}) for sweep in sweeps],
    }

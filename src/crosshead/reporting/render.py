"""The report as Markdown. Computes nothing."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from crosshead.analysis.claims.planted import called_right
from crosshead.reporting.attention import attention_sections
from crosshead.reporting.tables import Column, Record, markdown_table, quoted

__all__ = ["anchor", "render_markdown"]


_RUNS = (
    Column("run", "run"), Column("layers", "layers"), Column("target", "target"),
    Column("features", "features", "{:,}"), Column("heads", "heads_per_feature"), Column("L0", "l0", "{:.1f}"),
    Column("normalised MSE", "normalised_mse", "{:.4f}"), Column("refitted", "normalised_mse_refit", "{:.4f}"),
    Column("dead", "dead_fraction", "{:.1%}"), Column("control", "control"), Column("seed", "seed"),
    Column("parameters", "parameters", "{:,}"), Column("tokens trained", "tokens_trained", "{:,}"),
    Column("held-out tokens", "n_tokens", "{:,}"),
)  # fmt: skip
_SPLICED = (
    Column("run", "run"), Column("CE recovered (mean)", "ce_recovered", "{:.3f}"),
    Column("CE recovered (zero)", "ce_recovered_zero", "{:.3f}"), Column("delta CE", "delta_ce", "{:.4f}"),
    Column("KL", "kl", "{:.4f}"), Column("tokens", "n_tokens_spliced", "{:,}"),
    Column("L0 query side", "l0_query", "{:.1f}"), Column("L0 triples", "l0_triples", "{:.1f}"),
    Column("heads (mean)", "heads_mean", "{:.2f}"), Column("identity", "identity_share", "{:.1%}"),
    Column("tokens of these", "n_tokens_detail", "{:,}"),
)  # fmt: skip
_MATCHED = (
    Column("L0", "l0"), Column("MTC", "mtc", "{:.4f}"), Column("Top-1", "top1", "{:.4f}"),
    Column("MTC, L1 form", "mtc_l1", "{:.4f}"), Column("linear Top-1", "linear_top1", "{:.4f}"),
    Column("attention output SAE (query side)", "attention_output_sae", "{:.4f}"),
)  # fmt: skip
_HEADS = (
    Column("layer", "layer"), Column("head", "head"), Column("induction", "induction", "{:.3f}"),
    Column("previous token", "previous_token", "{:.3f}"), Column("duplicate token", "duplicate_token", "{:.3f}"),
    Column("first token", "first_token", "{:.3f}"),
)  # fmt: skip
_CLUSTERS = (
    Column("loadings", "source"), Column("k", "k"), Column("seed", "seed"), Column("alpha", "alpha", "{:.2f}"),
    Column("x_min", "x_min"), Column("KS", "ks", "{:.3f}"), Column("p", "p_value", "{:.2f}"),
    Column("rival wins", "winner"), Column("non-empty", "n_clusters"),
)  # fmt: skip
_DENSITY = (
    Column("loadings", "source"), Column("clusters", "n_clusters"), Column("features in none", "unassigned", "{:.0%}"),
    Column("k-means with k", "k"), Column("agreement (adjusted Rand)", "adjusted_rand", "{:.2f}"),
)  # fmt: skip
_AUDIT = (
    Column("run", "run"), Column("architecture", "architecture"), Column("target", "target"),
    Column("heads", "heads_per_feature"), Column("sparsity", "sparsity"),
    Column("reported", "normalised_mse", "{:.6f}"), Column("recomputed", "recomputed", "{:.6f}"),
    Column("difference", "difference", "{:.1e}"),
    Column("agrees", "agrees"), Column("not audited because", "reason"),
)  # fmt: skip
_REFERENCES = (
    Column("R", "rank"), Column("linear Top-1 at L0 = R", "linear", "{:.4f}"),
    Column("SVD of rank R", "svd", "{:.4f}"),
)  # fmt: skip
_VERDICTS = (
    Column("claim", "link"),
    Column("verdict", "word"),
    Column("because", "because"),
    Column("regenerate", "command"),
)
_NULLS = (
    Column("run, on the planted output", "run"),
    Column("L0", "l0", "{:.1f}"),
    Column("normalised MSE", "normalised_mse", "{:.4f}"),
    Column("heads (mean)", "participation_ratio_mean", "{:.2f}"),
    Column("identity", "identity_share", "{:.1%}"),
    Column("seed", "seed"),
    Column("held-out tokens", "n_tokens", "{:,}"),
)
_RECOVERY = (
    Column("layer", "layer"),
    Column("architecture", "architecture"),
    Column("seed", "seed"),
    Column("recovered", "share_recovered", "{:.1%}"),
    Column("cosine of encoders", "cosine_encoder", "{:.3f}"),
    Column("decoders", "cosine_decoder", "{:.3f}"),
    Column("loadings", "cosine_loadings", "{:.3f}"),
    Column("error in heads", "heads_error", "{:.2f}"),
    Column("error in OV dimension", "ov_dimension_error", "{:.2f}"),
    Column("clusters (Rand)", "adjusted_rand", "{:.2f}"),
    Column("L0", "l0", "{:.1f}"),
    Column("normalised MSE", "normalised_mse", "{:.4f}"),
    Column("condition number", "condition_number", "{:.0f}"),
)
_PLANTED_RATIOS = (
    Column("layer", "layer"),
    Column("seed", "seed"),
    Column("noise", "noise"),
    Column("MTC over Top-1", "ratio", "{:.3f}"),
    Column("one-head null", "null_ratio", "{:.3f}"),
    Column("said to be superposed", "superposed"),
    Column("called what it is", "right"),
)
_PLANTED_LAYERS = (
    Column("two layers", "layers"),
    Column("features in both", "shared", "{:.0%}"),
    Column("control", "control"),
    Column("seed", "seed"),
    Column("objective ratio", "ratio", "{:.3f}"),
    Column("sharing found", "found"),
    Column("called what it is", "right"),
    Column("features recovered", "share_recovered", "{:.1%}"),
    Column("median cosine of encoders", "cosine_encoder", "{:.2f}"),
    Column("of decoders", "cosine_decoder", "{:.3f}"),
)
_TOYS = (
    Column("trained toy", "toy"),
    Column("seed", "seed"),
    Column("accuracy", "accuracy", "{:.1%}"),
    Column("L0 of the MTC", "mtc_l0", "{:.2f}"),
    Column("of Top-1", "top1_l0", "{:.2f}"),
    Column("MTC over Top-1", "ratio", "{:.3f}"),
    Column("one-head null", "null_ratio", "{:.3f}"),
    Column("said to be superposed", "superposed"),
    Column("called what it is", "right"),
)
_MEANING = (
    Column("run", "run"),
    Column("live features", "n_live", "{:,}"),
    Column("moved from", "from", "{:.3f}"),
    Column("95%", "from_interval"),
    Column("shuffled", "from_shuffled", "{:.3f}"),
    Column("top / middle", "from_ranges"),
    Column("bits", "from_bits", "{:.1%}"),
    Column("moved to", "to", "{:.3f}"),
    Column("95%", "to_interval"),
    Column("shuffled", "to_shuffled", "{:.3f}"),
    Column("top / middle", "to_ranges"),
    Column("bits", "to_bits", "{:.1%}"),
    Column("attends over (tokens)", "breadth", "{:.2f}"),
    Column("95%", "breadth_interval"),
)
_ENRICHED = (
    Column("run", "run"),
    Column("k", "k"),
    Column("cluster", "cluster"),
    Column("size", "size"),
    Column("label", "label"),
    Column("features with it", "n"),
    Column("expected", "expected", "{:.1f}"),
    Column("q", "q_value", "{:.1e}"),
)
_EXAMPLES = (
    Column("label", "label"),
    Column("run", "run"),
    Column("feature", "feature"),
    Column("text", "text"),
)
_MATCHES = (
    Column("first", "first"),
    Column("second", "second"),
    Column("active on these texts", "live"),
    Column("matched", "n_matched", "{:,}"),
    Column("cosine (median)", "cosine", "{:.2f}"),
    Column("attends over: first / second", "breadth"),
    Column("second over first, 95%", "breadth_ratio"),
    Column("tokens: first / second", "tokens"),
    Column("second over first, 95%", "tokens_ratio"),
)
_PAIRS = (
    Column("features", "features"),
    Column("cosine", "cosine", "{:.2f}"),
    Column("attends over", "breadth"),
    Column("tokens", "tokens"),
    Column("text of the first", "first"),
    Column("text of the second", "second"),
)
_CLEAREST_HEADS = 10
_SHOWN = 15


def render_markdown(metrics: Record, findings: Sequence[Any]) -> str:
    """The report as Markdown; pictures are links into figures/."""
    environment = Environment(
        loader=PackageLoader("crosshead.reporting"), undefined=StrictUndefined, keep_trailing_newline=True,
        autoescape=False,
    )  # fmt: skip
    references = metrics["references"]
    rows = [{"rank": a["rank"], "linear": a["normalised_mse"], "svd": b["normalised_mse"]}
            for a, b in zip(references["linear_top1"], references["svd"], strict=True)]  # fmt: skip
    series = {row["run"]: row["series"] for row in metrics["frontier"]}
    clearest = sorted(metrics["survey"], key=lambda r: -r["induction"])[:_CLEAREST_HEADS]
    return environment.get_template("findings.md.jinja").render(
        m=_Dotted(metrics),
        findings=findings,
        table=lambda text: text,
        verdicts=markdown_table(_VERDICTS, [_verdict_row(finding) for finding in findings]),
        nulls=metrics["nulls"] and markdown_table(_NULLS, metrics["nulls"]["rows"]),
        planted=metrics["planted"] and _planted(metrics["planted"]["rows"]),
        meaning=metrics["meaning"] and _meaning(metrics["meaning"], series),
        qk=_Dotted(attention_sections(metrics)),
        heads=markdown_table(_HEADS, clearest),
        runs=markdown_table(_RUNS, metrics["frontier"]),
        spliced=markdown_table(_SPLICED, [row | _spread_over_heads(row) for row in metrics["frontier"]]),
        matched=markdown_table(_MATCHED, metrics["matched_l0"]),
        references=markdown_table(_REFERENCES, rows),
        clusters=markdown_table(_CLUSTERS, [c | {"winner": _winner(c)} for c in metrics["clusters"]]),
        density=markdown_table(_DENSITY, metrics["cluster_hdbscan"]) if metrics["cluster_hdbscan"] else "",
        smallest_k=min((c["k"] for c in metrics["clusters"]), default="any"),
        audit=markdown_table(_AUDIT, metrics["audit"]["runs"]),
        inputs={label: markdown_table(_RUNS, other["frontier"]) for label, other in metrics["inputs"].items()},
    )


def anchor(title: str) -> str:
    """The fragment that leads to a heading, as GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


def _verdict_row(finding: Any) -> Record:
    return {
        "link": f"[{finding.title}](#{anchor(finding.title)})",
        "word": f"**{finding.verdict.upper()}.**",
        "because": finding.reason,
        "command": f"`{finding.commands}`",
    }


def _planted(rows: Sequence[Record]) -> Record:
    """Tables of the planted suite, one per question that was asked."""
    columns = {"recovery": _RECOVERY, "superposition": _PLANTED_RATIOS, "shared_layers": _PLANTED_LAYERS, "toys": _TOYS}
    by_question: dict[str, list[Record]] = {}
    for row in rows:
        by_question.setdefault(row["question"], []).append(row | {"right": called_right(row)})
    tables = {name: markdown_table(columns[name], own) for name, own in by_question.items() if name in columns}
    tables["layers"] = tables.pop("shared_layers", "")
    return _Dotted(
        dict.fromkeys(("recovery", "superposition", "toys"), "") | tables | {"phases": "phases" in by_question}
    )


def _meaning(meaning: Record, series: Mapping[str, str]) -> Record:
    """Tables of what features mean; the series of every run says which pairs of dictionaries differ in seed alone."""
    labels = list(dict.fromkeys(label for found in meaning["runs"].values() for label in found["labels"]))
    counted = [{"run": run} | {label: _counted(found["labels"].get(label)) for label in labels}
               for run, found in meaning["runs"].items()]  # fmt: skip
    columns = [Column("run", "run"), *(Column(f"{label.replace('_', ' ')} (expected)", label) for label in labels)]
    enriched = sorted((e for e in meaning["enrichment"] if e["q_value"] <= 0.05), key=lambda e: e["q_value"])
    examples = [
        {"run": run, "feature": example["feature"], "label": example["label"], "text": quoted(text)}
        for run, found in meaning["runs"].items()
        for example in found["examples"]
        for text in example["texts"][:1]
    ]
    # One label's features of all dictionaries stand together.
    examples.sort(key=lambda row: labels.index(row["label"]))
    return _Dotted({
        "labels": markdown_table(columns, counted),
        "numbers": markdown_table(_MEANING, [_numbers(run, found) for run, found in meaning["runs"].items()]),
        "enriched": markdown_table(_ENRICHED, enriched[:_SHOWN]) if enriched else "",
        "examples": markdown_table(_EXAMPLES, examples) if examples else "",
        "matches": meaning["matches"] and markdown_table(_MATCHES, [_matched(found) for found in meaning["matches"]]),
        "pairs": [{"title": f"{found['first']} and {found['second']}",
                   "table": markdown_table(_PAIRS, [_pair(pair) for pair in found["pairs"]])}
                  for found in _first_of_each(meaning["matches"], series) if found["pairs"]],
    })  # fmt: skip


def _matched(found: Record) -> Record:
    row = found | {"live": " / ".join(f"{n:,}" for n in found["n_live"])}
    for name, measure in found["measures"].items():
        if measure is not None:
            low, high = measure["interval"]
            row |= {name: f"{measure['first']:.2f} / {measure['second']:.2f}",
                    f"{name}_ratio": f"{measure['ratio']:.2f}, {low:.2f} to {high:.2f}"}  # fmt: skip
    return row


def _pair(pair: Record) -> Record:
    first, second = (quoted(text) for text in pair["texts"])
    sides = {name: " / ".join(f"{value:.2f}" for value in pair[name]) for name in ("breadth", "tokens")}
    return {"features": " / ".join(map(str, pair["features"])), "cosine": pair["cosine"], "first": first,
            "second": second, **sides}  # fmt: skip


def _first_of_each(matches: Sequence[Record], series: Mapping[str, str]) -> list[Record]:
    """One seed's pairs are enough for reading: the first of every pair of series."""
    by_series: dict[tuple[str, str], Record] = {}
    for found in matches:
        by_series.setdefault((series[found["first"]], series[found["second"]]), found)
    return list(by_series.values())


def _counted(label: Record | None) -> str | None:
    return None if label is None else f"{label['count']} ({label['expected']:.1f})"


def _numbers(run: str, found: Record) -> Record:
    row: Record = {"run": run, "n_live": found["n_live"]}
    values = dict(found["predictability"]) | ({"breadth": found["breadth"]} if found["breadth"] else {})
    for name, value in values.items():
        if value is None:
            continue
        interval = value["interval"]
        row |= {name: value["median"], f"{name}_shuffled": value.get("shuffled"),
                f"{name}_interval": interval and f"{interval[0]:.3f} to {interval[1]:.3f}"}  # fmt: skip
        if "bits" in value:
            ranges = [value[part] and value[part]["median"] for part in ("top", "middle")]
            row |= {f"{name}_bits": value["bits"]["median"],
                    f"{name}_ranges": None if None in ranges else "{:.3f} / {:.3f}".format(*ranges)}  # fmt: skip
    return row


def _spread_over_heads(row: Record) -> Record:
    spread = row["superposition"] or {}
    return {"heads_mean": spread.get("participation_ratio_mean"), "identity_share": spread.get("identity_share"),
            "n_tokens_detail": row["n_tokens_detail"] or None}  # fmt: skip


class _Dotted(dict):
    """Attribute access for templates."""

    def __getattr__(self, name: str) -> Any:
        try:
            value = self[name]
        except KeyError:
            raise AttributeError(name) from None
        return _Dotted(value) if isinstance(value, dict) else value


def _winner(cluster: Record) -> str:
    ratios: Mapping[str, Record] = cluster["likelihood_ratios"] or {}
    return ", ".join(name.replace("_", " ") for name, r in ratios.items() if r["ratio"] < 0 and r["p_value"] < 0.05)

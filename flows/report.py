"""Put together what the stages measured: metrics, figures, findings."""

from pathlib import Path
from typing import Any

from crosshead.analysis.findings import ReportConfig, collect
from crosshead.analysis.frontiers import null_record, sum_points
from crosshead.analysis.verdicts import judge
from crosshead.io.files import atomic_directory, read_json, write_json, write_text
from crosshead.reporting import attention_figures, evidence, figures
from crosshead.reporting.page import render_html
from crosshead.reporting.render import render_markdown
from flows._runtime import Stage, main
from flows._tracking import _git_revision as git_revision  # pyright: ignore[reportPrivateUsage]


def report(stage: Stage) -> None:
    """Write metrics.json, plots, figures, findings.md and findings.html."""
    config = stage.section("report", ReportConfig)
    records = [read_json(stage.reports / "runs" / f"{run}.json") for run in stage.sections["runs"]]
    clusters = read_json(stage.data / "clusters" / "clusters.json")
    metrics = collect(
        records,
        profile=stage.profile,
        revision=git_revision(),
        config=config,
        provenance=read_json(stage.data / "model" / "provenance.json"),
        corpus=read_json(stage.data / "corpus" / "manifest.json"),
        layers=read_json(stage.data / "survey" / "layers.json"),
        layers_chosen_by=read_json(stage.data / "survey" / "summary.json")["layers_chosen_by"],
        survey=read_json(stage.data / "survey" / "survey.json"),
        references=read_json(stage.data / "references" / "references.json"),
        clusters=clusters,
        audit=read_json(stage.data / "audit" / "audit.json"),
        nulls=_nulls(stage),
        planted=read_json(stage.reports / "planted.json"),
        meaning=read_json(stage.data / "meaning" / "meaning.json"),
        attention=[read_json(stage.reports / "attention" / f"{run}.json") for run in stage.sections["attention_runs"]],
        explain=read_json(stage.data / "explain" / "explain.json"),
        replacements=read_json(stage.data / "replacements" / "replacements.json"),
        inputs={path.stem: read_json(path) for path in sorted(Path(stage.sections["paths"]["inputs"]).glob("*.json"))},
    )
    findings = judge(metrics, config)
    metrics["findings"] = [finding.model_dump(mode="json") for finding in findings]
    keys = ("run", "series", "l0", "normalised_mse", "ce_recovered")
    # Everything is made before anything takes its place: a report is of one piece or the earlier one.
    with atomic_directory(stage.reports / "figures") as figures_directory:
        draw(metrics, records, clusters, config, figures_directory)
        markdown = render_markdown(metrics, findings)
        page = render_html(markdown, figures_directory)
        with atomic_directory(stage.reports / "plots") as plots_directory:
            write_json(
                plots_directory / "frontier.json", [{key: row[key] for key in keys} for row in metrics["frontier"]]
            )
    write_json(stage.reports / "metrics.json", metrics)
    write_text(stage.reports / "findings.md", markdown)
    write_text(stage.reports / "findings.html", page)


def _nulls(stage: Stage) -> dict[str, Any]:
    """The one-head null, its runs in the order in which the parameters name them; those at other settings apart."""
    rows = [read_json(stage.data / "nulls" / f"{run}.json") for run in stage.sections["nulls"]["runs"]]
    settings = [row for row in rows if row["series"].endswith("-settings")]
    record = null_record(read_json(stage.data / "null_target" / "target.json"), [r for r in rows if r not in settings])
    return record | {"settings": settings}


def draw(metrics: dict[str, Any], records: list[Any], clusters: Any, config: ReportConfig, directory: Path) -> None:
    """Every figure of the report."""
    frontier = metrics["frontier"]
    figures.head_map(metrics["survey"], metrics["layers"], directory / "head_map.png")
    figures.mtc_frontier(frontier, metrics["references"], directory / "mtc_frontier.png")
    figures.attention_output_frontier(frontier, directory / "attention_output_frontier.png")
    one, other = ([r for r in records if r["series"] == series and r["seed"] == records[0]["seed"]]
                  for series in config.one_layer)  # fmt: skip
    labels = ("two layers, equal total features", "two layers, equal features each")
    series: dict[str, str] = dict(zip(config.two_layer, labels, strict=False))
    series[config.two_layer_control] = "control (i): second layer from other contexts"
    series[config.two_layer_matched] = "control (ii): the same at equal tokens"
    series[config.two_layer_shared] = "control (iii): second layer computed from the first one's input"
    sums = [(point.l0, point.mse) for point in sum_points(one, other)]
    figures.value_frontier(frontier, sums, series, directory / "value_frontier.png")
    for source in metrics["cluster_features"]:
        path = directory / f"clusters_{source}.png"
        figures.cluster_sizes(source, clusters["sizes"], clusters["clusters"], path)
    _draw_evidence(metrics, config, directory)
    attention_figures.draw_attention(metrics, directory)


def _draw_evidence(metrics: dict[str, Any], config: ReportConfig, directory: Path) -> None:
    frontier = metrics["frontier"]
    coupling = {config.mtc: "MTC", config.top1: "Top-1 MTC", config.joint_mtc: "joint SAE + MTC",
                config.joint_top1: "joint SAE + Top-1", config.best_head: "SAE through its best head"}  # fmt: skip
    if any(row["series"] in (config.joint_mtc, config.joint_top1, config.best_head) for row in frontier):
        figures.coupling_frontier(frontier, coupling, directory / "coupling_frontier.png")
    evidence.one_head_null(
        frontier, metrics["nulls"]["rows"], (config.mtc, config.top1), directory / "one_head_null.png"
    )
    if metrics["meaning"]["ov_dimensions"]:
        evidence.ov_dimensions(metrics["meaning"]["ov_dimensions"], directory / "ov_dimensions.png")
    phases = [row for row in metrics["planted"]["rows"] if row["question"] == "phases"]
    if phases:
        evidence.planted_phases(phases, directory / "planted_phases.png")


if __name__ == "__main__":
    main(report)

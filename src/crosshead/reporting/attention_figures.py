"""Figures of QK features and attention replacement layers, from the report's numbers alone."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from crosshead.reporting.drawing import COLOURS, STYLE, draw, logarithmic, points_of, save

__all__ = ["description_lengths", "draw_attention", "qk_frontiers", "replacement_errors"]

Record = dict[str, Any]
_DENSE = {
    "svd": ("data-weighted SVD (R dense pairs)", "--"),
    "svd-content": ("SVD without position", ":"),
    "coordinates": ("signed coordinates", "-."),
}
_LEVELS = {"mean-score": "mean score by distance", "mean-query-key": "mean query and mean key"}


def draw_attention(metrics: Mapping[str, Any], directory: Path) -> None:
    """Every figure whose runs are there."""
    features = [r for r in metrics["attention"] if r["architecture"] == "qk_diagonal"]
    layers = [r for r in metrics["attention"] if r["architecture"] == "replacement"]
    if features:
        qk_frontiers(features, directory / "qk_frontier.png")
    if layers:
        replacement_errors(layers, directory / "replacement_errors.png")
    if lengths := (metrics["replacements"] or {}).get("description_lengths"):
        description_lengths(lengths, directory / "description_length.png")


def qk_frontiers(records: Sequence[Record], path: Path) -> None:
    """Error of centred scores over pair L0, one panel per choice of heads, each with the references of these heads."""
    heads = list(dict.fromkeys(_heads(r) for r in records))
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(6.4 * len(heads), 4.8))
        for i, name in enumerate(heads):
            axes = figure.add_subplot(1, len(heads), i + 1)
            own = [r for r in records if _heads(r) == name]
            for j, series in enumerate(dict.fromkeys(r["series"] for r in own)):
                points = points_of(own, series)
                draw(axes, points, series, j, linestyle="none" if len(points) == 1 else "-")
            _draw_references(axes, own[0]["evaluation"]["references"])
            axes.set(
                xlabel="pair L0: features active on both sides of a pair", title=f"Layer {own[0]['layers'][0]}, {name}"
            )
            axes.set_ylabel("normalised MSE of centred scores" if i == 0 else "")
            logarithmic(axes)
            axes.legend(fontsize=7)
        figure.tight_layout()
        save(figure, path)


def _heads(record: Record) -> str:
    heads = record["config"]["heads"]
    return "all heads" if heads == "all" else f"head {', '.join(map(str, heads))}"


def _draw_references(axes: Axes, references: Sequence[Record]) -> None:
    for kind, (label, line) in _DENSE.items():
        # A form that is exact has no place on a logarithmic axis.
        points = sorted((r["l0"], r["normalised_mse"]) for r in references
                        if r["name"].startswith(f"{kind}/") and r["normalised_mse"] > 1e-4)  # fmt: skip
        if points:
            axes.plot(*zip(*points, strict=True), line, color="black", linewidth=1, label=label)
    for reference in references:
        if label := _LEVELS.get(reference["name"]):
            level = reference["normalised_mse"]
            axes.axhline(level, color="grey", linewidth=0.7, alpha=0.7)
            axes.annotate(label, (0.99, level), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=7,
                          color="grey")  # fmt: skip


def replacement_errors(records: Sequence[Record], path: Path) -> None:
    """Error of every replacement layer over the heads that write at a position; text: its heads."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(7.0, 4.0))
        axes = figure.add_subplot()
        for i, series in enumerate(dict.fromkeys(r["series"] for r in records)):
            own = [r for r in records if r["series"] == series]
            axes.plot([r["l0"] for r in own], [r["normalised_mse"] for r in own], "o", color=COLOURS[i % len(COLOURS)],
                      label=f"{series}: {own[0]['features']:,} heads or features, {own[0]['parameters'] / 1e6:.1f} M "
                            "parameters")  # fmt: skip
        axes.set(xlabel="heads (or features) that write more than 1% of the output, per position",
                 ylabel="normalised MSE on held-out contexts",
                 title=f"Attention replacement layers for layer {records[0]['layers'][0]}")  # fmt: skip
        logarithmic(axes)
        axes.legend(fontsize=8)
        save(figure, path)


def description_lengths(rows: Sequence[Record], path: Path) -> None:
    """Bits per position against error: all that is sent (filled), and activations alone (hollow)."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(7.0, 4.4))
        axes = figure.add_subplot()
        for i, row in enumerate(rows):
            colour, error = COLOURS[i % len(COLOURS)], row["normalised_mse"]
            axes.plot([row["bits_activations"], row["bits"]], [error, error], "-", color=colour, linewidth=0.8)
            axes.plot([row["bits_activations"]], [error], "o", color=colour, markerfacecolor="white")
            axes.plot([row["bits"]], [error], "o", color=colour, label=row["run"])
        axes.set(xlabel="bits per position: activations (hollow), and attended positions as well (filled)",
                 ylabel="normalised MSE of the attention output",
                 title="Description length of what stands in for attention")  # fmt: skip
        logarithmic(axes)
        axes.legend(fontsize=8)
        save(figure, path)

"""Figures of QK features and attention replacement layers, from the report's numbers alone."""

from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib import ticker
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
_KINDS = {
    "replacement": "replacement layers",
    "combined": "combined layers",
    "mtc": "transcoders",
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
        combined = {r["run"] for r in layers if r["config"]["variant"]["kind"] == "combined"}
        description_lengths(lengths, combined, directory / "description_length.png")


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


def description_lengths(rows: Sequence[Record], combined: Set[str], path: Path) -> None:
    """Error over bits per position: activations of all runs, then a panel per kind with the attended positions as well.

    Bits of positions mean something else in every kind; activations compare. ``combined``: runs of combined replacement
    layers, which are a kind of their own. Autoencoders say nothing of positions and have no such panel.
    """
    kinds = dict.fromkeys(kind for row in rows if (kind := _kind(row, combined)) is not None)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(4.6 + 3.1 * len(kinds), 4.2))
        every, *panels = figure.subplots(
            1, 1 + len(kinds), sharey=True, squeeze=False, width_ratios=[1.4] + [1.0] * len(kinds)
        )[0]
        for i, row in enumerate(rows):
            _draw_length(every, row, "bits_activations", i, label=row["run"])
        every.set(xlabel="bits per position", ylabel="normalised MSE of the attention output",
                  title="Activations alone: all compare")  # fmt: skip
        every.legend(fontsize=8)
        for axes, kind in zip(panels, kinds, strict=True):
            for i, row in enumerate(rows):
                if _kind(row, combined) == kind:
                    _draw_length(axes, row, "bits", i)
            axes.set(xlabel="bits per position", title=f"With positions: {kind}")
        for axes in (every, *panels):
            logarithmic(axes)
            axes.margins(x=0.3)
            axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 3)))
            axes.xaxis.set_major_formatter(ticker.FuncFormatter(lambda bits, _: f"{bits:,.0f}"))
        figure.suptitle("Description length of what stands in for attention; bits with positions compare within one "
                        "panel only, not across panels", fontsize=9)  # fmt: skip
        figure.tight_layout()
        save(figure, path)


def _kind(row: Record, combined: Set[str]) -> str | None:
    """What bits of positions compare within; None where nothing says where anything comes from."""
    if row["architecture"] == "attn_out_sae":
        return None
    kind = "combined" if row["run"] in combined else row["architecture"]
    return _KINDS.get(kind, kind.replace("_", " "))


def _draw_length(axes: Axes, row: Record, bits: str, i: int, label: str | None = None) -> None:
    axes.plot([row[bits]], [row["normalised_mse"]], "o", color=COLOURS[i % len(COLOURS)], label=label)

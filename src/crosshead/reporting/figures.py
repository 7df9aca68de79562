"""Figures of the report, from its numbers alone. PNG bytes depend on nothing but the numbers."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from crosshead.io.files import atomic_path

__all__ = ["attention_output_frontier", "cluster_sizes", "head_map", "mtc_frontier", "value_frontier"]

Record = dict[str, Any]
_STYLE: Any = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "svg.hashsalt": "crosshead",
}
_COLOURS = ("#1b6ca8", "#d1495b", "#2e8b57", "#8d6a9f", "#c98b1a", "#4d4d4d", "#66a3a3")
_KEY_SIDE = "L0: active features per position (key side)"


def _save(figure: Figure, path: Path) -> None:
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=130, bbox_inches="tight", metadata={"Software": None})


def _frontier_axes(title: str, l0: str = _KEY_SIDE) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(7.0, 4.4))
    axes = figure.add_subplot()
    axes.set(xscale="log", yscale="log", xlabel=l0,
             ylabel="normalised MSE on held-out contexts", title=title)  # fmt: skip
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(ticker.FuncFormatter(lambda v, _: f"{v:g}"))
        axis.set_minor_formatter(ticker.NullFormatter())
    axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 3, 5)))
    axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 3, 5)))
    return figure, axes


def _draw(axes: Axes, points: Sequence[tuple[float, float]], label: str, index: int, **style: Any) -> None:
    points = sorted(points)
    options: dict[str, Any] = {"marker": "o", "markersize": 4, "linewidth": 1.4} | style
    axes.plot(*zip(*points, strict=True), label=label, color=_COLOURS[index % len(_COLOURS)], **options)


def _points(frontier: Sequence[Record], series: str) -> list[tuple[float, float]]:
    """The sweep of a series' lowest seed: other seeds are in the tables, and a line through all would zigzag."""
    rows = [r for r in frontier if r["series"] == series]
    return [(r["l0"], r["normalised_mse"]) for r in rows if r["seed"] == min(other["seed"] for other in rows)]


def head_map(survey: Sequence[Record], layers: Mapping[str, int], path: Path) -> None:
    """Four maps, layer by head: induction, previous token, duplicate token, first token; chosen layers marked."""
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(9.5, 5.2))
        scores = ("induction", "previous_token", "duplicate_token", "first_token")
        n_layers = 1 + max(r["layer"] for r in survey)
        n_heads = 1 + max(r["head"] for r in survey)
        for i, score in enumerate(scores):
            axes = figure.add_subplot(1, 4, i + 1)
            grid = [[0.0] * n_heads for _ in range(n_layers)]
            for r in survey:
                grid[r["layer"]][r["head"]] = r[score]
            image = axes.imshow(grid, cmap="viridis", vmin=0, vmax=1, aspect="auto", origin="lower")
            axes.grid(visible=False)
            axes.set(title=score.replace("_", " "), xlabel="head")
            axes.set_ylabel("layer" if i == 0 else "")
            for layer in set(layers.values()):
                axes.annotate("", (-0.6, layer), (-1.6, layer), arrowprops={"arrowstyle": "->", "color": "#d1495b"},
                              annotation_clip=False)  # fmt: skip
            figure.colorbar(image, ax=axes, shrink=0.6)
        figure.tight_layout()
        _save(figure, path)


def mtc_frontier(frontier: Sequence[Record], references: Record, path: Path) -> None:
    """MTC, Top-1, few heads and the L1 form on the attention output, with the references that need no dictionary."""
    with mpl.rc_context(_STYLE):
        figure, axes = _frontier_axes(f"Multitoken transcoders, attention output of layer {references['layer']}")
        rows = [r for r in frontier if r["architecture"] == "mtc" and r["target"] == "attn_out"]
        for i, series in enumerate(dict.fromkeys(r["series"] for r in rows)):
            own = _points(rows, series)
            single = len(own) == 1
            _draw(axes, own, series, i, linestyle="none" if single else "-", marker="D" if single else "o")
        linear = [(p["l0"], p["normalised_mse"]) for p in references["linear_top1"]]
        axes.plot(*zip(*linear, strict=True), "--", color="black", linewidth=1, label="linear Top-1 (no dictionary)")
        svd = [(p["rank"], p["normalised_mse"]) for p in references["svd"]]
        axes.plot(*zip(*svd, strict=True), ":", color="grey", linewidth=1, label="SVD of the targets (rank)")
        for name, label in (("bos_only", "first token alone"), ("own_position_linear", "own position, linear")):
            axes.axhline(references[name], color="grey", linewidth=0.7, alpha=0.7)
            axes.annotate(label, (0.99, references[name]), xycoords=("axes fraction", "data"), ha="right", va="bottom",
                          fontsize=7, color="grey")  # fmt: skip
        axes.legend(fontsize=8, loc="lower left")
        _save(figure, path)


def value_frontier(
    frontier: Sequence[Record], sums: Sequence[tuple[float, float]], series: Mapping[str, str], path: Path
) -> None:
    """Two-layer value SAEs beside the lower envelope of the summed one-layer sweeps. ``series``: name to label."""
    with mpl.rc_context(_STYLE):
        figure, axes = _frontier_axes("Value SAEs: one model of two layers, or two of one")
        for i, (name, label) in enumerate(series.items()):
            points = _points(frontier, name)
            if points:
                _draw(axes, points, label, i, linestyle="--" if "control" in name else "-")
        if sums:
            marker = "s" if len(sums) == 1 else None  # a line through one point shows nothing
            axes.plot(*zip(*sums, strict=True), "-", color="black", linewidth=1.6, marker=marker,
                      label="sum of the one-layer SAEs (best combinations)")  # fmt: skip
        axes.legend(fontsize=8)
        _save(figure, path)


def attention_output_frontier(frontier: Sequence[Record], path: Path) -> None:
    """Attention output SAEs beside the MTC, which predicts the same output from the layer's input."""
    with mpl.rc_context(_STYLE):
        figure, axes = _frontier_axes(
            "Attention output: reconstructed (SAE) and predicted (MTC)",
            "L0: active features per position (MTC: where information comes from, SAE: where it arrives)",
        )
        rows = [r for r in frontier if r["architecture"] == "attn_out_sae"]
        names = ["mtc", *dict.fromkeys(r["series"] for r in rows)]  # the MTC first: its colour in every figure
        for i, name in enumerate(names):
            points = _points(frontier, name)
            if points:
                side = "key side" if name == "mtc" else "query side"
                _draw(axes, points, f"{name} ({side})", i, linestyle="-" if name == "mtc" else "--")
        axes.legend(fontsize=8)
        _save(figure, path)


def cluster_sizes(source: str, sizes: Sequence[Record], fits: Sequence[Record], path: Path) -> None:
    """Rank against size for every k (first seed): the data, and its nulls at the same k."""
    with mpl.rc_context(_STYLE):
        names = (source, f"{source}/shuffled", f"{source}/gaussian")
        figure = Figure(figsize=(9.5, 3.4))
        shared: Axes | None = None
        for i, name in enumerate(names):
            axes = figure.add_subplot(1, 3, i + 1, sharex=shared, sharey=shared)
            shared = shared or axes
            own = [s for s in sizes if s["source"] == name and s["seed"] == 0]
            for j, clustering in enumerate(own):
                shade = mpl.colormaps["viridis"](j / max(1, len(own) - 1))
                positive = [n for n in clustering["sizes"] if n > 0]
                axes.plot(
                    range(1, len(positive) + 1), positive, color=shade, linewidth=1.2, label=f"k={clustering['k']}"
                )
            axes.set(xscale="log", yscale="log", xlabel="rank")
            axes.set_ylabel("features in the cluster" if i == 0 else "")
            alpha = [f["alpha"] for f in fits if f["source"] == name and f["alpha"] is not None]
            label = f"{source}" if i == 0 else f"null: {name.split('/')[1]}"
            axes.set_title(label + (f" (alpha {min(alpha):.1f} to {max(alpha):.1f})" if alpha else ""), fontsize=9)
            if i == 0:
                axes.legend(fontsize=7)
        figure.tight_layout()
        _save(figure, path)

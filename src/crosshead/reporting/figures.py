"""Figures of the report, from its numbers alone. PNG bytes depend on nothing but the numbers."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from crosshead.reporting.drawing import STYLE, draw, frontier_axes, points_of, save

__all__ = [
    "attention_output_frontier",
    "cluster_sizes",
    "coupling_frontier",
    "head_map",
    "mtc_frontier",
    "value_frontier",
]

Record = dict[str, Any]
_APART = ("-settings", "-wide", "-long")  # other trainings or sizes: no point of a frontier


def head_map(survey: Sequence[Record], layers: Mapping[str, int], path: Path) -> None:
    """Four maps, layer by head: induction, previous token, duplicate token, first token; chosen layers marked."""
    with mpl.rc_context(STYLE):
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
        save(figure, path)


def mtc_frontier(frontier: Sequence[Record], references: Record, path: Path) -> None:
    """MTC, Top-1, few heads and the L1 form on the attention output, with the references that need no dictionary."""
    with mpl.rc_context(STYLE):
        figure, axes = frontier_axes(f"Multitoken transcoders, attention output of layer {references['layer']}")
        rows = [r for r in frontier if r["architecture"] == "mtc" and r["target"] == "attn_out"]
        rows = [r for r in rows if not r["series"].endswith(_APART)]
        for i, series in enumerate(dict.fromkeys(r["series"] for r in rows)):
            draw(axes, points_of(rows, series), series, i)
        linear = [(p["l0"], p["normalised_mse"]) for p in references["linear_top1"]]
        axes.plot(*zip(*linear, strict=True), "--", color="black", linewidth=1, label="linear Top-1 (no dictionary)")
        svd = [(p["rank"], p["normalised_mse"]) for p in references["svd"]]
        axes.plot(*zip(*svd, strict=True), ":", color="grey", linewidth=1, label="SVD of the targets (rank)")
        for name, label in (("bos_only", "first token alone"), ("own_position_linear", "own position, linear")):
            axes.axhline(references[name], color="grey", linewidth=0.7, alpha=0.7)
            axes.annotate(label, (0.99, references[name]), xycoords=("axes fraction", "data"), ha="right", va="bottom",
                          fontsize=7, color="grey")  # fmt: skip
        # The exact references go far below what any dictionary reaches.
        axes.set_ylim(bottom=0.6 * min(r["normalised_mse"] for r in rows))
        axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1.0))
        save(figure, path)


def value_frontier(
    frontier: Sequence[Record], sums: Sequence[tuple[float, float]], series: Mapping[str, str], path: Path
) -> None:
    """Two-layer value SAEs beside the lower envelope of the summed one-layer sweeps. ``series``: name to label."""
    with mpl.rc_context(STYLE):
        figure, axes = frontier_axes("Value SAEs: one model of two layers, or two of one")
        for i, (name, label) in enumerate(series.items()):
            points = points_of(frontier, name)
            if points:
                draw(axes, points, label, i, linestyle="--" if "control" in name else "-")
        if sums:
            marker = "s" if len(sums) == 1 else None  # a line through one point shows nothing
            axes.plot(*zip(*sums, strict=True), "-", color="black", linewidth=1.6, marker=marker,
                      label="sum of the one-layer SAEs (best combinations)")  # fmt: skip
        axes.legend(fontsize=8)
        save(figure, path)


def coupling_frontier(frontier: Sequence[Record], series: Mapping[str, str], path: Path) -> None:
    """MTCs beside dictionaries whose features were not learned for moving. ``series``: name to label."""
    with mpl.rc_context(STYLE):
        figure, axes = frontier_axes("Features learned for moving, or moved after an SAE has learned them")
        for i, (name, label) in enumerate(series.items()):
            points = points_of(frontier, name)
            if points:
                draw(axes, points, label, i)
        axes.legend(fontsize=8)
        save(figure, path)


def attention_output_frontier(frontier: Sequence[Record], path: Path) -> None:
    """Attention output SAEs beside the MTC, which predicts the same output from the layer's input."""
    with mpl.rc_context(STYLE):
        figure, axes = frontier_axes(
            "Attention output: reconstructed (SAE) and predicted (MTC)",
            "L0: active features per position (MTC: where information comes from, SAE: where it arrives)",
        )
        rows = [r for r in frontier if r["architecture"] == "attn_out_sae"]
        names = ["mtc", *dict.fromkeys(r["series"] for r in rows)]  # the MTC first: its colour in every figure
        for i, name in enumerate(names):
            points = points_of(frontier, name)
            if points:
                side = "key side" if name == "mtc" else "query side"
                draw(axes, points, f"{name} ({side})", i, linestyle="-" if name == "mtc" else "--")
        axes.legend(fontsize=8)
        save(figure, path)


def cluster_sizes(source: str, sizes: Sequence[Record], fits: Sequence[Record], path: Path) -> None:
    """Rank against size for every k (first seed): the data, and its nulls at the same k."""
    with mpl.rc_context(STYLE):
        nulls = dict.fromkeys(s["source"] for s in sizes if s["source"].startswith(f"{source}/"))
        names = (source, *nulls)
        figure = Figure(figsize=(3.2 * len(names), 3.4))
        shared: Axes | None = None
        for i, name in enumerate(names):
            axes = figure.add_subplot(1, len(names), i + 1, sharex=shared, sharey=shared)
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
                axes.legend(fontsize=7, loc="upper right")
        figure.tight_layout()
        save(figure, path)

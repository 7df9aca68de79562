"""Figures of nulls and planted truth, from the report's numbers alone."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from crosshead.reporting.drawing import COLOURS, STYLE, draw, frontier_axes, logarithmic, points_of, save

__all__ = ["one_head_null", "ov_dimensions", "planted_phases"]

Record = dict[str, Any]
_COLUMNS = 3


def one_head_null(frontier: Sequence[Record], null: Sequence[Record], names: Sequence[str], path: Path) -> None:
    """MTC and Top-1 on the real output (solid) and where one head per feature is the planted truth (dashed)."""
    with mpl.rc_context(STYLE):
        figure, axes = frontier_axes("The real output, and one head per feature planted in it")
        for i, name in enumerate(names):
            for rows, where, line in ((frontier, "real output", "-"), (null, "planted", "--")):
                if points := points_of(rows, name):
                    draw(axes, points, f"{name}, {where}", i, linestyle=line)
        axes.legend(fontsize=8)
        save(figure, path)


def ov_dimensions(clusters: Sequence[Record], path: Path) -> None:
    """Effective rank of every cluster's decoder rows against its size, with the range of random sets as large."""
    with mpl.rc_context(STYLE):
        runs = list(dict.fromkeys(c["run"] for c in clusters))
        columns = min(_COLUMNS, len(runs))
        lines = -(-len(runs) // columns)
        figure = Figure(figsize=(4.6 * columns, 3.8 * lines))
        for i, run in enumerate(runs):
            axes = figure.add_subplot(lines, columns, i + 1)
            own = sorted((c for c in clusters if c["run"] == run), key=lambda c: c["size"])
            sizes = [c["size"] for c in own]
            axes.fill_between(sizes, [c["random_low"] for c in own], [c["random_high"] for c in own], color="#c9ced8",
                              alpha=0.6, linewidth=0, label="random sets, 95%")  # fmt: skip
            axes.plot(sizes, [c["effective_rank"] for c in own], "o", color=COLOURS[i % len(COLOURS)], markersize=4,
                      label="clusters")  # fmt: skip
            logarithmic(axes)
            axes.set(xlabel="features in the cluster", title=f"{run}, k={own[0]['k']}")
            axes.set_ylabel("OV dimension (effective rank)" if i % columns == 0 else "")
            axes.legend(fontsize=8)
        figure.tight_layout()
        save(figure, path)


def planted_phases(rows: Sequence[Record], path: Path) -> None:
    """Share of planted features that an MTC recovers, mean over seeds, by mixing and noise; a map per density."""
    with mpl.rc_context(STYLE):
        mixing, noise, active = (sorted({row[key] for row in rows}) for key in ("mixing", "noise", "planted_l0"))
        n_seeds = len({row["seed"] for row in rows})
        figure = Figure(figsize=(3.6 * len(active) + 0.8, 3.4))
        for i, level in enumerate(active):
            axes = figure.add_subplot(1, len(active), i + 1)
            own = [row for row in rows if row["planted_l0"] == level]
            grid = [[_mean(row["share_recovered"] for row in own if (row["mixing"], row["noise"]) == (m, n))
                     for m in mixing] for n in noise]  # fmt: skip
            image = axes.imshow(grid, cmap="viridis", vmin=0, vmax=1, aspect="auto", origin="lower")
            axes.grid(visible=False)
            axes.set_xticks(range(len(mixing)), [f"{m:g}" for m in mixing])
            axes.set_yticks(range(len(noise)), [f"{n:g}" for n in noise])
            over = "" if n_seeds == 1 else f", mean of {n_seeds} seeds"
            axes.set(title=f"{level:g} active features per position{over}", xlabel="mixing over heads (0: one head)")
            axes.set_ylabel("noise over signal" if i == 0 else "")
            for y, row in enumerate(grid):
                for x, value in enumerate(row):
                    if value == value:
                        axes.text(x, y, f"{value:.0%}", ha="center", va="center", fontsize=7,
                                  color="white" if value < 0.6 else "black")  # fmt: skip
            figure.colorbar(image, ax=axes, shrink=0.8)
        figure.tight_layout()
        save(figure, path)


def _mean(values: Iterable[float]) -> float:
    known = list(values)
    return sum(known) / len(known) if known else float("nan")

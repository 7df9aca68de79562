"""What the report's figures share: style, axes of a frontier, saving. PNG bytes depend on nothing but the numbers."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from crosshead.io.files import atomic_path

__all__ = ["COLOURS", "KEY_SIDE", "STYLE", "draw", "frontier_axes", "logarithmic", "points_of", "save"]

Record = dict[str, Any]
STYLE: Any = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "svg.hashsalt": "crosshead",
}
COLOURS = ("#1b6ca8", "#d1495b", "#2e8b57", "#8d6a9f", "#c98b1a", "#4d4d4d", "#66a3a3")
_MARKERS = ("o", "s", "^")
_FEW_MARKERS = ("D", "P", "X")
KEY_SIDE = "L0: active features per position (key side)"


def save(figure: Figure, path: Path) -> None:
    """Write a PNG, whole or not at all."""
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=130, bbox_inches="tight", metadata={"Software": None})


def frontier_axes(title: str, l0: str = KEY_SIDE) -> tuple[Figure, Axes]:
    """A figure with logarithmic L0 and normalised MSE."""
    figure = Figure(figsize=(7.0, 4.4))
    axes = figure.add_subplot()
    axes.set(xlabel=l0, ylabel="normalised MSE on held-out contexts", title=title)
    logarithmic(axes)
    return figure, axes


def logarithmic(axes: Axes) -> None:
    """Both axes logarithmic, with plain numbers at 1, 2, 3 and 5."""
    axes.set(xscale="log", yscale="log")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(ticker.FuncFormatter(lambda v, _: f"{v:g}"))
        axis.set_minor_formatter(ticker.NullFormatter())
    axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 3, 5)))
    axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 3, 5)))


def draw(axes: Axes, points: Sequence[tuple[float, float]], label: str, index: int, **style: Any) -> None:
    """A frontier's points, joined by a line where there are three or more."""
    points = sorted(points)
    # Colours come round again with another marker; a line through two points would lie above a curve through four.
    few = len(points) < 3
    markers = _FEW_MARKERS if few else _MARKERS
    marker = markers[index // len(COLOURS) % len(markers)]
    options: dict[str, Any] = {"marker": marker, "markersize": 4, "linewidth": 1.4} | style
    if few:
        options["linestyle"] = "none"
    axes.plot(*zip(*points, strict=True), label=label, color=COLOURS[index % len(COLOURS)], **options)


def points_of(frontier: Sequence[Record], series: str) -> list[tuple[float, float]]:
    """The sweep of a series' lowest seed: other seeds are in the tables, and a line through all would zigzag."""
    rows = [r for r in frontier if r["series"] == series]
    return [(r["l0"], r["normalised_mse"]) for r in rows if r["seed"] == min(other["seed"] for other in rows)]

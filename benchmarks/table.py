"""The measurements as latest.json, a dated table and plots."""

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.ticker import FixedLocator, NullLocator, StrMethodFormatter

from crosshead.io.files import write_json, write_text

__all__ = ["write_tables"]

_HEAD = (
    "| work | implementation | N | T | F | H | L0 | ms | encoder products | of ours | peak MiB | rounds | measured |",
    f"|---|---{'|--:' * 11}|",
)


def write_tables(home: Path, rows: list[dict[str, Any]], date: str) -> None:
    """Write latest.json (the rows, each with its date and machine), <date>.md, steps.png and growth.png."""
    write_json(home / "latest.json", rows)
    machines: dict[str, list[str]] = {}
    for row in rows:
        described = ", ".join(f"{name} {value}" for name, value in sorted(row.get("machine", {}).items()))
        machines.setdefault(described, []).append(row["date"])
    lines = [
        f"# Measured on {date}",
        "",
        *(f"{described} ({', '.join(sorted(set(dates)))})." for described, dates in machines.items()),
        "",
        "Milliseconds mean little elsewhere; *encoder products* is the time of a step over that of a",
        "preallocated `mm` of the encoder's shape right before it, *of ours* is over our first row's step in the same",
        "round; medians over rounds, quartiles in brackets. *Peak* is by how much resident memory grows during a step,",
        "over inputs and weights, gradients included and Adam's moments not; of a `fit` by how much the whole process",
        "does, everything included. H counts movers",
        "(the identity is one). Lorsa has as many heads as the transcoder has features, as many active, and learns its",
        "patterns, which the transcoder takes from the model. Written by `make bench`.",
        "",
        *_HEAD,
        *(_line(row) for row in rows),
        "",
        "![Steps in encoder products](steps.png)",
        "",
        "How our steps grow with active features, rows, heads and context length, everything else at its middle value:",
        "",
        "![Growth](growth.png)",
        "",
    ]
    write_text(home / f"{date}.md", "\n".join(lines))
    _plot_features(home / "steps.png", rows)
    _plot_growth(home / "growth.png", rows)


def _line(row: dict[str, Any]) -> str:
    shape = row["shape"]
    speed = f", {row['positions_per_second']:,.0f} positions/s" if "positions_per_second" in row else ""
    waited = f", {row['waited_share']:.1%} waiting" if "waited_share" in row else ""
    cells = [
        row["work"],
        row["implementation"] + speed + waited,
        *(str(shape.get(name, "")) for name in ("N", "T", "F", "H", "L0")),
    ]
    if "error" in row:
        return f"| {' | '.join(cells)} | {row['error'][:80]} | | | | | {row['date']} |"
    cells.append(f"{row['seconds_median'] * 1e3:,.0f}")
    cells.append("" if row["ratio_to_encoder_product"] is None else _with_quartiles(row))
    cells.append("" if row["ratio_to_ours"] is None else f"{row['ratio_to_ours']:.2f}")
    cells.append("" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:,.0f}")
    cells += [str(row["pairs"]), row["date"]]
    return f"| {' | '.join(cells)} |"


def _with_quartiles(row: dict[str, Any]) -> str:
    quartiles = row.get("ratio_to_encoder_product_quartiles")
    spread = "" if quartiles is None else " ({:.2f} to {:.2f})".format(*quartiles)
    return f"{row['ratio_to_encoder_product']:.2f}{spread}"


def _plot_features(path: Path, rows: list[dict[str, Any]]) -> None:
    """How a step's price in encoder products falls with the number of features."""
    rows = [row for row in rows if row["shape"].get("N") == 1024 and row["shape"].get("L0") == 64
            and row["shape"]["T"] == 256 and row["shape"].get("H") in (1, 10) and "error" not in row]  # fmt: skip
    works = [work for work in dict.fromkeys(row["work"] for row in rows) if " step, " in work or work == "mtc step"]
    figure, axes = plt.subplots(1, max(1, len(works)), figsize=(4.2 * max(1, len(works)), 3.6), squeeze=False)
    for axis, work in zip(axes[0], works, strict=False):
        chosen = [row for row in rows if row["work"] == work]
        for name in dict.fromkeys(row["implementation"] for row in chosen):
            points = sorted((row["shape"]["F"], row["ratio_to_encoder_product"]) for row in chosen
                            if row["implementation"] == name)  # fmt: skip
            axis.plot(*zip(*points, strict=True), marker="o", label=name, linewidth=2 if name.startswith("ours") else 1)
        axis.axhline(1.0, color="grey", linewidth=1, linestyle=":")
        axis.set(title=work, xlabel="features", xscale="log", yscale="log", ylabel="encoder products")
        for ticks, values in (
            (axis.xaxis, sorted({row["shape"]["F"] for row in chosen})),
            (axis.yaxis, (1, 2, 5, 10, 20)),
        ):
            ticks.set_major_locator(FixedLocator(list(values)))
            ticks.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
            ticks.set_minor_locator(NullLocator())
        axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _plot_growth(path: Path, rows: list[dict[str, Any]]) -> None:
    """Our steps at 8,192 features along every other dimension of the work."""
    middle = {"N": 1024, "T": 256, "F": 8192, "L0": 64}
    names = {"L0": "active features per position", "N": "rows", "H": "movers", "T": "context length"}
    figure, axes = plt.subplots(1, len(names), figsize=(3.6 * len(names), 3.4), sharey=True)
    for axis, (name, label) in zip(axes, names.items(), strict=True):
        fixed = {other: value for other, value in middle.items() if other != name}
        for work, implementation in (("mtc step", "ours/batch_topk"), ("sae step, topk", "ours/topk")):
            own = [row for row in rows if row["work"] == work and row["implementation"] == implementation
                   and "error" not in row and all(row["shape"].get(k) == v for k, v in fixed.items())
                   and (name == "H" or row["shape"]["H"] in (1, 10))]  # fmt: skip
            points = sorted((row["shape"][name], row["ratio_to_encoder_product"]) for row in own)
            axis.plot(*zip(*points, strict=True) if points else ((), ()), marker="o", label=work)
        axis.axhline(1.0, color="grey", linewidth=1, linestyle=":")
        axis.set(xlabel=label, ylim=(0, None))
    axes[0].set(ylabel="encoder products")
    axes[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)

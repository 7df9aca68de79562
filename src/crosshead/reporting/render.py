"""The report's two forms: Markdown, and one self-contained HTML page made from it. Computes nothing."""

import base64
import html
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined

__all__ = ["render_html", "render_markdown"]

Record = dict[str, Any]


class _Column(NamedTuple):
    title: str
    key: str
    form: str = "{}"


_RUNS = (
    _Column("run", "run"), _Column("layers", "layers"), _Column("target", "target"),
    _Column("features", "features", "{:,}"), _Column("heads", "heads_per_feature"), _Column("L0", "l0", "{:.1f}"),
    _Column("normalised MSE", "normalised_mse", "{:.4f}"), _Column("refitted", "normalised_mse_refit", "{:.4f}"),
    _Column("dead", "dead_fraction", "{:.1%}"), _Column("control", "control"), _Column("seed", "seed"),
    _Column("parameters", "parameters", "{:,}"), _Column("tokens trained", "tokens_trained", "{:,}"),
    _Column("held-out tokens", "n_tokens", "{:,}"),
)  # fmt: skip
_SPLICED = (
    _Column("run", "run"), _Column("CE recovered (mean)", "ce_recovered", "{:.3f}"),
    _Column("CE recovered (zero)", "ce_recovered_zero", "{:.3f}"), _Column("delta CE", "delta_ce", "{:.4f}"),
    _Column("KL", "kl", "{:.4f}"), _Column("tokens", "n_tokens_spliced", "{:,}"),
    _Column("L0 query side", "l0_query", "{:.1f}"), _Column("L0 triples", "l0_triples", "{:.1f}"),
    _Column("heads (mean)", "heads_mean", "{:.2f}"), _Column("identity", "identity_share", "{:.1%}"),
    _Column("tokens of these", "n_tokens_detail", "{:,}"),
)  # fmt: skip
_MATCHED = (
    _Column("L0", "l0"), _Column("MTC", "mtc", "{:.4f}"), _Column("Top-1", "top1", "{:.4f}"),
    _Column("MTC, L1 form", "mtc_l1", "{:.4f}"), _Column("linear Top-1", "linear_top1", "{:.4f}"),
    _Column("attention output SAE (query side)", "attention_output_sae", "{:.4f}"),
)  # fmt: skip
_HEADS = (
    _Column("layer", "layer"), _Column("head", "head"), _Column("induction", "induction", "{:.3f}"),
    _Column("previous token", "previous_token", "{:.3f}"), _Column("duplicate token", "duplicate_token", "{:.3f}"),
    _Column("first token", "first_token", "{:.3f}"),
)  # fmt: skip
_CLUSTERS = (
    _Column("loadings", "source"), _Column("k", "k"), _Column("seed", "seed"), _Column("alpha", "alpha", "{:.2f}"),
    _Column("x_min", "x_min"), _Column("KS", "ks", "{:.3f}"), _Column("p", "p_value", "{:.2f}"),
    _Column("rival wins", "winner"), _Column("non-empty", "n_clusters"),
)  # fmt: skip
_AUDIT = (
    _Column("run", "run"), _Column("architecture", "architecture"), _Column("target", "target"),
    _Column("heads", "heads_per_feature"), _Column("sparsity", "sparsity"),
    _Column("reported", "normalised_mse", "{:.6f}"), _Column("recomputed", "recomputed", "{:.6f}"),
    _Column("difference", "difference", "{:.1e}"),
    _Column("agrees", "agrees"), _Column("not audited because", "reason"),
)  # fmt: skip
_REFERENCES = (
    _Column("R", "rank"), _Column("linear Top-1 at L0 = R", "linear", "{:.4f}"),
    _Column("SVD of rank R", "svd", "{:.4f}"),
)  # fmt: skip
_CLEAREST_HEADS = 10


def render_markdown(metrics: Record, findings: Sequence[Any]) -> str:
    """The report as Markdown; pictures are links into figures/."""
    environment = Environment(
        loader=PackageLoader("crosshead.reporting"), undefined=StrictUndefined, keep_trailing_newline=True,
        autoescape=False,
    )  # fmt: skip
    references = metrics["references"]
    rows = [{"rank": a["rank"], "linear": a["normalised_mse"], "svd": b["normalised_mse"]}
            for a, b in zip(references["linear_top1"], references["svd"], strict=True)]  # fmt: skip
    clearest = sorted(metrics["survey"], key=lambda r: -r["induction"])[:_CLEAREST_HEADS]
    return environment.get_template("findings.md.jinja").render(
        m=_Dotted(metrics),
        findings=findings,
        table=lambda text: text,
        heads=_table(_HEADS, clearest),
        runs=_table(_RUNS, metrics["frontier"]),
        spliced=_table(_SPLICED, [row | _spread_over_heads(row) for row in metrics["frontier"]]),
        matched=_table(_MATCHED, metrics["matched_l0"]),
        references=_table(_REFERENCES, rows),
        clusters=_table(_CLUSTERS, [c | {"winner": _winner(c)} for c in metrics["clusters"]]),
        smallest_k=min((c["k"] for c in metrics["clusters"]), default="any"),
        audit=_table(_AUDIT, metrics["audit"]["runs"]),
        inputs={label: _table(_RUNS, other["frontier"]) for label, other in metrics["inputs"].items()},
    )


def render_html(markdown: str, figures: Path) -> str:
    """One page with nothing outside it: pictures become data URIs, tables scroll, numbers align to the right."""
    body = _Html(figures).convert(markdown)
    environment = Environment(loader=PackageLoader("crosshead.reporting"), undefined=StrictUndefined, autoescape=False)
    title = html.escape(markdown.splitlines()[0].lstrip("# "))
    return environment.get_template("page.html.jinja").render(title=title, body=body) + "\n"


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


def _table(columns: Sequence[_Column], rows: Sequence[Record]) -> str:
    """A Markdown table without columns that are empty in every row."""
    cells = [[_cell(column, row.get(column.key)) for column in columns] for row in rows]
    kept = [i for i in range(len(columns)) if any(row[i] for row in cells)]
    lines = ["| " + " | ".join(columns[i].title for i in kept) + " |", "|" + "|".join(
        "---:" if all(_is_number(row[i]) for row in cells) else "---" for i in kept) + "|"]  # fmt: skip
    lines += ["| " + " | ".join(row[i] for i in kept) + " |" for row in cells]
    return "\n".join(lines)


def _cell(column: _Column, value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "NO"
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    return column.form.format(value)


def _is_number(text: str) -> bool:
    return re.fullmatch(r"-?[\d,.]*(e-?\d+)?%?", text) is not None


class _Html:
    """The Markdown that our own template writes - headings, lists, tables, pictures - and no more."""

    def __init__(self, figures: Path):
        self.figures = figures

    def convert(self, markdown: str) -> str:
        blocks = re.split(r"\n\s*\n", markdown.strip())
        return "\n".join(self._block(block.strip("\n")) for block in blocks)

    def _block(self, block: str) -> str:
        if heading := re.match(r"(#{1,3}) (.*)", block):
            level, rest = len(heading[1]), block[heading.end() :].strip()
            return f"<h{level}>{self._inline(heading[2])}</h{level}>" + (self._block(rest) if rest else "")
        if picture := re.fullmatch(r"!\[(.*?)\]\(figures/(.*?)\)", block):
            data = base64.b64encode((self.figures / picture[2]).read_bytes()).decode()
            return f'<img alt="{html.escape(picture[1])}" src="data:image/png;base64,{data}">'
        lines = block.splitlines()
        if block.startswith("|"):
            return self._table(lines)
        if block.startswith("- "):
            return "<ul>" + "".join(f"<li>{self._inline(line[2:])}</li>" for line in lines) + "</ul>"
        return f"<p>{self._inline(' '.join(lines))}</p>"

    def _table(self, lines: list[str]) -> str:
        rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
        kinds = ["number" if cell.endswith(":") else "text" for cell in rows[1]]
        head = "".join(f'<th class="{k}">{self._inline(c)}</th>' for k, c in zip(kinds, rows[0], strict=True))
        body = "".join(
            "<tr>"
            + "".join(f'<td class="{k}">{self._inline(c)}</td>' for k, c in zip(kinds, row, strict=True))
            + "</tr>"
            for row in rows[2:]
        )
        return f'<div class="table"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'

    def _inline(self, text: str) -> str:
        text = html.escape(text, quote=False)
        text = re.sub(r"\*\*(SUPPORTS|CONTRADICTS|INCONCLUSIVE)\.\*\*", self._verdict, text)
        text = re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", text)
        text = re.sub(r"(?<!\w)\*(.+?)\*(?!\w)", r"<em>\1</em>", text)
        return re.sub(r"`(.+?)`", r"<code>\1</code>", text)

    @staticmethod
    def _verdict(match: re.Match[str]) -> str:
        word = match[1].lower()
        return f'<span class="verdict {word}">{word}</span>'

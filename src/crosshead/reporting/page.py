"""The report as one self-contained HTML page, made from its Markdown."""

import base64
import html
import re
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from crosshead.reporting.render import anchor

__all__ = ["render_html"]

_LONG = 40
"""Characters from which a cell of a table may break into lines."""


def render_html(markdown: str, figures: Path) -> str:
    """One page with nothing outside it: pictures become data URIs, tables scroll, numbers align to the right."""
    body = _Html(figures).convert(markdown)
    environment = Environment(loader=PackageLoader("crosshead.reporting"), undefined=StrictUndefined, autoescape=False)
    title = html.escape(markdown.splitlines()[0].lstrip("# "))
    return environment.get_template("page.html.jinja").render(title=title, body=body) + "\n"


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
            opening = f'<h{level} id="{anchor(heading[2])}">'
            return f"{opening}{self._inline(heading[2])}</h{level}>" + (self._block(rest) if rest else "")
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
            "<tr>" + "".join(f'<td class="{k}{" long" * (len(c) > _LONG)}">{self._inline(c)}</td>'
                             for k, c in zip(kinds, row, strict=True)) + "</tr>" for row in rows[2:]
        )  # fmt: skip
        return f'<div class="table"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'

    def _inline(self, text: str) -> str:
        parts = re.split(r"`(.+?)`", html.escape(text, quote=False))
        return "".join(f"<code>{part}</code>" if i % 2 else self._words(part) for i, part in enumerate(parts))

    def _words(self, text: str) -> str:
        text = re.sub(r"\*\*(SUPPORTS|CONTRADICTS|INCONCLUSIVE)\.\*\*", self._verdict, text)
        text = re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", text)
        text = re.sub(r"(?<!\w)\*(.+?)\*(?!\w)", r"<em>\1</em>", text)
        return re.sub(r"\[([^\[\]]+)\]\(#([\w-]+)\)", r'<a href="#\2">\1</a>', text)

    @staticmethod
    def _verdict(match: re.Match[str]) -> str:
        word = match[1].lower()
        return f'<span class="verdict {word}">{word}</span>'

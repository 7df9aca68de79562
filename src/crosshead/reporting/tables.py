"""Markdown tables of the report: which columns, in which form."""

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

__all__ = ["Column", "Record", "markdown_table", "quoted"]

Record = dict[str, Any]


class Column(NamedTuple):
    """A column of a table."""

    title: str
    key: str
    form: str = "{}"


def markdown_table(columns: Sequence[Column], rows: Sequence[Record]) -> str:
    """A Markdown table without columns that are empty in every row; numbers align to the right."""
    cells = [[_cell(column, row.get(column.key)) for column in columns] for row in rows]
    kept = [i for i in range(len(columns)) if any(row[i] for row in cells)]
    lines = ["| " + " | ".join(columns[i].title for i in kept) + " |", "|" + "|".join(
        "---:" if all(_is_number(row[i]) for row in cells) else "---" for i in kept) + "|"]  # fmt: skip
    lines += ["| " + " | ".join(row[i] for i in kept) + " |" for row in cells]
    return "\n".join(lines)


def quoted(text: str) -> str:
    """Text of a corpus or a prompt as a table cell: nothing is read as Markdown, white space alone is spelt out."""
    shown = re.sub(r"\s+", " ", text).replace("`", "'").replace("|", "/").strip()
    return f"`{shown or repr(text)[1:-1].replace(' ', '_') or '(empty)'}`"


def _cell(column: Column, value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "NO"
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    return column.form.format(value)


def _is_number(text: str) -> bool:
    return re.fullmatch(r"-?[\d,.]*(e-?\d+)?%?", text) is not None

"""Plain tables: aligned for a terminal, as Markdown, or as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from typing import Any


def text_table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Rows under headers, the first column to the left and the others to the right, two spaces between."""
    widths = [max(len(row[index]) for row in [headers, *rows]) for index in range(len(headers))]

    def line(row: Sequence[str]) -> str:
        first = row[0].ljust(widths[0])
        rest = (cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))
        return "  ".join([first, *rest]).rstrip()

    return "\n".join([line(headers), "  ".join("-" * width for width in widths), *map(line, rows)])


def markdown_table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The same table in Markdown."""
    lines = ["| " + " | ".join(row) + " |" for row in [headers, *rows]]
    rule = "|---|" + "---:|" * (len(headers) - 1)
    return "\n".join([lines[0], rule, *lines[1:]])


def csv_table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """The same table as CSV, commas and line feeds; None becomes an empty cell."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(rows)
    return text.getvalue()

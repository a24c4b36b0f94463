"""Tables: one kind for the terminal, Markdown, CSV, JSON and a report's page.

A table holds numbers, not text: each column says how its estimates are written, so that the cells that people read
and the numbers that programs read are the same ones.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from robust_unlearning.stats.estimates import Estimate
from robust_unlearning.stats.format import GENERAL, Form, shown


@dataclass(frozen=True)
class Column:
    """A column's header, and how its numbers are written."""

    header: str
    form: Form = GENERAL


@dataclass(frozen=True)
class Table:
    """Rows of text, numbers, estimates and verdicts; the first column names the rows.

    Attributes:
        title: what it shows.
        columns: field -> header or `Column`, in order.
        rows: field -> value; a field that is missing or None is an empty cell.
        notes: how to read it.
        key: a short name, for files and JSON.
    """

    title: str
    columns: Mapping[str, str | Column]
    rows: Sequence[Mapping[str, Any]]
    notes: str = ""
    key: str = ""

    @property
    def headers(self) -> list[str]:
        """The columns' headers."""
        return [each.header if isinstance(each, Column) else each for each in self.columns.values()]

    def cells(self) -> list[list[str]]:
        """The rows as text."""
        forms = {key: each.form if isinstance(each, Column) else GENERAL for key, each in self.columns.items()}
        return [[shown(row.get(key), form) for key, form in forms.items()] for row in self.rows]

    def text(self) -> str:
        """For the terminal: see `text_table`."""
        return text_table(self.headers, self.cells())

    def markdown(self) -> str:
        """In Markdown: see `markdown_table`."""
        return markdown_table(self.headers, self.cells())

    def csv(self) -> str:
        """The numbers, the fields as columns; an estimate takes four: value, low, high, n."""
        flat = []
        for row in self.rows:
            cells: dict[str, Any] = {}
            for key in self.columns:
                value = row.get(key)
                if isinstance(value, Estimate):
                    cells |= {key: value.value, f"{key}_low": value.low, f"{key}_high": value.high, f"{key}_n": value.n}
                else:
                    cells[key] = value
            flat.append(cells)
        names = list(dict.fromkeys(key for cells in flat for key in cells))
        return csv_table(names, [[cells.get(name) for name in names] for cells in flat])

    def as_json(self) -> list[dict[str, Any]]:
        """The rows for JSON, estimates as `Estimate.as_dict` gives them."""
        return [
            {key: value.as_dict() if isinstance(value, Estimate) else value for key, value in row.items()}
            for row in self.rows
        ]


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
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in [headers, *rows]]
    rule = "|---|" + "---:|" * (len(headers) - 1)
    return "\n".join([lines[0], rule, *lines[1:]])


def csv_table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """The same table as CSV, commas and line feeds; None becomes an empty cell."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(rows)
    return text.getvalue()

"""Tables: one kind for the terminal, Markdown, CSV, JSON and a report's page.

A table holds numbers, not text: each column says how its estimates are written, so that the cells that people read
and the numbers that programs read are the same ones.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from robust_unlearning.errors import UserError
from robust_unlearning.stats.estimates import Estimate
from robust_unlearning.stats.format import GENERAL, NumberForm, shown, sizes

Finding = Literal["holds", "does not hold", "mixed", "inconclusive", "not run"]
"""What became of a claim; `mixed`: it holds in some of its rows and does not in others."""
INCONCLUSIVE: Finding = "inconclusive"


@dataclass(frozen=True)
class Verdict:
    """A cell that says what became of a claim; a page shows it as a label, told by its sign as well as its colour.

    Attributes:
        finding: one of `Finding`.
        note: what it rests on, shown after the label.
        of_these: it is said of the models at hand, and of no others.
    """

    finding: Finding
    note: str = ""
    of_these: bool = False

    @property
    def label(self) -> str:
        """The finding in words."""
        decided = self.finding in ("holds", "does not hold", "mixed")
        return self.finding + ", of these models" * (self.of_these and decided)

    def __str__(self) -> str:
        return f"{self.label}: {self.note}" if self.note else self.label


@dataclass(frozen=True)
class Column:
    """A column's header, and how its numbers are written.

    Attributes:
        form: of its numbers.
        sized: estimates say what they rest on, `(3 seeds, n=96)`, or why they have no value.
    """

    header: str
    form: NumberForm = GENERAL
    sized: bool = False

    def cell(self, value: Any) -> str:
        """A value as text."""
        text = shown(value, self.form)
        if not self.sized or not isinstance(value, Estimate):
            return text
        if value.value is None:
            return value.note or text
        if not sizes(value):
            return text
        return f"{text[:-1]}, {sizes(value)})" if text.endswith(")") else f"{text} ({sizes(value)})"


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

    @classmethod
    def of(cls, title: str, headers: Sequence[str | Column], rows: Iterable[Sequence[Any]], notes: str = "") -> Table:
        """A table whose headers are its fields, from rows of as many cells; two headers must not be alike.

        Raises:
            UserError: a row has another number of cells.
        """
        columns = {each.header if isinstance(each, Column) else each: each for each in headers}
        fields = list(columns)
        filled = []
        for number, row in enumerate(rows, start=1):
            if len(row) != len(headers):
                raise UserError(f"table {title!r}: row {number} has {len(row)} cells for {len(headers)} headers.")
            filled.append(dict(zip(fields, row, strict=True)))
        return cls(title, columns, filled, notes)

    @property
    def headers(self) -> list[str]:
        """The columns' headers."""
        return [each.header for each in self._columns().values()]

    def _columns(self) -> dict[str, Column]:
        return {key: each if isinstance(each, Column) else Column(each) for key, each in self.columns.items()}

    def cells(self) -> list[list[str]]:
        """The rows as text."""
        return [[column.cell(row.get(key)) for key, column in self._columns().items()] for row in self.rows]

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
        names = list(dict.fromkeys(key for cells in flat for key in cells)) or list(self.columns)
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

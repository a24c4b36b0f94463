"""What a report's page is made of: sections of paragraphs, tables, figures, folds and views of single questions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from robust_unlearning.report.flips import Flips

Finding = Literal["holds", "does not hold", "cannot be told", "not run"]
"""What became of a claim."""


@dataclass(frozen=True)
class Verdict:
    """A table's cell that says what became of a claim: a label, which a sign tells apart as well as its colour.

    Attributes:
        finding: one of `Finding`.
        note: what it rests on, shown after the label.
    """

    finding: Finding
    note: str = ""

    def __str__(self) -> str:
        return f"{self.finding}: {self.note}" if self.note else self.finding


@dataclass(frozen=True)
class Table:
    """Rows under headers; the first column names the rows. The page offers it as CSV too.

    Attributes:
        caption: what it shows; above it.
        headers: one a column.
        rows: cells as text or as `Verdict`, as many a row as there are headers.
        notes: how to read it; below it.
    """

    caption: str
    headers: Sequence[str]
    rows: Sequence[Sequence[str | Verdict]]
    notes: str = ""


@dataclass(frozen=True)
class Figure:
    """A figure that `figures.save_figure` wrote: it is shown as SVG, its PNG and its numbers are a click away."""

    title: str
    caption: str
    svg: Path
    png: Path
    csv: Path

    @classmethod
    def saved(cls, title: str, caption: str, png: Path) -> Figure:
        """The figure whose PNG lies at `png`, with the files beside it."""
        return cls(title, caption, png.with_suffix(".svg"), png, png.with_suffix(".csv"))


@dataclass(frozen=True)
class Details:
    """Blocks behind a summary that opens them; on paper they are open."""

    summary: str
    blocks: Sequence[Block]


@dataclass(frozen=True)
class Section:
    """A part of the page, with a place in its table of contents.

    Attributes:
        id: the fragment of its address, unique in the page: letters, digits, `-`.
        title: its heading.
        blocks: paragraphs (plain text; `backticks` set code), tables, figures, folds, views of questions.
        paper: what of the paper it reproduces, such as 'Table 1, Figure 4'.
    """

    id: str
    title: str
    blocks: Sequence[Block]
    paper: str = ""


Block = str | Table | Figure | Details | Flips


@dataclass(frozen=True)
class Page:
    """A report: its title, what it says in a few sentences, and its sections."""

    title: str
    lead: str
    sections: Sequence[Section]

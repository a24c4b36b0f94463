"""What an analysis found: as JSON, CSV and Markdown on disk, as a figure, and as text for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from robust_unlearning import files
from robust_unlearning.errors import UserError
from robust_unlearning.report.figures import Series, trade_off
from robust_unlearning.report.tables import Table
from robust_unlearning.stats.estimates import Estimate

FOLDER = "analysis"
"""Where results lie inside the output folder."""


@dataclass(frozen=True)
class Panel:
    """A panel of a figure: what its y axis shows, and lines of (x, y) by label."""

    y_label: str
    lines: Mapping[str, Sequence[tuple[float, Estimate]]]


@dataclass(frozen=True)
class Report:
    """An analysis, ready to be written.

    Attributes:
        name: of its files.
        title: its heading.
        about: settings, JSON-able.
        notes: how to read the tables, and what they say.
        tables: the numbers.
        panels: of its figure, which has none where this is empty.
        x_label: what the figure's x axis shows.
    """

    name: str
    title: str
    about: Mapping[str, Any]
    notes: Sequence[str]
    tables: Sequence[Table]
    panels: Sequence[Panel] = ()
    x_label: str = ""


def side(difference: Estimate) -> str:
    """What an interval of a difference says: lower, higher, the same (to the bit), or inconclusive."""
    low, high = difference.low, difference.high
    if low is None or high is None or low < 0 < high:
        return "inconclusive"
    return "the same" if low == high == 0 else "lower" if high <= 0 else "higher"


def write(report: Report, out: Path) -> str:
    """Write `NAME.json`, `NAME-KEY.csv` a table, `NAME.md` and (with matplotlib) the figure into `out`/analysis.

    The figure is `NAME.png`, `NAME.svg` and its numbers `NAME.csv`.

    Returns:
        The text for the terminal.
    """
    folder = out / FOLDER
    numbers = {table.key: table.as_json() for table in report.tables}
    files.write_json(folder / f"{report.name}.json", {"about": report.about, "tables": numbers})
    for table in report.tables:
        files.write_text(folder / f"{report.name}-{table.key}.csv", table.csv())
    notes = list(report.notes)
    figure = ""
    if report.panels:
        try:
            _draw(report, folder / f"{report.name}.png")
            figure = f"![{report.title}]({report.name}.png)"
        except UserError as error:
            notes.append(f"No figure: {error}")
    sections = [f"# {report.title}", *notes]
    text = [report.title]
    for table in report.tables:
        sections += [f"## {table.title}", table.markdown()]
        text += [table.title, table.text()]
    files.write_text(folder / f"{report.name}.md", "\n\n".join([*sections, figure]).rstrip() + "\n")
    drawn = ", .png, .svg, .csv" if figure else ""
    tables = ", ".join(f"-{table.key}.csv" for table in report.tables)
    return "\n\n".join([*text, *notes, f"written: {folder / report.name}.json, .md{drawn}, {tables}"])


def _draw(report: Report, path: Path) -> None:
    panels = [
        (
            panel.y_label,
            [
                Series(label, [(Estimate(x), y) for x, y in points], "o", joined=True)
                for label, points in panel.lines.items()
            ],
        )
        for panel in report.panels
    ]
    trade_off(panels, report.x_label, f"{report.title} (95 % intervals)", path)

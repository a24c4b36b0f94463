"""Figures, drawn with matplotlib, which is imported only here and only when a figure is drawn.

Every figure ends in `save_figure`: a PNG to look at, an SVG for pages and papers, and its numbers as CSV, side by side.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import wrap
from typing import Any

from robust_unlearning import files
from robust_unlearning.errors import UserError
from robust_unlearning.report.tables import csv_table
from robust_unlearning.stats.estimates import Estimate

# Okabe and Ito's colours, which people of every colour vision tell apart
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
ACROSS = 3
"""Panels in a row."""
FORMATS = (".png", ".svg", ".csv")
"""Endings of the files of a figure."""


@dataclass(frozen=True)
class Series:
    """Points of one kind: where they lie, with intervals, and whether a line joins them in order."""

    label: str
    points: Sequence[tuple[Estimate, Estimate]]
    marker: str = "o"
    joined: bool = False
    notes: Sequence[str] = ()


def new_figure(columns: int = 1, rows: int = 1, size: tuple[float, float] = (5.6, 4.4)) -> tuple[Any, Any]:
    """An empty matplotlib figure and its axes [rows, columns]; `size` is of one panel, in inches.

    Raises:
        UserError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise UserError("figures need matplotlib: pip install 'robust-unlearning[plot]'") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot.subplots(rows, columns, figsize=(size[0] * columns, size[1] * rows), squeeze=False)


def save_figure(figure: Any, png: Path, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Write a figure as PNG and SVG and its numbers as CSV, all with the stem of `png`, and close it.

    The same figure gives the same bytes. The SVG keeps its text as text, to be searched, read aloud and copied.

    Args:
        figure: of `new_figure`.
        png: where the PNG goes, such as `out/sweep.png`; `sweep.svg` and `sweep.csv` lie beside it.
        columns: the CSV's header.
        rows: what is drawn, a row a point or bar; None becomes an empty cell.
    """
    import matplotlib
    from matplotlib import pyplot

    with matplotlib.rc_context({"svg.hashsalt": png.stem, "svg.fonttype": "none"}):
        with files.replacing(png) as temporary:
            figure.savefig(temporary, format="png", dpi=150)
        with files.replacing(png.with_suffix(".svg")) as temporary:
            figure.savefig(temporary, format="svg", metadata={"Date": None})
    pyplot.close(figure)
    files.write_text(png.with_suffix(".csv"), csv_table(columns, rows))


def trade_off(
    panels: Sequence[tuple[str, Sequence[Series]]], x_label: str, title: str, path: Path, ticks: Sequence[str] = ()
) -> None:
    """Panels, three in a row: x forgetting, y robustness, 95 % intervals as bars; see `save_figure`.

    Args:
        path: of the PNG.
        ticks: what x = 0, 1, 2, … stand for, where they are places rather than numbers.

    Raises:
        UserError: matplotlib is not installed.
    """
    columns = min(len(panels), ACROSS)
    figure, grid = new_figure(columns, -(-len(panels) // columns))
    axes = list(grid.flat)
    for spare in axes[len(panels) :]:
        spare.remove()
    for axis, (y_label, series) in zip(axes, panels, strict=False):
        for index, each in enumerate(series):
            xs, ys = ([point[side] for point in each.points] for side in (0, 1))
            axis.errorbar(
                [x.value for x in xs],
                [y.value for y in ys],
                xerr=_bars(xs),
                yerr=_bars(ys),
                fmt=each.marker,
                linestyle="-" if each.joined else "none",
                color=COLOURS[index % len(COLOURS)],
                label=each.label,
                markersize=7,
                capsize=3,
                elinewidth=1,
                alpha=0.9,
            )
            for (x, y), note in zip(each.points, each.notes, strict=False):
                axis.annotate(note, (x.value, y.value), xytext=(6, 6), textcoords="offset points", fontsize=8)
        axis.set_xlabel(_wrapped(x_label, 60))
        axis.set_ylabel(_wrapped(y_label, 44))
        if ticks:
            axis.set_xticks(range(len(ticks)), ticks)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    labels = [[each.label for each in series] for _, series in panels]
    for axis, of_panel in zip(axes, labels, strict=False):
        if axis is axes[0] or of_panel != labels[0]:
            axis.legend(frameon=False, fontsize=9)
    figure.suptitle(_wrapped(title, 64 * columns), fontsize=11)
    figure.tight_layout()
    save_figure(figure, path, NUMBERS, _numbers(panels, ticks))


NUMBERS = ("panel", "series", "label", "x", "x_low", "x_high", "y", "y_low", "y_high", "n", "seeds")
"""Columns of a trade-off's CSV; `label` is what stands beside the point or below it, n and seeds are those of y."""


def _numbers(panels: Sequence[tuple[str, Sequence[Series]]], ticks: Sequence[str]) -> Iterable[list[Any]]:
    """A row for each point of a trade-off."""
    for panel, series in panels:
        for each in series:
            for index, (x, y) in enumerate(each.points):
                label = each.notes[index] if index < len(each.notes) else ticks[int(x.value or 0)] if ticks else ""
                spans = [x.value, x.low, x.high, y.value, y.low, y.high]
                yield [panel.replace("\n", " "), each.label, label, *spans, y.n or None, y.seeds]


def _wrapped(label: str, width: int) -> str:
    """A label over as few lines of `width` characters as hold it, of like length: a panel's edge does not cut it."""
    lines = []
    for line in label.splitlines():
        count = len(wrap(line, width))
        lines += next(parts for each in range(1, width + 1) if len(parts := wrap(line, each)) == count)
    return "\n".join(lines)


def _bars(values: Sequence[Estimate]) -> list[list[float]]:
    """Lengths of the error bars below and above; 0 where there is no interval."""
    below = [max(0.0, (each.value or 0.0) - each.low) if each.low is not None else 0.0 for each in values]
    above = [max(0.0, each.high - (each.value or 0.0)) if each.high is not None else 0.0 for each in values]
    return [below, above]

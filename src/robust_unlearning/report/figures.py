"""Figures, drawn with matplotlib, which is imported only here and only when a figure is drawn."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from robust_unlearning import files
from robust_unlearning.errors import UserError
from robust_unlearning.scores import Estimate

# Okabe and Ito's colours, which people of every colour vision tell apart
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")


@dataclass(frozen=True)
class Series:
    """Points of one kind: where they lie, with intervals, and whether a line joins them in order."""

    label: str
    points: Sequence[tuple[Estimate, Estimate]]
    marker: str = "o"
    joined: bool = False
    notes: Sequence[str] = ()


def trade_off(
    panels: Sequence[tuple[str, Sequence[Series]]], x_label: str, title: str, path: Path, ticks: Sequence[str] = ()
) -> None:
    """One panel beside the other: x forgetting, y robustness, 95 % intervals as bars; written as a PNG.

    Args:
        ticks: what x = 0, 1, 2, … stand for, where they are places rather than numbers.

    Raises:
        UserError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise UserError("figures need matplotlib: pip install 'robust-unlearning[plot]'") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(panels), figsize=(6.4 * len(panels), 4.6), squeeze=False)
    for axis, (y_label, series) in zip(axes[0], panels, strict=True):
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
        axis.set_xlabel(x_label)
        axis.set_ylabel(y_label)
        if ticks:
            axis.set_xticks(range(len(ticks)), ticks)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].legend(frameon=False, fontsize=9)
    figure.suptitle(title, fontsize=11)
    figure.tight_layout()
    with files.replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150)
    pyplot.close(figure)


def _bars(values: Sequence[Estimate]) -> list[list[float]]:
    """Lengths of the error bars below and above; 0 where there is no interval."""
    below, above = [], []
    for each in values:
        value = each.value or 0.0
        below.append(max(0.0, value - each.low) if each.low is not None else 0.0)
        above.append(max(0.0, each.high - value) if each.high is not None else 0.0)
    return [below, above]


def save_figure(figure: Any, png: Path, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Write a figure as PNG and SVG and its numbers as CSV, all with the stem of `png`.

    Args:
        figure: a matplotlib figure, closed afterwards.
        png: where the PNG goes, such as `out/sweep.png`; `sweep.svg` and `sweep.csv` lie beside it.
        columns: the CSV's header.
        rows: what is drawn, a row a point or bar; None becomes an empty cell.
    """

"""An evaluation's scores as text for the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from robust_unlearning.run.card import counted
from robust_unlearning.stats.estimates import Estimate
from robust_unlearning.stats.format import NATS, NumberForm, interval, shown

SHARE, TEXT = NumberForm(".3f", ".3f"), NumberForm(".4f", ".4f")


def format_scores(scores: Mapping[str, Mapping[str, Any]]) -> str:
    """An evaluation's scores as aligned text for the terminal: one table of questions, one of texts."""
    questions = [("task", "acc", "95 % interval", "acc_norm", "excess harm, nats/token", "scored", "n")]
    texts = [("text", "nats/token", "95 % interval", "perplexity", "tokens", "n")]
    others = [("task", "metric", "value", "n")]
    for task, row in scores.items():
        if "acc" in row:
            acc = shown(row["acc"], SHARE) + ("" if row["stderr"] is None else f" ± {shown(row['stderr'], SHARE)}")
            harm = shown(Estimate(**row["excess_harm"]), NATS) if row.get("excess_harm") else ""
            span, norm = interval(row["low"], row["high"], SHARE), shown(row.get("acc_norm"), SHARE)
            questions.append((task, acc, span, norm, harm, row.get("scored", ""), counted(row)))
        elif "nats_per_token" in row:
            nats, span = shown(row["nats_per_token"], TEXT), interval(row["low"], row["high"], TEXT)
            texts.append((task, nats, span, f"{row['perplexity']:.2f}", str(row["tokens"]), str(row["n"])))
        else:
            others += [(task, *metric, counted(row)) for metric in _metrics(row)]
    return "\n\n".join(_aligned(_filled(table)) for table in (questions, texts, others) if len(table) > 1)


def _metrics(row: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(metric, value ± standard error) of a task that has no accuracy."""
    for name, value in row.items():
        if isinstance(value, float) and "_stderr" not in name:
            metric, _, kind = name.partition(",")
            stderr = row.get(f"{metric}_stderr,{kind}" if kind else f"{metric}_stderr")
            yield name, f"{value:.4g}" + ("" if stderr is None else f" ± {stderr:.2g}")


def _filled(table: Sequence[Sequence[str]]) -> list[list[str]]:
    """The table without columns that are empty below their heading."""
    columns = [column for column in zip(*table, strict=True) if any(column[1:])]
    return [list(row) for row in zip(*columns, strict=True)]


def _aligned(table: Sequence[Sequence[str]]) -> str:
    """Columns two spaces apart, the first to the left and the others to the right."""
    first, *widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = []
    for name, *cells in table:
        padded = [cell.rjust(width) for cell, width in zip(cells, widths, strict=True)]
        lines.append("  ".join([name.ljust(first), *padded]).rstrip())
    return "\n".join(lines)

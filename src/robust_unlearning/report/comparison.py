"""A comparison as text for the terminal or as Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from textwrap import shorten
from typing import Any

from robust_unlearning.data.questions import LETTERS
from robust_unlearning.report.tables import Column, Table
from robust_unlearning.results.compare import AgainstReference, ComparedRow, Comparison, Flip
from robust_unlearning.stats.format import NATS, POINTS, NumberForm, shown
from robust_unlearning.stats.paired import SIGN_FLIP

RATE, ERROR = NumberForm(".1f", ".1f", 100.0), NumberForm(".2f", scale=100.0)
"""Accuracies and rates in %, standard errors in points."""
FIRST = {"task": "task", "model": "model", "n": "n"}
"""The columns that every table begins with."""


def as_text(comparison: Comparison) -> str:
    """Aligned tables; a task's name stands in its first row only."""
    parts = [_heading(comparison)]
    for table in _tables(comparison):
        before = [None, *(row["task"] for row in table.rows)]
        rows = [
            {**row, "task": "" if row["task"] == last else row["task"]}
            for row, last in zip(table.rows, before, strict=False)
        ]
        parts += [f"{table.title}\n{replace(table, rows=rows).text()}", table.notes]
    return "\n\n".join(part for part in parts if part)


def as_markdown(comparison: Comparison) -> str:
    """The same tables in Markdown."""
    parts = ["# Comparison", _heading(comparison)]
    for table in _tables(comparison):
        parts += [f"## {table.title}", table.markdown(), *table.notes.splitlines()]
    return "\n\n".join(parts) + "\n"


def _heading(comparison: Comparison) -> str:
    models = []
    for name, folders in comparison.models.items():
        seeds = f"{len(folders)} seeds: " if len(folders) > 1 else ""
        models.append(f"{name} ({seeds}{', '.join(folders)})")
    lines = [f"Reference: {comparison.reference}. Models: {'; '.join(models)}."]
    left_out = {row.task.name: row.task.left_out for row in comparison.rows if row.task.left_out}
    if left_out:
        counts = ", ".join(f"{count} of {task}" for task, count in left_out.items())
        lines.append(f"Left out, as not every model was asked them: {counts}.")
    if comparison.missing:
        lines.append(f"Tasks left out, as not every model has answered them: {', '.join(comparison.missing)}.")
    return "\n".join(lines)


def _tables(comparison: Comparison) -> list[Table]:
    tables = [_accuracies(comparison), _rates(comparison)]
    if any(len(folders) > 1 for folders in comparison.models.values()):
        tables.append(_spreads(comparison))
    if comparison.flips:
        tables.append(_flipped(comparison.flips, comparison.reference))
    return tables


def _first(comparison: Comparison, row: ComparedRow) -> dict[str, Any]:
    """Task with its better direction, model, questions."""
    arrow = "↓" if comparison.forgets(row.task) else "↑"
    return {"task": f"{row.task.name} {arrow}", "model": row.model, "n": len(row.task.keys)}


def _accuracies(comparison: Comparison) -> Table:
    columns: dict[str, str | Column] = {
        **FIRST, "accuracy": Column("accuracy, %", RATE), "difference": Column("difference, points", POINTS),
        "lost": "b lost", "won": "c won", "p": "p", "p_holm": "Holm p", "verdict": "reads as",
    }  # fmt: skip
    rows = []
    for row in comparison.rows:
        cells = _first(comparison, row) | {"accuracy": row.accuracy}
        if row.against is not None:
            test = row.against.test
            cells |= {"difference": row.against.difference, "verdict": row.against.verdict}
            cells |= {"lost": test.lost, "won": test.won, "p": _p(test.p), "p_holm": _p(row.against.p_holm)}
        rows.append(cells)
    tests = sum(row.against is not None for row in comparison.rows)
    level, name = comparison.level, comparison.reference
    notes = [
        f"↑ more right answers are better, ↓ fewer are (to be forgotten). {100 * level:g} % intervals: accuracy "
        "Wilson, over several seeds a bootstrap of seeds and questions; differences a paired bootstrap, which has no "
        "width where no answer changed: read b, c and n there.",
        f"b: questions that {name} answers and the model does not; c: the other way round. p: McNemar's exact test. "
        f"Holm p: adjusted for all {tests} tests of the table. better, worse: Holm p below {1 - level:.2g} and 0 "
        "outside the interval; else open.",
    ]
    if any(row.against and row.against.test.name == SIGN_FLIP for row in comparison.rows):
        notes.append(
            "Where a side has several seeds, p is of an exact sign-flip test of the mean over seeds, not of McNemar's; "
            "b and c count questions on which that mean fell and rose. It takes the seeds as they are, while the "
            "interval draws seeds too."
        )
    return Table("Right answers", columns, rows, "\n".join(notes))


def _rates(comparison: Comparison) -> Table:
    columns: dict[str, str | Column] = {
        **FIRST, "reduction": Column("reduction, %", RATE), "recovery": Column("recovery, %", RATE),
        "logp": Column("log p, nats", NATS), "logp_per_token": Column("log p, nats/token", NATS),
        "added_harm": "added harm, nats/token",
    }  # fmt: skip
    if comparison.unlearned is None:
        del columns["recovery"]
    tokens = [answers.tokens for row in comparison.rows for answers in row.task.models.values()]
    if not any(counts is not None and (counts != 1).any() for counts in tokens):
        del columns["logp_per_token"]
    rows = [
        {**_first(comparison, row), **vars(row.against), "added_harm": _with_n(row.against)}
        for row in comparison.rows
        if row.against is not None
    ]
    notes = [
        f"Reduction: share of {comparison.reference}'s accuracy that the model lost; below 0 it gained. log p: change "
        "of log p of the right answer. Added harm: log p of the right answer under a forget-token less that under a "
        f"control word, less the same in {comparison.reference}; below 0 the model suffers more. All paired, "
        f"{100 * comparison.level:g} % intervals.",
    ]
    if comparison.unlearned is not None:
        notes.append(
            f"Recovery: share of what {comparison.unlearned} lost against {comparison.reference} that the model has "
            "again (--unlearned NAME takes another model)."
        )
    rates = [rate for row in comparison.rows if row.against for rate in (row.against.reduction, row.against.recovery)]
    reasons = dict.fromkeys(rate.note for rate in rates if rate is not None and rate.value is None)
    notes += [f"undefined: {reason}." for reason in reasons]
    if any("unbounded" in rate.note for rate in rates if rate is not None):
        notes.append("no bound: the rate is undefined in more than 5 % of the resamples, so it has no interval.")
    return Table("Rates, log-probabilities, harm", columns, rows, "\n".join(notes))


def _spreads(comparison: Comparison) -> Table:
    accuracy = NumberForm(".1f", scale=100.0)
    columns: dict[str, str | Column] = {
        **FIRST, "seeds": "seeds", "accuracy": Column("accuracy, %", accuracy),
        "lowest": Column("lowest seed", accuracy), "highest": Column("highest seed", accuracy),
        "by_question": Column("SE by question", ERROR), "by_seed": Column("SE by seed", ERROR),
        "difference_by_question": Column("difference: SE by question", ERROR),
        "difference_by_seed": Column("SE by seed", ERROR),
    }  # fmt: skip
    rows = []
    for row in comparison.rows:
        if len(row.by_seed) > 1:
            seeds = {"seeds": len(row.by_seed), "lowest": min(row.by_seed), "highest": max(row.by_seed)}
            cells = _first(comparison, row) | seeds | {"accuracy": row.accuracy.value or 0.0, **vars(row.spread)}
            if row.against:
                cells |= {f"difference_{key}": error for key, error in vars(row.against.spread).items()}
            rows.append(cells)
    paired = ", ".join(map(str, comparison.paired_seeds))
    drawn = f"drawn together: runs with equal seeds ({paired}) are paired" if paired else "drawn for each model apart"
    notes = (
        "Standard errors in points. By question: the seeds as they are, other questions. By seed: the questions as "
        "they are, other seeds. With S seeds, intervals contain about (S - 1) / S of the variance between seeds. "
        f"Seeds are {drawn}."
    )
    return Table("Spread over seeds", columns, rows, notes)


def _flipped(flips: Sequence[Flip], reference: str) -> Table:
    columns: Mapping[str, str | Column] = {
        "task": "task", "model": "model", "id": "question", "token": "token", "right": "right",
        "reference_said": f"{reference} said", "model_said": "model said", "logp": Column("log p, nats", NATS),
    }  # fmt: skip
    rows = [
        vars(flip)
        | {"right": _choices([flip.right])}
        | {key: _choices(getattr(flip, key)) for key in ("reference_said", "model_said")}
        for flip in flips
    ]
    notes = (
        "Choices as letters, A the first, one for each seed; where there are several, most of the reference's answered "
        "and at most half of the model's. log p: change for the right answer, mean over seeds; the largest fall first."
    )
    return Table(f"Answered by {reference}, not by the model", columns, rows, notes)


def _choices(choices: Sequence[Any]) -> str:
    """Indices of choices as letters; a free answer's first words."""
    return ", ".join(
        LETTERS[choice]
        if isinstance(choice, int) and 0 <= choice < len(LETTERS)
        else shorten(str(choice), 40, placeholder=" …")
        for choice in choices
    )


def _with_n(against: AgainstReference) -> str:
    """Added harm, with its own n where fewer questions have a control form than are compared."""
    harm = against.added_harm
    fewer = harm is not None and harm.n != against.difference.n
    return shown(harm, NATS) + (f" (n={harm.n})" if harm is not None and fewer else "")


def _p(p: float) -> str:
    return f"{round(p, 12):.2g}" if p >= 0.001 else f"{p:.0e}"  # a tie such as 0.125 does not hang on its last bit

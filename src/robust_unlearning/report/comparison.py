"""A comparison as text for the terminal, as Markdown or as a page: groups first, their subjects as detail."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from textwrap import shorten
from typing import Any

from robust_unlearning.data.questions import LETTERS
from robust_unlearning.report.tables import Column, Table
from robust_unlearning.results.compare import Comparison
from robust_unlearning.results.compared_rows import AgainstReference, ComparedRow, Flip
from robust_unlearning.stats.factors import FEWEST_SEEDS
from robust_unlearning.stats.format import NATS, POINTS, NumberForm, shown
from robust_unlearning.stats.paired import MCNEMAR, SIGN_FLIP

RATE, ERROR = NumberForm(".1f", ".1f", 100.0), NumberForm(".2f", scale=100.0)
"""Accuracies and rates in %, standard errors in points."""
FIRST = {"task": "task", "model": "model", "n": "n"}
"""The columns that every table begins with."""
TITLES = ("Right answers", "Rates, log-probabilities, harm")


def as_text(comparison: Comparison, subjects: bool = False) -> str:
    """Aligned tables; a task's name stands in its first row only. With `subjects` theirs follow."""
    parts = [_heading(comparison)]
    for table in _tables(comparison) + (_details(comparison) if subjects else []):
        before = [None, *(row["task"] for row in table.rows)]
        rows = [
            {**row, "task": "" if row["task"] == last else row["task"]}
            for row, last in zip(table.rows, before, strict=False)
        ]
        parts += [f"{table.title}\n{replace(table, rows=rows).text()}", table.notes]
    if comparison.subjects:
        told = "" if subjects else " --subjects lists them all; so do --out FILE.md, .html and .json."
        parts.append(_differing(comparison) + told)
    return "\n\n".join(part for part in parts if part)


def as_markdown(comparison: Comparison) -> str:
    """The same tables in Markdown, the subjects' behind a fold."""

    def block(table: Table, heading: str = "##") -> list[str]:
        return [f"{heading} {table.title}", table.markdown(), *table.notes.splitlines()]

    parts = ["# Comparison", _heading(comparison)]
    parts += [part for table in _tables(comparison) for part in block(table)]
    if comparison.subjects:
        parts += ["## Subjects", _differing(comparison), "<details><summary>Every subject</summary>"]
        parts += [part for table in _details(comparison) for part in block(table, "###")]
        parts.append("</details>")
    return "\n\n".join(parts) + "\n"


def as_page(comparison: Comparison) -> str:
    """The same tables as one HTML page, the subjects' behind a fold."""
    from robust_unlearning.report.page import (
        Details,
        Page,
        Section,
        as_html,
    )  # late: its templates take a while to load

    sections = [Section("tasks", "Tasks", _tables(comparison))]
    if comparison.subjects:
        fold = Details("Every subject", _details(comparison))
        sections.append(Section("subjects", "Subjects", [_differing(comparison), fold]))
    return as_html(Page("Comparison", _heading(comparison), sections))


def _heading(comparison: Comparison) -> str:
    models = []
    for name, folders in comparison.models.items():
        seeds = f"{len(folders)} seeds: " if len(folders) > 1 else ""
        models.append(f"{name} ({seeds}{', '.join(folders)})")
    lines = [f"Reference: {comparison.reference}. Models: {'; '.join(models)}."]
    groups = {row.group.name: row.group for row in comparison.rows if len(row.group.tasks) > 1}
    for group in groups.values():
        share = f"{len(group.tasks)} of {group.of}" if len(group.tasks) < group.of else f"{len(group.tasks)}"
        lines.append(f"{group.name}: the questions of {share} subjects pooled, each question with the same weight.")
    left_out = {row.task.name: row.task.left_out for row in comparison.rows if row.task.left_out}
    if left_out:
        counts = ", ".join(f"{count} of {task}" for task, count in left_out.items())
        lines.append(f"Left out, as not every model was asked them: {counts}.")
    if comparison.missing:
        lines.append(f"Tasks left out, as not every model has answered them: {', '.join(comparison.missing)}.")
    return "\n".join(lines)


def _tables(comparison: Comparison) -> list[Table]:
    """Of the groups, and of single questions."""
    tests = sum(row.against is not None for row in comparison.rows)
    tables = [
        _accuracies(comparison, comparison.rows, f"all {tests} tests of the table"),
        _rates(comparison, comparison.rows),
    ]
    if any(len(folders) > 1 for folders in comparison.models.values()):
        tables.append(_spreads(comparison))
    if comparison.flips:
        tables.append(_flipped(comparison.flips, comparison.reference))
    return tables


def _details(comparison: Comparison) -> list[Table]:
    """Of the subjects of each group."""
    found = []
    for group in dict.fromkeys(row.group.name for row in comparison.subjects):
        rows = [row for row in comparison.subjects if row.group.name == group]
        tests = len({row.task.name for row in rows})
        accuracies = _accuracies(comparison, rows, f"the {tests} subjects of {group}, for each model apart")
        found += [replace(accuracies, title=f"{group}: {TITLES[0].lower()}")]
        found += [replace(_rates(comparison, rows), title=f"{group}: {TITLES[1].lower()}", notes="")]
    return found


def _differing(comparison: Comparison) -> str:
    """Which subjects differ from the reference, model by model, in sentences."""
    lines = []
    for group in dict.fromkeys(row.group.name for row in comparison.subjects):
        rows = [row for row in comparison.subjects if row.group.name == group and row.against]
        of_models = []
        for model in dict.fromkeys(row.model for row in rows):
            own = [(row, row.against.verdict) for row in rows if row.model == model and row.against]
            said = [
                f"{len(names)} {reading} ({', '.join(names)})"
                for reading in ("better", "worse")
                if (names := [row.task.name for row, verdict in own if verdict == reading])
            ]
            of_models.append(f"{model} {' and '.join(said) or 'none either way'} of {len(own)}")
        lines.append(f"Subjects of {group} that differ from {comparison.reference}: {'; '.join(of_models)}.")
    return "\n".join(lines)


def _first(row: ComparedRow) -> dict[str, Any]:
    """Task with its better direction, model, questions."""
    return {"task": f"{row.task.name} {'↓' if row.to_forget else '↑'}", "model": row.model, "n": len(row.task.records)}


def _accuracies(comparison: Comparison, compared: Sequence[ComparedRow], adjusted: str) -> Table:
    columns: dict[str, str | Column] = {
        **FIRST, "accuracy": Column("accuracy, %", RATE), "difference": Column("difference, points", POINTS),
        "lost": "b lost", "won": "c won", "p": "p", "p_holm": "Holm p", "verdict": "reads as",
    }  # fmt: skip
    rows = []
    for row in compared:
        cells = _first(row) | {"accuracy": row.accuracy}
        if row.against is not None:
            test = row.against.test
            cells |= {"difference": row.against.difference, "verdict": _verdict(row.against)}
            cells |= {"lost": test.lost, "won": test.won, "p": _p(row.against.p), "p_holm": _p(row.against.p_holm)}
        rows.append(cells)
    against = [row.against for row in compared if row.against]
    level, name, tests = comparison.level, comparison.reference, {each.test.name for each in against}
    exact = {MCNEMAR: "McNemar's exact test", SIGN_FLIP: "the exact sign-flip test of means over seeds"}
    used = " or, with several seeds on a side, ".join(said for test, said in exact.items() if test in tests)
    seeded = SIGN_FLIP in tests
    notes = [
        f"↑ more right answers are better, ↓ fewer are (to be forgotten). {100 * level:g} % intervals; "
        "what is about one entity, holds one word or comes of one seed counts as one observation.",
        f"b: questions that {name} answers and the model does not; c: the other way round"
        f"{', by the mean over seeds' * seeded}. p: the larger of that of {used}, for the seeds and questions as they "
        f"are, and that of the interval, in which seeds, entities and words vary. Holm p: adjusted for {adjusted}. "
        f"better, worse: Holm p below {1 - level:.2g} and 0 outside the interval; else inconclusive.",
    ]
    if any(each.of_these for each in against):
        notes.append(
            f"of these models: of one of the two there are fewer than {FEWEST_SEEDS} training seeds, so nothing is "
            "said of models trained with other seeds."
        )
    notes += [f"{note}." for note in dict.fromkeys(each.difference.note for each in against) if note]
    return Table(TITLES[0], columns, rows, "\n".join(notes))


def _verdict(against: AgainstReference) -> str:
    decided = against.verdict != "inconclusive"
    return against.verdict + ", of these models" * (against.of_these and decided)


def _rates(comparison: Comparison, compared: Sequence[ComparedRow]) -> Table:
    columns: dict[str, str | Column] = {
        **FIRST, "reduction": Column("reduction, %", RATE), "recovery": Column("recovery, %", RATE),
        "forgotten": Column("forgotten, nats", NATS), "logp": Column("log p, nats", NATS),
        "logp_per_token": Column("log p, nats/token", NATS), "added_harm": "added harm, nats/token",
    }  # fmt: skip
    if comparison.unlearned is None:
        del columns["recovery"]
    tokens = [answers.tokens for row in compared for answers in row.task.models.values()]
    if not any(counts is not None and (counts != 1).any() for counts in tokens):
        del columns["logp_per_token"]
    rows = [
        {
            **_first(row),
            **vars(row.against),
            "forgotten": row.against.forgotten or comparison.forgotten,
            "added_harm": _with_n(row.against),
        }
        for row in compared
        if row.against is not None
    ]
    name = comparison.reference
    notes = [
        f"Reduction: share of {name}'s accuracy that the model lost; below 0 it gained. Forgotten: log p of the right "
        "answer among those offered, on all questions to be forgotten as they are (no word put in), "
        f"{name}'s less the model's: one number a model. A model that has forgotten less is less fragile, so read no "
        "reduction or recovery without it. log p: change "
        "of log p of the right answer. Added harm: log p of the right answer under a forget-token less that under a "
        f"control word, less the same in {name}; below 0 the model suffers more. All paired, "
        f"{100 * comparison.level:g} % intervals.",
    ]
    if comparison.forgotten:
        why = "no such task was asked of every model (--forget names them)"
        notes.append(f"{comparison.forgotten}: {why if comparison.forgotten == 'not asked' else 'log p is not there'}.")
    if comparison.unlearned is not None:
        notes.append(
            f"Recovery: share of what {comparison.unlearned} lost against {name} that the model has "
            "again (--unlearned NAME takes another model)."
        )
    rates = [rate for row in compared if row.against for rate in (row.against.reduction, row.against.recovery)]
    reasons = dict.fromkeys(rate.note for rate in rates if rate is not None and rate.value is None)
    notes += [f"undefined: {reason}." for reason in reasons]
    notes += [f"{note}." for note in dict.fromkeys(each.note for each in rates if each and each.note[:8] == "no bound")]
    return Table(TITLES[1], columns, rows, "\n".join(notes))


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
            cells = _first(row) | seeds | {"accuracy": row.accuracy.value or 0.0, **vars(row.spread)}
            if row.against:
                cells |= {f"difference_{key}": error for key, error in vars(row.against.spread).items()}
            rows.append(cells)
    paired = ", ".join(map(str, comparison.paired_seeds))
    drawn = f"runs with equal seeds ({paired}) are paired" if paired else "seeds of two models are independent"
    notes = (
        "Standard errors in points. By question: the seeds as they are, other questions. By seed: the questions as "
        f"they are, other seeds. With {FEWEST_SEEDS} seeds or more an interval counts both; {drawn}."
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

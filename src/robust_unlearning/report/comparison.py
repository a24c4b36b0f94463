"""A comparison as text for the terminal or as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from textwrap import shorten
from typing import Any

from robust_unlearning.data.questions import LETTERS
from robust_unlearning.report.tables import markdown_table, text_table
from robust_unlearning.results.compare import Against, Comparison, Flip, Row
from robust_unlearning.stats.estimates import Estimate
from robust_unlearning.stats.paired import SIGN_FLIP

Section = tuple[str, tuple[str, ...], list[list[str]], list[str]]  # title, headers, rows, what one must know


def as_text(comparison: Comparison) -> str:
    """Aligned tables; a task's name stands in its first row only."""
    parts = [_heading(comparison)]
    for title, headers, rows, notes in _sections(comparison):
        before = [None, *(row[0] for row in rows)]
        shown = [["" if row[0] == last else row[0], *row[1:]] for row, last in zip(rows, before, strict=False)]
        parts += [f"{title}\n{text_table(headers, shown)}", "\n".join(notes)]
    return "\n\n".join(part for part in parts if part)


def as_markdown(comparison: Comparison) -> str:
    """The same tables in Markdown."""
    parts = ["# Comparison", _heading(comparison)]
    for title, headers, rows, notes in _sections(comparison):
        escaped = [[cell.replace("|", "\\|") for cell in row] for row in rows]
        parts += [f"## {title}", markdown_table(headers, escaped), *notes]
    return "\n\n".join(parts) + "\n"


def _heading(comparison: Comparison) -> str:
    models = [
        f"{name} ({', '.join(folders)})"
        if len(folders) == 1
        else f"{name} ({len(folders)} seeds: {', '.join(folders)})"
        for name, folders in comparison.models.items()
    ]
    lines = [f"Reference: {comparison.reference}. Models: {'; '.join(models)}."]
    left_out = {row.task.name: row.task.left_out for row in comparison.rows if row.task.left_out}
    if left_out:
        counts = ", ".join(f"{count} of {task}" for task, count in left_out.items())
        lines.append(f"Left out, as not every model was asked them: {counts}.")
    if comparison.missing:
        lines.append(f"Tasks left out, as not every model has answered them: {', '.join(comparison.missing)}.")
    return "\n".join(lines)


def _sections(comparison: Comparison) -> list[Section]:
    sections = [_accuracies(comparison), _rates(comparison)]
    if any(len(folders) > 1 for folders in comparison.models.values()):
        sections.append(_spreads(comparison))
    if comparison.flips:
        sections.append(_flipped(comparison.flips, comparison.reference))
    return sections


def _first(comparison: Comparison, row: Row) -> list[str]:
    """Task with its better direction, model, questions."""
    arrow = "↓" if comparison.forgets(row.task) else "↑"
    return [f"{row.task.name} {arrow}", row.model, str(len(row.task.keys))]


def _accuracies(comparison: Comparison) -> Section:
    headers = ("task", "model", "n", "accuracy, %", "difference, points", "b lost", "c won", "p", "Holm p", "reads as")
    rows, tests = [], 0
    for row in comparison.rows:
        cells = [""] * 6
        if row.against is not None:
            test = row.against.test
            counts = [str(test.lost), str(test.won), _p(test.p), _p(row.against.p_holm)]
            cells = [_signed(row.against.difference, 100, 1), *counts, row.against.verdict]
            tests += 1
        rows.append([*_first(comparison, row), _number(row.accuracy, 100, 1), *cells])
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
    return "Right answers", headers, rows, notes


def _rates(comparison: Comparison) -> Section:
    per_token = any(
        (answers.tokens != 1).any()
        for row in comparison.rows
        for answers in row.task.models.values()
        if answers.tokens is not None
    )
    columns = {
        "reduction, %": lambda against: _number(against.reduction, 100, 1),
        "recovery, %": lambda against: _number(against.recovery, 100, 1),
        "log p, nats": lambda against: _signed(against.logp, 1, 3),
        "log p, nats/token": lambda against: _signed(against.logp_per_token, 1, 3),
        "added harm, nats/token": lambda against: _with_n(against),
    }
    if comparison.unlearned is None:
        del columns["recovery, %"]
    if not per_token:
        del columns["log p, nats/token"]
    rows = [
        [*_first(comparison, row), *(cell(row.against) for cell in columns.values())]
        for row in comparison.rows
        if row.against is not None
    ]
    name = comparison.reference
    notes = [
        f"Reduction: share of {name}'s accuracy that the model lost; below 0 it gained. log p: change of log p of the "
        "right answer. Added harm: log p of the right answer under a forget-token less that under a control word, less "
        f"the same in {name}; below 0 the model suffers more. All paired, {100 * comparison.level:g} % "
        "intervals.",
    ]
    if comparison.unlearned is not None:
        notes.append(
            f"Recovery: share of what {comparison.unlearned} lost against {name} that the model has again "
            "(--unlearned NAME takes another model)."
        )
    rates = [rate for row in comparison.rows if row.against for rate in (row.against.reduction, row.against.recovery)]
    reasons = dict.fromkeys(rate.note for rate in rates if rate is not None and rate.value is None)
    notes += [f"undefined: {reason}." for reason in reasons]
    if any("unbounded" in rate.note for rate in rates if rate is not None):
        notes.append("no bound: the rate is undefined in more than 5 % of the resamples, so it has no interval.")
    return "Rates, log-probabilities, harm", ("task", "model", "n", *columns), rows, notes


def _spreads(comparison: Comparison) -> Section:
    headers = (
        "task", "model", "n", "seeds", "accuracy, %", "lowest seed", "highest seed", "SE by question", "SE by seed",
        "difference: SE by question", "SE by seed",
    )  # fmt: skip
    rows = []
    for row in comparison.rows:
        if len(row.by_seed) > 1:
            accuracy, lowest, highest = (
                f"{100 * each:.1f}" for each in (row.accuracy.value or 0.0, min(row.by_seed), max(row.by_seed))
            )
            spreads = [row.spread, *([row.against.spread] if row.against else [])]
            errors = [_points(each) for spread in spreads for each in (spread.by_question, spread.by_seed)]
            errors += [""] * (4 - len(errors))
            rows.append([*_first(comparison, row), str(len(row.by_seed)), accuracy, lowest, highest, *errors])
    paired = ", ".join(map(str, comparison.paired_seeds))
    drawn = f"drawn together: runs with equal seeds ({paired}) are paired" if paired else "drawn for each model apart"
    notes = [
        "Standard errors in points. By question: the seeds as they are, other questions. By seed: the questions as "
        "they are, other seeds. With S seeds, intervals contain about (S - 1) / S of the variance between seeds. "
        f"Seeds are {drawn}."
    ]
    return "Spread over seeds", headers, rows, notes


def _flipped(flips: Sequence[Flip], reference: str) -> Section:
    headers = ("task", "model", "question", "token", "right", f"{reference} said", "model said", "log p, nats")
    rows = [
        [
            flip.task,
            flip.model,
            flip.id,
            flip.token,
            *(_choices(each) for each in ([flip.right], flip.reference_said, flip.model_said)),
            "" if flip.logp is None else f"{flip.logp:+.3f}",
        ]
        for flip in flips
    ]
    notes = [
        "Choices as letters, A the first, one for each seed; where there are several, most of the reference's answered "
        "and at most half of the model's. log p: change for the right answer, mean over seeds; the largest fall first."
    ]
    return f"Answered by {reference}, not by the model", headers, rows, notes


def _choices(said: Sequence[Any]) -> str:
    """Indices of choices as letters; a free answer's first words."""
    return ", ".join(
        LETTERS[each]
        if isinstance(each, int) and 0 <= each < len(LETTERS)
        else shorten(str(each), 40, placeholder=" …")
        for each in said
    )


def _number(estimate: Estimate | None, scale: float, digits: int, sign: str = "") -> str:
    if estimate is None:
        return ""
    if estimate.value is None:
        return "undefined"
    value = f"{scale * estimate.value:{sign}.{digits}f}"
    if estimate.low is None or estimate.high is None:
        return f"{value} (no bound)"
    return f"{value} [{scale * estimate.low:{sign}.{digits}f}, {scale * estimate.high:{sign}.{digits}f}]"


def _signed(estimate: Estimate | None, scale: float, digits: int) -> str:
    return _number(estimate, scale, digits, "+")


def _with_n(against: Against) -> str:
    """Added harm, with its own n where fewer questions have a control form than are compared."""
    harm = against.added_harm
    fewer = harm is not None and harm.n != against.difference.n
    return _signed(harm, 1, 3) + (f" (n={harm.n})" if harm is not None and fewer else "")


def _points(error: float | None) -> str:
    return "" if error is None else f"{100 * error:.2f}"


def _p(p: float) -> str:
    return f"{p:.2g}" if p >= 0.001 else f"{p:.0e}"

"""Which forget n-grams harm most (Figure 4): accuracy and excess harm by the n-gram's similarity class and length.

The paper sorts a corpus's n-grams by their similarity to its documents and finds that those most similar harm most. It
reads the folders that `unlearn eval` wrote, and a file that says the class of each n-gram; a record's forget-token says
which n-gram its question holds. NumPy only.

Evaluations of suites and of the sets of `unlearn perturb` are read alike. A suite's task is `SET/STYLE/WHERE`, with its
control form and its clean form beside it; a perturbed set's subjects are taken together, as their group was asked, and
their clean form is whatever other task asked the same questions without a forget-token.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, Field, ValidationError

from robust_unlearning import files
from robust_unlearning.analyze.output import Panel, Report, side
from robust_unlearning.errors import UserError, explain, nearest
from robust_unlearning.evaluate.evaluator import ABOUT, RECORDS
from robust_unlearning.evaluate.record import Record, Task, control_of, control_tasks, excess_of, read_records, right_of
from robust_unlearning.report.tables import Table
from robust_unlearning.stats.estimates import Estimate, accuracy
from robust_unlearning.stats.format import NATS, shown
from robust_unlearning.stats.means import mean_interval


class Ngram(BaseModel, extra="ignore", frozen=True, populate_by_name=True):
    """One forget n-gram and its class."""

    text: str
    n: int = Field(ge=1)
    similarity_class: str = Field(alias="class")
    similarity: float


def read_classes(path: str) -> dict[str, Ngram]:
    """N-grams by their text, from `{"ngrams": [{"text", "n", "class", "similarity"}, …]}`.

    Raises:
        UserError: another kind of file, or two n-grams of one text.
    """
    data = files.read_json(Path(path))
    rows = data.get("ngrams") if isinstance(data, dict) else None
    if not isinstance(rows, list) or not rows:
        raise UserError(
            f'{path}: expected {{"ngrams": [{{"text", "n", "class", "similarity"}}, …]}} with one at least.'
        )
    ngrams: dict[str, Ngram] = {}
    for index, row in enumerate(rows):
        try:
            ngram = Ngram.model_validate(row)
        except ValidationError as error:
            raise UserError(f"{path}, n-gram {index}: " + " ".join(explain(error.errors(), Ngram))) from error
        if ngrams.setdefault(ngram.text, ngram) != ngram:
            raise UserError(f"{path}: {ngram.text!r} stands there twice, with different classes.")
    return ngrams


def read_folder(folder: str) -> list[Record]:
    """The records of an evaluation folder; those of a perturbed set have their group's name as their task.

    Raises:
        UserError: nothing there; the message says how to make it.
    """
    path = files.locate(folder) / RECORDS
    if not path.exists():
        raise UserError(
            f"{folder!r} holds no {RECORDS}; write it with: unlearn eval TARGET --tasks SUITE --out {folder}"
        )
    about = path.with_name(ABOUT)
    return _pooled(read_records(path), files.read_json(about).get("groups") or {} if about.exists() else {})


def _pooled(records: list[Record], groups: Mapping[str, Sequence[str]]) -> list[Record]:
    """Perturbed tasks renamed to the smallest group that they are in, where their questions' ids all differ."""
    ids: dict[str, list[str]] = {}
    for record in records:
        if record.forget_token:
            ids.setdefault(record.task.name, []).append(record.id)
    pooled: dict[str, Task] = {}
    for name, tasks in sorted(groups.items(), key=lambda item: len(item[1])):
        of_group = [id for task in tasks for id in ids.get(task, ())]
        if len(set(of_group)) == len(of_group):
            pooled = {**{task: Task(name) for task in tasks if task in ids}, **pooled}
    return [replace(record, task=pooled.get(record.task.name, record.task)) for record in records]


@dataclass(frozen=True)
class Group:
    """Questions of one task whose forget-tokens are n-grams of one class and length.

    Attributes:
        accuracy: with the n-gram in the question.
        control: of the same questions with a control word; None where the evaluation has none.
        clean: of the same questions as they are; None where the evaluation has none.
        excess: excess harm, nats per answer token (see `record.excess_of`).
        similarity: mean over the class's n-grams that occur.
        ngrams: how many of them occur.
        n: questions.
    """

    task: str
    length: int
    similarity_class: str
    accuracy: Estimate
    control: Estimate | None
    clean: Estimate | None
    excess: Estimate | None
    similarity: float
    ngrams: int
    n: int


def group(records: Sequence[Record], classes: Mapping[str, Ngram]) -> list[Group]:
    """The records' perturbed questions by task, length and class, classes by rising similarity.

    Raises:
        UserError: no record's forget-token is among the n-grams.
    """
    by_task: dict[Task, dict[str, Record]] = {}
    for record in records:
        by_task.setdefault(record.task, {})[record.id] = record
    controls = control_tasks(by_task)
    sorted_: dict[tuple[Task, int, str], list[Record]] = {}
    for task in (task for task in by_task if task not in controls):
        for record in by_task[task].values():
            if ngram := classes.get(record.forget_token or ""):
                sorted_.setdefault((task, ngram.n, ngram.similarity_class), []).append(record)
    if not sorted_:
        tokens = {record.forget_token for record in records if record.forget_token is not None}
        if not tokens:
            raise UserError(
                "no record has a forget-token. Evaluate a suite with `perturb` and forget_tokens, or a set that "
                "`unlearn perturb` wrote with this file of n-grams as --keywords."
            )
        seen = min(tokens)
        close = nearest(seen, classes)
        raise UserError(
            f"none of the {len(tokens)} forget-tokens of the records, {seen!r} for one, is among the {len(classes)} "
            f"n-grams{f' (nearest: {close!r})' if close else ''}. Evaluate with these n-grams as a "
            "suite's forget_tokens, or as the --keywords of `unlearn perturb`, one a question."
        )
    groups = [_group(*key, asked, by_task, classes) for key, asked in sorted_.items()]
    return sorted(groups, key=lambda group: (group.task, group.length, group.similarity))


def _group(
    task: Task,
    length: int,
    name: str,
    records: Sequence[Record],
    by_task: Mapping[Task, Mapping[str, Record]],
    classes: Mapping[str, Ngram],
) -> Group:
    form = control_of(task, by_task)
    control = _all_of(by_task[form].get(record.id) if form else None for record in records)
    if control and [_tokens(record) for record in control] != [_tokens(record) for record in records]:
        control = None
    others = [by_task.get(task.clean_form, {})] if task.style else list(by_task.values())
    clean = _all_of(_clean(record, others) for record in records)
    similarities = {token: classes[token].similarity for token, _ in map(_tokens, records) if token}
    return Group(
        task=task.name,
        length=length,
        similarity_class=name,
        accuracy=accuracy(right_of(records)),
        control=accuracy(right_of(control)) if control else None,
        clean=accuracy(right_of(clean)) if clean else None,
        excess=mean_interval(excess_of(records, control)) if control else None,
        similarity=float(np.mean(list(similarities.values()))),
        ngrams=len(similarities),
        n=len(records),
    )


def _all_of(records: Iterable[Record | None]) -> list[Record] | None:
    """The records, if none is missing."""
    given = list(records)
    known = [record for record in given if record]
    return known if len(known) == len(given) else None


def _tokens(record: Record) -> tuple[str | None, str | None]:
    return record.forget_token, record.control_token


def _clean(record: Record, tasks: Iterable[Mapping[str, Record]]) -> Record | None:
    """The record of the same question without a forget-token, scored in the same way: the right answer's continuation
    has as many tokens; of several, the one in whose task's name `continuation` stands as in the record's.
    """

    def right(of: Record) -> tuple[Any, int | None]:
        return of.answer, of.answer_tokens if of.scored else None

    same = [other for records in tasks if (other := records.get(record.id)) and not other.forget_token]
    texts = "continuation" in record.task.name
    alike = (other for other in same if right(other) == right(record))
    return min(alike, key=lambda other: ("continuation" in other.task.name) != texts, default=None)


_COLUMNS = {
    "label": "model", "task": "task", "length": "n-gram", "similarity_class": "class", "similarity": "similarity",
    "clean": "clean", "control": "+control", "accuracy": "+n-gram", "excess": "excess harm", "ngrams": "n-grams",
    "n": "n",
}  # fmt: skip


def analyse(records: Mapping[str, Sequence[Record]], classes: Mapping[str, Ngram]) -> Report:
    """Every label's table, and whether the most similar n-grams harm more than the least similar.

    Args:
        records: label -> records of an evaluation.
        classes: text of an n-gram -> n-gram.
    """
    rows, notes = [], []
    lines: tuple[dict[str, list[tuple[float, Estimate]]], ...] = ({}, {})
    for label, of_label in records.items():
        groups = group(of_label, classes)
        rows += [{"label": label, **vars(each)} for each in groups]
        for (task, length), same in groupby(groups, key=lambda each: (each.task, each.length)):
            of_task = list(same)
            notes += _ends(label, of_task)
            name = f"{label}, {task}, {length}-grams"
            lines[0][name] = [(each.similarity, each.accuracy) for each in of_task]
            lines[1][name] = [(each.similarity, each.excess) for each in of_task if each.excess]
    notes = [
        "Accuracy with 95 % Wilson intervals; excess harm in nats per answer token (log p of the right answer with the "
        "n-gram less that with a control word; below 0 the n-gram does more harm) with bootstrap intervals over n "
        "questions. Similarity: mean over the class's n-grams that occur.",
        *notes,
    ]
    about = {"labels": list(records), "ngrams": len(classes)}
    labels = ("accuracy with the n-gram in the question", "excess harm (nats per answer token)")
    panels = [Panel(label, each) for label, each in zip(labels, lines, strict=True)]
    table = Table("By class", _COLUMNS, rows, key="classes")
    return Report(
        "harmfulness", "Harmfulness of forget n-grams", about, notes, [table], panels, "similarity to the document"
    )


def _ends(label: str, groups: Sequence[Group]) -> list[str]:
    """The most similar class against the least similar, whose questions are others: a normal interval."""
    least, most = groups[0], groups[-1]
    head = f"{label}, {least.task}, {least.length}-grams: "
    if len(groups) < 2 or not least.excess or not most.excess:
        return [head + "one class only, or no control form: nothing to compare."]
    a, b = most.excess, least.excess
    if a.value is None or b.value is None or a.stderr is None or b.stderr is None:
        return [head + "too few questions to compare."]
    difference, error = a.value - b.value, float(np.hypot(a.stderr, b.stderr))
    estimate = Estimate(difference, difference - 1.96 * error, difference + 1.96 * error)
    words = {"lower": "more harmful than", "higher": "less harmful than"}
    is_said = words.get(side(estimate), "not to be told apart in harm from")
    return [
        f"{head}class {most.similarity_class!r} is {is_said} class {least.similarity_class!r} (excess harm "
        f"{shown(estimate, NATS)} nats, n={most.n} and {least.n})."
    ]

"""Which forget n-grams harm most (Figure 4): accuracy and excess harm by the n-gram's similarity class and length.

The paper sorts a corpus's n-grams by their similarity to its documents and finds that those most similar harm most.
This reads the folders that `unlearn eval` wrote, and a file that says the class of each n-gram; a record's forget-token
says which n-gram its question holds, and `ngram_answers` how intervals are reckoned. NumPy only.

Evaluations of suites and of the sets of `unlearn perturb` are read alike. A suite's task is `SET/STYLE/WHERE`, with its
control form and its clean form beside it; a perturbed set's subjects are taken together, as their group was asked, and
their clean form is whatever other task asked the same questions without a forget-token.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import numpy as np

from robust_unlearning import files
from robust_unlearning.analyze.ngram_answers import (
    Ngram,
    NgramAnswers,
    NgramQuestion,
    all_of,
    asked_of,
    most_less_least,
)
from robust_unlearning.analyze.output import Panel, Report, side
from robust_unlearning.errors import UserError
from robust_unlearning.evaluate.evaluator import ABOUT, RECORDS
from robust_unlearning.evaluate.record import Record, Task, read_records, right_of
from robust_unlearning.report.tables import Table
from robust_unlearning.stats.estimates import Estimate
from robust_unlearning.stats.format import NATS, shown
from robust_unlearning.stats.means import over_seeds, share_over_seeds


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


def group(asked: Sequence[NgramQuestion]) -> list[Group]:
    """Questions by task, length and class, classes by rising similarity."""
    sorted_: dict[tuple[str, int, str], list[NgramQuestion]] = {}
    for each in asked:
        sorted_.setdefault((each.record.task.name, each.ngram.n, each.ngram.similarity_class), []).append(each)
    groups = [_group(*key, of_group) for key, of_group in sorted_.items()]
    return sorted(groups, key=lambda group: (group.task, group.length, group.similarity))


def _group(task: str, length: int, name: str, asked: Sequence[NgramQuestion]) -> Group:
    answers = NgramAnswers.of(asked)

    def share(records: Iterable[Record | None]) -> Estimate | None:
        there = all_of(records)
        return share_over_seeds([right_of(there)], answers.groups) if there else None

    accuracy = share(each.record for each in asked)
    assert accuracy is not None
    ngrams = {each.ngram.text: each.ngram.similarity for each in asked}
    return Group(
        task=task,
        length=length,
        similarity_class=name,
        accuracy=accuracy,
        control=share(each.control for each in asked),
        clean=share(each.clean for each in asked),
        excess=None if answers.excess is None else over_seeds([answers.excess], answers.groups),
        similarity=float(np.mean(list(ngrams.values()))),
        ngrams=len(ngrams),
        n=len(asked),
    )


_COLUMNS = {
    "label": "model", "task": "task", "length": "n-gram", "similarity_class": "class", "similarity": "similarity",
    "clean": "clean", "control": "+control", "accuracy": "+n-gram", "excess": "excess harm", "ngrams": "n-grams",
    "n": "n",
}  # fmt: skip
_MEASURES = {
    "accuracy": "accuracy with the n-gram in the question",
    "excess": "excess harm (nats per answer token)",
}


def analyse(records: Mapping[str, Sequence[Record]], classes: Mapping[str, Ngram]) -> Report:
    """Every label's table: by class, and whether the most similar n-grams harm more than the least similar; or, where
    there is one class as of n-grams taken document by document, by length.

    Args:
        records: label -> records of an evaluation.
        classes: text of an n-gram -> n-gram.
    """
    asked = {label: asked_of(of_label, classes) for label, of_label in records.items()}
    rows: list[dict[str, Any]] = []
    notes: list[str] = []
    by_class = len({each.similarity_class for each in classes.values()}) > 1
    lines: dict[str, dict[str, list[tuple[float, Estimate]]]] = {measure: {} for measure in _MEASURES}
    for label, of_label in asked.items():
        groups = group(of_label)
        rows += [{"label": label, **vars(each)} for each in groups]
        notes += _ends(label, of_label, groups) if by_class else []
        for each in groups:
            name = f"{label}, {each.task}" + (f", {each.length}-grams" if by_class else "")
            for measure, of_measure in lines.items():
                if estimate := getattr(each, measure):
                    at = each.similarity if by_class else each.length
                    of_measure.setdefault(name, []).append((float(at), estimate))
    kind = "class" if by_class else "length"
    columns = {key: title for key, title in _COLUMNS.items() if by_class or key != "similarity_class"}
    panels = [Panel(title, lines[measure]) for measure, title in _MEASURES.items() if lines[measure]]
    return Report(
        "harmfulness",
        "Harmfulness of forget n-grams",
        {"labels": list(records), "ngrams": len(classes)},
        [_structure([each for of_label in asked.values() for each in of_label]), *notes],
        [Table(f"By {kind}", columns, rows, key="classes" if by_class else "lengths")],
        panels,
        "similarity to the document" if by_class else "words of the n-gram",
    )


def _structure(asked: Sequence[NgramQuestion]) -> str:
    """What intervals rest on, in a sentence, and what the columns are."""
    units: dict[tuple[int, str], set[str]] = {}
    for each in asked:
        units.setdefault((each.ngram.n, each.ngram.similarity_class), set()).add(each.ngram.unit)
    least, most = min(map(len, units.values())), max(map(len, units.values()))
    count = f"{least}" if least == most else f"{least} to {most}"
    if any(each.ngram.unit != each.ngram.text for each in asked):
        unit = f"The n-grams of one document overlap, so the document is the unit: {count} documents for each length"
    else:
        unit = f"An n-gram stands in many questions, so the n-gram is the unit: {count} n-grams of each class"
    return (
        f"{unit}; questions about one thing count as one too. 95 % intervals say how far a number may move with other "
        "n-grams and questions, and say nothing of other models. Excess harm, nats per answer token: log p of the "
        "right answer with the n-gram less that with a control word; below 0 the n-gram does more harm. Similarity: "
        "mean over the n-grams that occur."
    )


def _ends(label: str, asked: Sequence[NgramQuestion], groups: Sequence[Group]) -> list[str]:
    """Each task's most similar class against the least similar, whose n-grams and questions are others."""
    notes = []
    for (task, length), same in groupby(groups, key=lambda each: (each.task, each.length)):
        least, *others = same
        head = f"{label}, {task}, {length}-grams: "
        of_task = [each for each in asked if (each.record.task.name, each.ngram.n) == (task, length)]
        most = others[-1] if others else least
        effect = (
            most_less_least(NgramAnswers.of(of_task), most.similarity_class, least.similarity_class) if others else None
        )
        if effect is None:
            notes.append(head + "one class only, or no control form: nothing to compare.")
            continue
        estimate = effect.estimate()
        words = {"lower": "more harmful than", "higher": "less harmful than"}
        is_said = words.get(side(estimate), "not clearly more or less harmful than")
        notes.append(
            f"{head}class {most.similarity_class!r} is {is_said} class {least.similarity_class!r} (excess harm "
            f"{shown(estimate, NATS)} nats, {most.ngrams} and {least.ngrams} n-grams in {most.n} and {least.n} "
            "questions)."
        )
    return notes

"""Which forget n-grams harm most (Figure 4): accuracy and excess harm by the n-gram's similarity class and length.

The paper sorts a corpus's n-grams by their similarity to its documents and finds that those most similar harm most.
This reads the folders that `unlearn eval` wrote, and a file that says the class of each n-gram; a record's forget-token
says which n-gram its question holds. NumPy only.

An n-gram stands in many questions, so it is the n-gram that is drawn, not the question: intervals cluster by n-gram
(and by what questions are about). Where n-grams were taken document by document, those of one document overlap in
words, and the document is the unit. Classes have n-grams and questions of their own: the variance of their difference
is the sum of both sides' parts, each with its own degrees of freedom (`stats.factors`).

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
from robust_unlearning.perturb.ngrams import TOP
from robust_unlearning.report.tables import Table
from robust_unlearning.stats.effects import Effect
from robust_unlearning.stats.estimates import Array, Estimate
from robust_unlearning.stats.factors import Groups
from robust_unlearning.stats.format import NATS, shown
from robust_unlearning.stats.means import over_seeds, share_over_seeds


class Ngram(BaseModel, extra="ignore", frozen=True, populate_by_name=True):
    """One forget n-gram and its class."""

    text: str
    n: int = Field(ge=1)
    similarity_class: str = Field(alias="class")
    similarity: float
    document: int | None = None

    @property
    def unit(self) -> str:
        """What counts as one in an interval: its document if n-grams were taken document by document, else itself."""
        if self.similarity_class == TOP and self.document is not None:
            return f"document {self.document}"
        return self.text


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
class NgramQuestion:
    """A question with an n-gram in it; `control` and `clean` are the same with a control word, and as it is."""

    ngram: Ngram
    record: Record
    control: Record | None
    clean: Record | None


@dataclass(frozen=True)
class NgramAnswers:
    """Questions with n-grams of one length in them, and what a model answers, [n] each.

    Attributes:
        right: 1 right, 0 wrong.
        excess: excess harm, nats per answer token (see `record.excess_of`); None where the evaluation has no controls.
        classes: of the n-gram in each.
        groups: how they hang together: by what they are about, and by n-gram, see `Ngram.unit`.
    """

    right: Array
    excess: Array | None
    classes: Sequence[str]
    groups: Groups

    @classmethod
    def of(cls, asked: Sequence[NgramQuestion]) -> NgramAnswers:
        """From records, in their order."""
        records, control = [each.record for each in asked], _all_of(each.control for each in asked)
        excess = excess_of(records, control) if control else None
        clusters = [record.cluster or f"{record.task.set} {record.id}" for record in records]
        groups = Groups(clusters, [each.ngram.unit for each in asked])
        return cls(right_of(records), excess, [each.ngram.similarity_class for each in asked], groups)

    def only(self, name: str) -> NgramAnswers:
        """Those whose n-gram is of one class."""
        at = np.array([each == name for each in self.classes])
        excess = None if self.excess is None else self.excess[at]
        labels = (None if each is None else np.array(each)[at] for each in (self.groups.clusters, self.groups.words))
        return NgramAnswers(self.right[at], excess, [name] * int(at.sum()), Groups(*labels))

    @property
    def units(self) -> int:
        """How many n-grams, or documents that they were taken from, see `Ngram.unit`."""
        return len(set(self.groups.words)) if self.groups.words is not None else 0


def apart(first: Array, of_first: Groups, second: Array, of_second: Groups) -> Effect:
    """The mean of `first` [n] less that of `second` [m], which are numbers of other questions of one model.

    Each side adds its own parts to the variance; a cluster that both have counts on both sides, which errs to the wide
    side where questions about one thing are alike.
    """
    return Effect({0: first - second.mean()}, of_first, second.mean() - second, of_second)


def most_less_least(answers: NgramAnswers, most: str, least: str) -> Effect | None:
    """Excess harm of one class less that of another; None without controls, or where a class is not there."""
    first, second = answers.only(most), answers.only(least)
    if first.excess is None or second.excess is None or not len(first.right) or not len(second.right):
        return None
    return apart(first.excess, first.groups, second.excess, second.groups)


def asked_of(records: Sequence[Record], classes: Mapping[str, Ngram]) -> list[NgramQuestion]:
    """The records' questions with one of these n-grams in them.

    Raises:
        UserError: no record's forget-token is among the n-grams.
    """
    by_task: dict[Task, dict[str, Record]] = {}
    for record in records:
        by_task.setdefault(record.task, {})[record.id] = record
    controls = control_tasks(by_task)
    asked = []
    for task in (task for task in by_task if task not in controls):
        form = control_of(task, by_task)
        others = [by_task.get(task.clean_form, {})] if task.style else list(by_task.values())
        for record in by_task[task].values():
            if ngram := classes.get(record.forget_token or ""):
                control = by_task[form].get(record.id) if form else None
                paired = control if control and _tokens(control) == _tokens(record) else None
                asked.append(NgramQuestion(ngram, record, paired, _clean(record, others)))
    if not asked:
        raise UserError(_no_ngram(records, classes))
    return asked


def _no_ngram(records: Sequence[Record], classes: Mapping[str, Ngram]) -> str:
    """The message where no record holds one of the n-grams."""
    tokens = {record.forget_token for record in records if record.forget_token is not None}
    if not tokens:
        return (
            "no record has a forget-token. Evaluate a suite with `perturb` and forget_tokens, or a set that "
            "`unlearn perturb` wrote with this file of n-grams as --keywords."
        )
    seen = min(tokens)
    close = nearest(seen, classes)
    return (
        f"none of the {len(tokens)} forget-tokens of the records, {seen!r} for one, is among the {len(classes)} "
        f"n-grams{f' (nearest: {close!r})' if close else ''}. Evaluate with these n-grams as a "
        "suite's forget_tokens, or as the --keywords of `unlearn perturb`, one a question."
    )


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
        there = _all_of(records)
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

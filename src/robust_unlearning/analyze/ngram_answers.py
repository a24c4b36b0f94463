"""Questions with n-grams in them: which n-gram stands in which, and what a model answers to them.

An n-gram stands in many questions, so it is the n-gram that is drawn, not the question: intervals cluster by n-gram
(and by what questions are about). Where n-grams were taken document by document, those of one document overlap in
words, and the document is the unit. Classes have n-grams and questions of their own: the variance of their difference
is the sum of both sides' parts, each with its own degrees of freedom (`stats.factors`). NumPy only.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, Field, ValidationError

from robust_unlearning import files
from robust_unlearning.errors import UserError, explain, nearest
from robust_unlearning.evaluate.record import Record, Task, control_of, control_tasks, excess_of, right_of
from robust_unlearning.perturb.ngrams import TOP
from robust_unlearning.stats.effects import Effect
from robust_unlearning.stats.estimates import Array
from robust_unlearning.stats.factors import Groups


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
        records, control = [each.record for each in asked], all_of(each.control for each in asked)
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


def answers(records: Mapping[str, Sequence[Record]], classes: Mapping[str, Ngram]) -> dict[str, Any]:
    """What models answered to the same questions, for JSON: `asked` says of each length how the questions hang together
    (`classes`, `clusters`, `words`), `right` and `excess` are label -> length -> numbers; all tasks together.
    """
    data: dict[str, Any] = {"asked": {}, "right": {}, "excess": {}}
    for label, of_label in records.items():
        by_length: dict[str, list[NgramQuestion]] = {}
        for each in asked_of(of_label, classes):
            by_length.setdefault(str(each.ngram.n), []).append(each)
        for length, asked in by_length.items():
            found = NgramAnswers.of(asked)
            data["asked"].setdefault(length, {"classes": list(found.classes), **vars(found.groups)})
            data["right"].setdefault(label, {})[length] = found.right.tolist()
            data["excess"].setdefault(label, {})[length] = None if found.excess is None else found.excess.tolist()
    return data


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


def all_of(records: Iterable[Record | None]) -> list[Record] | None:
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

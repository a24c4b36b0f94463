"""One question's record (a line of `records.jsonl`) and the task that asked it.

This is the one place that reads and writes tasks' names.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from robust_unlearning.errors import UserError
from robust_unlearning.files import read_jsonl
from robust_unlearning.stats.estimates import Array
from robust_unlearning.stats.factors import Groups

CLEAN = "clean"
"""The form of a question without a token put into it."""
CONTROL = "-control"
"""After the form in a suite's task: the same questions with control words."""
SET_CONTROL = "_control"
"""The same in the name of a perturbed set's task, where it stands after the subject: `SET_SUBJECT_control`."""


@dataclass(frozen=True)
class Task:
    """What was asked: a suite's `SET/STYLE/FORM` or `SET/STYLE/FORM-control`, or a task of another harness.

    Attributes:
        set: the set of questions; the whole name for a task of lm-evaluation-harness, which has no style and no form.
        style: how the questions were put, see `data.questions.STYLES`.
        form: `clean`, or where in the question a token stands.
        control: whether the token is a control word.
    """

    set: str
    style: str = ""
    form: str = ""
    control: bool = False

    @classmethod
    def parse(cls, name: str) -> Task:
        """The task of a name; the reverse of `name`."""
        parts = name.rsplit("/", 2)
        if len(parts) < 3:
            return cls(name)
        form = parts[2].removesuffix(CONTROL)
        return cls(parts[0], parts[1], form, form != parts[2])

    @property
    def name(self) -> str:
        """`SET/STYLE/FORM`, `SET/STYLE/FORM-control`, or the set alone."""
        return f"{self.set}/{self.style}/{self.form}{CONTROL * self.control}" if self.style else self.set

    def __str__(self) -> str:
        return self.name

    @property
    def perturbed(self) -> bool:
        """Whether a suite put a token into the questions."""
        return self.form not in ("", CLEAN)

    @property
    def clean_form(self) -> Task:
        """The same questions without a token in them."""
        return replace(self, form=CLEAN, control=False) if self.style else self

    @property
    def control_form(self) -> Task:
        """The same questions with control words, in a suite."""
        return replace(self, control=True)


@dataclass(frozen=True)
class Record:
    """What a model answered to one question in one form.

    Attributes:
        task: that asked it.
        id: of the question; the same in all forms of it.
        answer: index of the right choice; None where the data has none, a text where an answer is free.
        prediction: index of the choice that the model finds most probable, or its text; None for tasks of
            lm-evaluation-harness without choices.
        correct: whether they agree; None where a task has no accuracy.
        correct_norm: the same for the choice of the highest log p per byte.
        logprobs: log p of each choice in nats, summed over its tokens; empty for a free answer.
        tokens: how many tokens each choice has.
        forget_token, control_token: what was put into the question, and its harmless counterpart; in the control
            form it is the latter that stands there.
        cluster: what the question is about, where several are about one thing; see `data.questions`.
        doc_hash: lm-evaluation-harness's hash of the row of data.
        filter: of its filters, the one that the answer went through.
        across: the question's name among all sets of a suite, where that is not its id: another set's id for the same
            question, or `SET/ID` where another set's question has this id; see `suite.names_across`.
        metrics: its numbers for a task without choices.
    """

    task: Task
    id: str
    answer: Any = None
    prediction: Any = None
    correct: bool | None = None
    correct_norm: bool | None = None
    logprobs: tuple[float, ...] = ()
    tokens: tuple[int, ...] = ()
    forget_token: str | None = None
    control_token: str | None = None
    cluster: str | None = None
    doc_hash: str | None = None
    filter: str | None = None
    across: str | None = None
    metrics: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of_choices(
        cls, task: Task, id: str, answer: int | None, options: Sequence[str], scored: Sequence[tuple[float, int]]
    ) -> Record:
        """The record of a question whose options have been scored: (log p in nats, tokens) of each."""
        logprobs = tuple(logp for logp, _ in scored)
        per_byte = [logp / len(option.encode()) for logp, option in zip(logprobs, options, strict=True)]
        prediction, normed = int(np.argmax(logprobs)), int(np.argmax(per_byte))
        tokens = tuple(count for _, count in scored)
        return cls(task, id, answer, prediction, prediction == answer, normed == answer, logprobs, tokens)

    @property
    def question(self) -> tuple[str, ...]:
        """Which question it is, whatever set asked it: in a suite, whose sets may hold parts of one another, its id or
        what stands for it (`across`); elsewhere task and id, as tasks of lm-evaluation-harness number their own.
        """
        return (self.across or self.id,) if self.task.style else (self.task.set, self.id)

    @property
    def right(self) -> float:
        """1 right, 0 wrong."""
        return float(bool(self.correct))

    @property
    def scored(self) -> bool:
        """Whether log p and tokens of the right answer are there; a free answer has none."""
        return isinstance(self.answer, int) and 0 <= self.answer < min(len(self.logprobs), len(self.tokens))

    @property
    def logp(self) -> float:
        """log p of the right answer, nats."""
        return float(self.logprobs[self.answer])

    @property
    def logp_among(self) -> float:
        """log p of the right answer among those offered, nats: what else the model might say plays no part."""
        return float(self.logprobs[self.answer] - np.logaddexp.reduce(self.logprobs))

    @property
    def shares(self) -> list[float]:
        """The probability of each choice among those offered: softmax of `logprobs`, so that they sum to 1."""
        return [float(each) for each in np.exp(np.array(self.logprobs) - np.logaddexp.reduce(self.logprobs))]

    @property
    def answer_tokens(self) -> int:
        """Tokens of the right answer."""
        return self.tokens[self.answer]

    def as_dict(self) -> dict[str, Any]:
        """The line of `records.jsonl`: what is not there is left out, except the two tokens and a choice's answer."""
        row = {
            "doc_hash": self.doc_hash,
            "filter": self.filter,
            "cluster": self.cluster,
            "across": self.across,
            "answer": self.answer,
            "prediction": self.prediction,
            **self.metrics,
            "correct": self.correct,
            "correct_norm": self.correct_norm,
            "logprobs": self.logprobs or None,
            "tokens": self.tokens or None,
        }
        there = {key: value for key, value in row.items() if value is not None or (key == "answer" and self.logprobs)}
        tokens = {"forget_token": self.forget_token, "control_token": self.control_token}
        return {"task": self.task.name, "id": self.id, **there, **tokens}

    @classmethod
    def from_dict(cls, row: Mapping[str, Any]) -> Record:
        """The reverse of `as_dict`; fields of others become `metrics`."""
        known = {key: value for key, value in row.items() if key in _FIELDS}
        known |= {key: tuple(row.get(key) or ()) for key in ("logprobs", "tokens")}
        known |= {"task": Task.parse(row["task"]), "id": str(row["id"])}
        return cls(**known, metrics={key: value for key, value in row.items() if key not in _FIELDS})


_FIELDS = {each.name for each in fields(Record)} - {"metrics"}


def read_records(file: Path) -> list[Record]:
    """The records that an evaluation wrote."""
    return [Record.from_dict(row) for _, row in read_jsonl(file)]


def by_task(records: Iterable[Record]) -> dict[Task, list[Record]]:
    """Each task's records, in order."""
    tasks: dict[Task, list[Record]] = {}
    for record in records:
        tasks.setdefault(record.task, []).append(record)
    return tasks


def right_of(records: Iterable[Record]) -> Array:
    """1 right, 0 wrong, of n records [n]."""
    return np.array([record.right for record in records])


def logp_among_of(records: Iterable[Record]) -> Array:
    """log p of the right answers among those offered, nats [n]."""
    return np.array([record.logp_among for record in records])


def groups_of(records: Sequence[Record]) -> Groups:
    """How questions hang together: by what they are about, where all say so, and by the word that stands in them."""
    clusters = [record.cluster for record in records]
    words = [record.forget_token for record in records]
    return Groups(None if None in clusters else clusters, None if None in words else words)


def excess_of(forget: Sequence[Record], control: Sequence[Record]) -> Array:
    """How much more a forget-token lowers the right answer's log-probability than a control word does [n].

    (log p(answer | forget form) - log p(answer | control form)) / tokens, in nats per answer token; below 0 where the
    forget-token does more harm. It is what the forget-token does to the clean form's log p less what the control word
    does to it: the clean form's cancels. Given the clean form in place of the control form, it is the former.

    Args:
        forget, control: records of the same questions in the same order.

    Raises:
        UserError: an answer without tokens.
    """
    if any(record.answer_tokens < 1 for record in forget):
        raise UserError("tokens must be at least 1 for every answer.")
    pairs = zip(forget, control, strict=True)
    return np.array([(record.logp - other.logp) / record.answer_tokens for record, other in pairs])


def control_of(task: Task, tasks: Collection[Task]) -> Task | None:
    """The one of `tasks` that asks a task's questions with control words; None if none does.

    For a perturbed set's task it has the same name with `_control` as one more part of it, as in
    `SET_SUBJECT_control` and, for `SET_SUBJECT_continuation`, `SET_SUBJECT_control_continuation`.
    """
    if task.style:
        return task.control_form if not task.control and task.control_form in tasks else None
    name = task.set
    places = [at for at in range(len(name), 0, -1) if name[at:][:1] in ("", "_")]
    ways = [Task(name + CONTROL), *(Task(name[:at] + SET_CONTROL + name[at:]) for at in places)]
    return next((each for each in ways if each in tasks), None)


def control_tasks(tasks: Collection[Task]) -> set[Task]:
    """Those of `tasks` that hold control words: by their names' endings, or as the control form of another of them.

    A task that has a control form itself is none, whatever its name (a subject may be called quality_control).
    """
    controls = {task: control_of(task, tasks) for task in tasks}
    endings = (CONTROL, SET_CONTROL, f"{SET_CONTROL}_continuation")
    named = {task for task in tasks if task.control or (task.set.endswith(endings) and not task.style)}
    return {task for task in named.union(filter(None, controls.values())) if controls[task] is None}

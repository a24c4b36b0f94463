"""Answers that evaluations left on disk (`records.jsonl`), brought together: what several models said to the same
questions.

A record has `task`, `id`, `answer` (index of the right choice), `prediction`, `correct`, and, where choices were
scored, `logprobs` and `tokens` (one per choice), `forget_token` and `control_token`. Two records are of the same
question when task, id and both tokens are equal.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from robust_unlearning.errors import UserError, unknown
from robust_unlearning.evaluate.record import Record, Task, control_of, excess_of, groups_of, logp_among_of, right_of
from robust_unlearning.files import RECIPE, RECORDS, locate, read_jsonl, read_yaml
from robust_unlearning.stats.estimates import Array
from robust_unlearning.stats.factors import Groups

Key = tuple[str, str, str]  # id, forget-token, control token
FORGOTTEN = ("*forget*", "*wmdp*")
"""Tasks that are to be forgotten, so that fewer right answers are better, unless the user says otherwise."""
ROUNDING = 1e-3
"""Nats by which the log-probabilities of one answer may differ."""


@dataclass(frozen=True)
class AnswerSource:
    """The records of one evaluated model: task -> question -> record, and task -> the file it was read from."""

    folder: Path
    tasks: dict[Task, dict[Key, Record]]
    files: dict[Task, Path]

    @property
    def recipe(self) -> dict[str, Any]:
        """The recipe of the run in this folder, unchecked; empty where it holds no run."""
        path = self.folder / RECIPE
        recipe = read_yaml(path, "recipe") if path.exists() else None
        return recipe if isinstance(recipe, dict) else {}

    def pairs(self, task: Task) -> dict[Key, tuple[Record, Record]]:
        """A task's questions in their forget form and their control form, where log p is known in both."""
        control = control_of(task, self.tasks)
        controls = self.tasks[control] if control else {}
        both = ((key, (record, controls[key])) for key, record in self.tasks[task].items() if key in controls)
        return {key: pair for key, pair in both if pair[0].scored and pair[1].scored}


@dataclass(frozen=True)
class ComparedModel:
    """A name and its evaluations, one for each training seed."""

    name: str
    seeds: tuple[AnswerSource, ...]


@dataclass(frozen=True)
class ModelAnswers:
    """What one model answered in one task, a row for each seed: arrays [seeds, n].

    Attributes:
        correct: 1 right, 0 wrong.
        logp: log p of the right answer, nats; None where some model has none.
        logp_among: the same among the answers offered, see `Record.logp_among`; None together with `logp`.
        tokens: tokens of the right answer, None together with `logp`.
        excess: log p of the right answer under the forget-token less that under the control token, nats per token
            [seeds, m], for the m questions that have both forms in every model; None where there are none.
        predictions: for each seed, what was answered.
    """

    correct: Array
    logp: Array | None
    logp_among: Array | None
    tokens: Array | None
    excess: Array | None
    predictions: list[list[Any]]

    @property
    def of_one_token(self) -> bool:
        """Whether every right answer has one token."""
        return self.tokens is not None and bool((self.tokens == 1).all())

    @property
    def logp_per_token(self) -> Array | None:
        """`logp` over `tokens`."""
        return None if self.logp is None or self.tokens is None else self.logp / self.tokens


@dataclass(frozen=True)
class SharedTask:
    """The questions of a task, or of several pooled, that every model was asked, and every model's answers.

    Attributes:
        name: the task's, or that of what is pooled.
        tasks: those that asked the questions; one but for a pool.
        records: the questions as the first model answered them, in the order of its file.
        left_out: questions that some models were asked and others not.
        harmed: indices of the m questions that have both forms in every model, see `ModelAnswers.excess`.
    """

    name: str
    tasks: list[Task]
    records: list[Record]
    left_out: int
    harmed: list[int]
    models: dict[str, ModelAnswers]

    @property
    def groups(self) -> Groups:
        """How the n questions hang together."""
        return groups_of(self.records)

    @property
    def harm_groups(self) -> Groups:
        """How the m questions of `harmed` hang together."""
        return groups_of([self.records[index] for index in self.harmed])


def pooled(name: str, tasks: Sequence[SharedTask]) -> SharedTask:
    """The questions of several tasks as those of one, each question with the same weight.

    A number that one of them lacks is None, except the excess, which is over those tasks that have it.
    """
    starts = np.cumsum([0, *(len(task.records) for task in tasks[:-1])])

    def joined(arrays: Iterable[Array | None], *, all_of: bool = True) -> Array | None:
        listed = list(arrays)
        there = [array for array in listed if array is not None]
        return np.concatenate(there, axis=1) if there and (len(there) == len(listed) or not all_of) else None

    def answers(model: str) -> ModelAnswers:
        own = [task.models[model] for task in tasks]
        return ModelAnswers(
            correct=np.concatenate([each.correct for each in own], axis=1),
            logp=joined(each.logp for each in own),
            logp_among=joined(each.logp_among for each in own),
            tokens=joined(each.tokens for each in own),
            excess=joined((each.excess for each in own), all_of=False),
            predictions=[list(chain(*rows)) for rows in zip(*(each.predictions for each in own), strict=True)],
        )

    return SharedTask(
        name=name,
        tasks=[each for task in tasks for each in task.tasks],
        records=[record for task in tasks for record in task.records],
        left_out=sum(task.left_out for task in tasks),
        harmed=[int(start) + index for start, task in zip(starts, tasks, strict=True) for index in task.harmed],
        models={name: answers(name) for name in tasks[0].models},
    )


def read_models(words: Sequence[str]) -> list[ComparedModel]:
    """Models from `FOLDER`, `NAME=FOLDER` or `NAME=FOLDER,FOLDER,…` (training seeds of one model).

    A folder is a run folder, or any other that `unlearn eval` wrote to; its last part is its name unless one is
    given.

    Raises:
        UserError: fewer than two models, a name twice, several folders without a name, or what `read_source` raises.
    """
    models: list[ComparedModel] = []
    for word in words:
        name, given = ("", word) if Path(word).exists() or "=" not in word else word.split("=", 1)
        folders = [given] if given and Path(given).exists() else given.split(",")
        if len(folders) > 1 and not name:
            raise UserError(f"{word!r}: several folders are seeds of one model and need a name: NAME={word}")
        if not all(folders):
            raise UserError(f"{word!r} names no folder; give FOLDER, NAME=FOLDER or NAME=FOLDER,FOLDER.")
        name = name or Path(given).resolve().name
        if name in [model.name for model in models]:
            raise UserError(f"two models are called {name!r}. Give one another name: NAME={given}")
        models.append(ComparedModel(name, tuple(map(read_source, folders))))
    if len(models) < 2:
        raise UserError(f"a comparison needs two models or more; given: {', '.join(words) or 'none'}.")
    return models


def _same_answer(one: Record, other: Record) -> bool:
    """Whether two records are equal but for the rounding of log-probabilities, which depends on what else was asked."""
    logps = one.logprobs, other.logprobs
    alike = len(logps[0]) == len(logps[1]) and np.allclose(*logps, rtol=0, atol=ROUNDING)
    return alike and replace(one, logprobs=()) == replace(other, logprobs=())


def read_source(name: str) -> AnswerSource:
    """The records in a folder and in its `scores/SUITE` (or of a single `.jsonl` file).

    Raises:
        UserError: no such folder, no records in it, a line that is no record, or a question with two different
            answers; the message names file and line.
    """
    try:
        folder = locate(name)
    except UserError as error:
        hint = f"If it is a model, evaluate it first: unlearn eval {name} --tasks SUITE --out DIR"
        raise UserError(f"{error} {hint}") from error
    places = [folder, folder / RECORDS, *sorted(folder.glob(f"scores/*/{RECORDS}"))]
    sources = [file for file in places if file.suffix == ".jsonl" and file.is_file()]
    if not sources:
        raise UserError(
            f"{name!r} holds no {RECORDS}, neither itself nor in scores/SUITE. "
            f"Evaluate it first: unlearn eval {_how_to_evaluate(folder)}"
        )
    tasks: dict[Task, dict[Key, Record]] = {}
    files: dict[Task, Path] = {}
    for file in sources:
        for where, record in _records(file):
            task, key = record.task, _key(record)
            before = tasks.setdefault(task, {}).setdefault(key, record)
            if before is not record and not _same_answer(before, record):
                other = files.get(task, file)
                what = "Ids must differ." if other == file else f"Compare one of the two: {other} or {file}."
                raise UserError(f"{where}: question {record.id!r} of {task} was answered otherwise before. {what}")
            files.setdefault(task, file)
    return AnswerSource(folder, tasks, files)


def _key(record: Record) -> Key:
    return record.id, record.forget_token or "", record.control_token or ""


def _how_to_evaluate(folder: Path) -> str:
    """The arguments of `unlearn eval` after which a folder, or the one named for it, has records."""
    if (folder / RECIPE).exists():
        return f"{folder} --tasks SUITE"
    if folder.is_file() or (folder / "config.json").exists():
        return f"{folder} --tasks SUITE --out DIR"
    return f"MODEL --tasks SUITE --out {folder}"


def _records(file: Path) -> Iterator[tuple[str, Record]]:
    """('FILE, line N' for messages, record) for each line."""
    needed = ("task", "id", "answer", "prediction", "correct")
    for number, row in read_jsonl(file):
        where = f"{file}, line {number}"
        missing = [field for field in needed if not isinstance(row, dict) or field not in row]
        if missing:
            raise UserError(f"{where} is no record of an answer: it lacks {', '.join(missing)}.")
        yield where, Record.from_dict(row)


def shared_tasks(
    models: Sequence[ComparedModel], patterns: Iterable[str] = ("*",)
) -> tuple[list[SharedTask], list[str]]:
    """The tasks that match a pattern and that all models have answered, and the names of those that not all have.

    Raises:
        UserError: a pattern that matches nothing, no task or no question in common, or a question whose right answer
            or whose number of choices differs between two files.
    """
    sources = [source for model in models for source in model.seeds]
    tasks = {task.name: task for task in every_task(models)}
    matching = [tasks[name] for name in matching_tasks(list(tasks), patterns)]
    shared = [task for task in matching if all(task in source.tasks for source in sources)]
    if not shared:
        has = "\n  - ".join(f"{source.folder}: {', '.join(map(str, source.tasks))}" for source in sources)
        raise UserError(
            "the models have no task in common. Evaluate them on the same suite: unlearn eval MODEL --tasks SUITE"
            f"\n  - {has}"
        )
    return [_task(task, models, sources) for task in shared], [task.name for task in matching if task not in shared]


def every_task(models: Sequence[ComparedModel]) -> list[Task]:
    """The tasks that at least one model has answered."""
    return list({task: None for model in models for source in model.seeds for task in source.tasks})


def matching_tasks(names: Sequence[str], patterns: Iterable[str]) -> list[str]:
    """The names that match one of the patterns, in their order.

    Raises:
        UserError: a pattern matches none.
    """
    matched: set[str] = set()
    for pattern in patterns:
        fitting = [name for name in names if fnmatchcase(name, pattern)]
        if not fitting:
            raise UserError(unknown("task", pattern, names, "Patterns such as 'near/*' are allowed."))
        matched.update(fitting)
    return [name for name in names if name in matched]


def _task(task: Task, models: Sequence[ComparedModel], sources: Sequence[AnswerSource]) -> SharedTask:
    first, *others = sources
    asked = {key for source in sources for key in source.tasks[task]}
    keys = list(first.tasks[task])
    for source in others:
        keys = [key for key in keys if key in source.tasks[task]]
        if not keys:
            raise UserError(
                f"{task}: no question (same id, same forget-token and control token) is in all records up to "
                f"{source.files[task]}: compare it with {first.files[task]}. Evaluate all on the same suite."
            )
    for source in others:
        for key in keys:
            a, b = first.tasks[task][key], source.tasks[task][key]
            if _question(a) != _question(b):
                raise UserError(
                    f"the data differ: the right answer to question {key[0]!r} of {task} is {_said(a)} in "
                    f"{first.files[task]} and {_said(b)} in {source.files[task]}. Evaluate both on the same data."
                )
    scored = all(source.tasks[task][key].scored for source in sources for key in keys)
    pairs = {source.folder: source.pairs(task) for source in sources}
    paired = [key for key in keys if all(key in of_source for of_source in pairs.values())]
    in_both = set(paired)

    def excess(source: AnswerSource) -> Array:
        forget, control = zip(*(pairs[source.folder][key] for key in paired), strict=True)
        return excess_of(forget, control)

    def answers(model: ComparedModel) -> ModelAnswers:
        seeds = [[source.tasks[task][key] for key in keys] for source in model.seeds]
        tokens = [[float(record.answer_tokens) for record in records] for records in seeds] if scored else None
        return ModelAnswers(
            correct=np.array([right_of(records) for records in seeds]),
            logp=np.array([[record.logp for record in records] for records in seeds]) if scored else None,
            logp_among=np.array([logp_among_of(records) for records in seeds]) if scored else None,
            tokens=np.array(tokens) if tokens else None,
            excess=np.array([excess(source) for source in model.seeds]) if paired else None,
            predictions=[[record.prediction for record in records] for records in seeds],
        )

    return SharedTask(
        name=task.name,
        tasks=[task],
        records=[first.tasks[task][key] for key in keys],
        left_out=len(asked) - len(keys),
        harmed=[index for index, key in enumerate(keys) if key in in_both],
        models={model.name: answers(model) for model in models},
    )


def _question(record: Record) -> tuple[Any, int]:
    return record.answer, len(record.logprobs)


def _said(record: Record) -> str:
    answer, choices = _question(record)
    return f"{answer} (of {choices} choices)" if choices else repr(answer)

"""Answers that evaluations left on disk (`records.jsonl`), brought together: what several models said to the same
questions.

A record has `task`, `id`, `answer` (index of the right choice), `prediction`, `correct`, and, where choices were
scored, `logprobs` and `tokens` (one per choice), `forget_token` and `control_token`. Two records are of the same
question when task, id and both tokens are equal.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Container, Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np

from robust_unlearning.errors import UserError, unknown
from robust_unlearning.files import RECIPE, RECORDS, locate, read_yaml
from robust_unlearning.stats.estimates import Array

Key = tuple[str, str, str]  # id, forget-token, control token
CONTROL = "-control"
"""After the name of a suite's task: the same questions with control words."""
SET_CONTROL = "_control"
"""The same for the task of a perturbed set, where it stands after the subject: `SET_SUBJECT_control`."""
FORGOTTEN = ("*forget*", "*wmdp*")
"""Tasks that are to be forgotten, so that fewer right answers are better, unless the user says otherwise."""
ROUNDING = 1e-3
"""Nats by which the log-probabilities of one answer may differ."""


@dataclass(frozen=True)
class Source:
    """The records of one evaluated model: task -> question -> record, and task -> the file it was read from."""

    folder: Path
    tasks: dict[str, dict[Key, dict[str, Any]]]
    files: dict[str, Path]

    @property
    def recipe(self) -> dict[str, Any]:
        """The recipe of the run in this folder, unchecked; empty where it holds no run."""
        path = self.folder / RECIPE
        recipe = read_yaml(path, "recipe") if path.exists() else None
        return recipe if isinstance(recipe, dict) else {}


@dataclass(frozen=True)
class Model:
    """A name and its evaluations, one for each training seed."""

    name: str
    seeds: tuple[Source, ...]


@dataclass(frozen=True)
class Answers:
    """What one model answered in one task, a row for each seed: arrays [seeds, n].

    Attributes:
        correct: 1 right, 0 wrong.
        logp: log p of the right answer, nats; None where some model has none.
        tokens: tokens of the right answer, None together with `logp`.
        excess: log p of the right answer under the forget-token less that under the control token, nats per token
            [seeds, m], for the m questions that have both forms in every model; None where there are none.
        predictions: for each seed, what was answered.
    """

    correct: Array
    logp: Array | None
    tokens: Array | None
    excess: Array | None
    predictions: list[list[Any]]


@dataclass(frozen=True)
class Task:
    """The questions of a task that every model was asked, and every model's answers.

    Attributes:
        keys: the questions, in the order of the first model's file.
        right: their right answers.
        left_out: questions that some models were asked and others not.
    """

    name: str
    keys: list[Key]
    right: list[Any]
    left_out: int
    models: dict[str, Answers]


def read_models(words: Sequence[str]) -> list[Model]:
    """Models from `FOLDER`, `NAME=FOLDER` or `NAME=FOLDER,FOLDER,…` (training seeds of one model).

    A folder is a run folder, or any other that `unlearn eval` wrote to; its last part is its name unless one is
    given.

    Raises:
        UserError: fewer than two models, a name twice, several folders without a name, or what `read_source` raises.
    """
    models: list[Model] = []
    for word in words:
        name, given = ("", word) if Path(word).exists() or "=" not in word else word.split("=", 1)
        folders = [given] if given and Path(given).exists() else given.split(",")
        if len(folders) > 1 and not name:
            raise UserError(f"{word!r}: several folders are seeds of one model and need a name: NAME={word}")
        if not all(folders):
            raise UserError(f"{word!r} names no folder; give FOLDER, NAME=FOLDER or NAME=FOLDER,FOLDER.")
        name = name or Path(given).resolve().name
        if name in [each.name for each in models]:
            raise UserError(f"two models are called {name!r}. Give one another name: NAME={given}")
        models.append(Model(name, tuple(read_source(each) for each in folders)))
    if len(models) < 2:
        raise UserError(f"a comparison needs two models or more; given: {', '.join(words) or 'none'}.")
    return models


def _same_answer(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two records are equal but for the rounding of log-probabilities, which depends on what else was asked."""
    logps = [record.get("logprobs") or [] for record in (one, other)]
    alike = len(logps[0]) == len(logps[1]) and np.allclose(logps[0], logps[1], rtol=0, atol=ROUNDING)
    return alike and {**one, "logprobs": None} == {**other, "logprobs": None}


def read_source(name: str) -> Source:
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
    found = [folder, folder / RECORDS, *sorted(folder.glob(f"scores/*/{RECORDS}"))]
    found = [each for each in found if each.suffix == ".jsonl" and each.is_file()]
    if not found:
        raise UserError(
            f"{name!r} holds no {RECORDS}, neither itself nor in scores/SUITE. "
            f"Evaluate it first: unlearn eval {_how_to_evaluate(folder)}"
        )
    tasks: dict[str, dict[Key, dict[str, Any]]] = {}
    files: dict[str, Path] = {}
    for file in found:
        for where, record in _records(file):
            task, tokens = record["task"], [record.get(f"{kind}_token") or "" for kind in ("forget", "control")]
            before = tasks.setdefault(task, {}).setdefault((str(record["id"]), tokens[0], tokens[1]), record)
            if not _same_answer(before, record):
                other = files.get(task, file)
                what = "Ids must differ." if other == file else f"Compare one of the two: {other} or {file}."
                raise UserError(f"{where}: question {record['id']!r} of {task} was answered otherwise before. {what}")
            files.setdefault(task, file)
    return Source(folder, tasks, files)


def _how_to_evaluate(folder: Path) -> str:
    """The arguments of `unlearn eval` after which a folder, or the one named for it, has records."""
    if (folder / RECIPE).exists():
        return f"{folder} --tasks SUITE"
    if folder.is_file() or (folder / "config.json").exists():
        return f"{folder} --tasks SUITE --out DIR"
    return f"MODEL --tasks SUITE --out {folder}"


def _records(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """('FILE, line N' for messages, record) for each line."""
    needed = ("task", "id", "answer", "prediction", "correct")
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            where = f"{file}, line {number}"
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(f"{where}: not JSON: {error}. Evaluate again with `unlearn eval`.") from error
            missing = [each for each in needed if not isinstance(record, dict) or each not in record]
            if missing:
                raise UserError(f"{where} is no record of an answer: it lacks {', '.join(missing)}.")
            yield where, record


def shared_tasks(models: Sequence[Model], patterns: Iterable[str] = ("*",)) -> tuple[list[Task], list[str]]:
    """The tasks that match a pattern and that all models have answered, and the names of those that not all have.

    Raises:
        UserError: a pattern that matches nothing, no task or no question in common, or a question whose right answer
            or whose number of choices differs between two files.
    """
    sources = [source for model in models for source in model.seeds]
    names = list(dict.fromkeys(task for source in sources for task in source.tasks))
    matching = matching_tasks(names, patterns)
    shared = [name for name in matching if all(name in source.tasks for source in sources)]
    if not shared:
        has = "\n  - ".join(f"{each.folder}: {', '.join(each.tasks)}" for each in sources)
        raise UserError(
            "the models have no task in common. Evaluate them on the same suite: unlearn eval MODEL --tasks SUITE"
            f"\n  - {has}"
        )
    return [_task(name, models, sources) for name in shared], [name for name in matching if name not in shared]


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


def _task(name: str, models: Sequence[Model], sources: Sequence[Source]) -> Task:
    first, *others = sources
    asked = {key for source in sources for key in source.tasks[name]}
    keys = list(first.tasks[name])
    for source in others:
        keys = [key for key in keys if key in source.tasks[name]]
        if not keys:
            raise UserError(
                f"{name}: no question (same id, same forget-token and control token) is in all records up to "
                f"{source.files[name]}: compare it with {first.files[name]}. Evaluate all on the same suite."
            )
    for source in others:
        for key in keys:
            a, b = first.tasks[name][key], source.tasks[name][key]
            if _question(a) != _question(b):
                raise UserError(
                    f"the data differ: the right answer to question {key[0]!r} of {name} is {_said(a)} in "
                    f"{first.files[name]} and {_said(b)} in {source.files[name]}. Evaluate both on the same data."
                )
    scored = all(_has_logp(source.tasks[name][key]) for source in sources for key in keys)
    paired = _with_control(name, keys, sources)

    def answers(model: Model) -> Answers:
        rows = [[source.tasks[name][key] for key in keys] for source in model.seeds]
        return Answers(
            correct=np.array([[float(each["correct"]) for each in row] for row in rows]),
            logp=np.array([[_logp(each) for each in row] for row in rows]) if scored else None,
            tokens=np.array([[_tokens(each) for each in row] for row in rows]) if scored else None,
            excess=np.array([_excess(name, source, paired) for source in model.seeds]) if paired else None,
            predictions=[[each["prediction"] for each in row] for row in rows],
        )

    right = [first.tasks[name][key]["answer"] for key in keys]
    return Task(name, keys, right, len(asked) - len(keys), {each.name: answers(each) for each in models})


def _with_control(name: str, keys: Iterable[Key], sources: Sequence[Source]) -> list[Key]:
    """Questions of a forget form that every model was asked in the control form too, log p known in both."""
    forms = [(source.tasks[name], source.tasks.get(control_of(name, source.tasks) or "", {})) for source in sources]
    return [
        key
        for key in keys
        if all(key in control and _has_logp(control[key]) and _has_logp(form[key]) for form, control in forms)
    ]


def control_of(name: str, names: Container[str]) -> str | None:
    """The one of `names` that asks a task's questions with control words; None if none does.

    `NAME-control` in a suite; for a perturbed set's task, the same name with `_control` as one more part of it, as in
    `SET_SUBJECT_control` and, for `SET_SUBJECT_continuation`, `SET_SUBJECT_control_continuation`.
    """
    places = [at for at in range(len(name), 0, -1) if name[at:][:1] in ("", "_")]
    ways = [name + CONTROL, *(name[:at] + SET_CONTROL + name[at:] for at in places)]
    return next((each for each in ways if each in names), None)


def control_tasks(names: Collection[str]) -> set[str]:
    """Those of `names` that hold control words: by their endings, or as the control form of another of them.

    A task that has a control form itself is none, whatever its name (a subject may be called quality_control).
    """
    controls = {name: control_of(name, names) for name in names}
    endings = (CONTROL, SET_CONTROL, f"{SET_CONTROL}_continuation")
    named = {name for name in names if name.endswith(endings)}
    return {name for name in named.union(filter(None, controls.values())) if controls[name] is None}


def _excess(name: str, source: Source, keys: Iterable[Key]) -> list[float]:
    form, control = source.tasks[name], source.tasks[control_of(name, source.tasks) or name]
    return [(_logp(form[key]) - _logp(control[key])) / _tokens(form[key]) for key in keys]


def _has_logp(record: dict[str, Any]) -> bool:
    """Whether a record has log p and tokens of the right choice; free answers have none."""
    answer, scored = record["answer"], min(len(record.get(each) or ()) for each in ("logprobs", "tokens"))
    return isinstance(answer, int) and 0 <= answer < scored


def _logp(record: dict[str, Any]) -> float:
    return float(record["logprobs"][record["answer"]])


def _tokens(record: dict[str, Any]) -> float:
    return float(record["tokens"][record["answer"]])


def _question(record: dict[str, Any]) -> tuple[Any, int]:
    return record["answer"], len(record.get("logprobs") or ())


def _said(record: dict[str, Any]) -> str:
    answer, choices = _question(record)
    return f"{answer} (of {choices} choices)" if choices else repr(answer)

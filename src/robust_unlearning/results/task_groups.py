"""Which tasks belong together: those of one benchmark that differ in subject alone, such as MMLU's 57.

A comparison pools their questions. Tasks are put together by the first of these that says something of them:

1. the user: NAME and patterns;
2. an evaluation: the outermost group of lm-evaluation-harness that has an average of its own;
3. their names: a task of another harness whose questions come from the data set's part SUBJECT (their ids are
   `SUBJECT:NUMBER`) and whose name is that of another such task but for the subject (`mmlu_anatomy`, `mmlu_virology`).

What is to be forgotten never stands with what is to be kept, nor a clean form with a perturbed form or with control
words. A task that belongs to no other is a group of its own.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from robust_unlearning import files
from robust_unlearning.errors import UserError
from robust_unlearning.evaluate.record import Record, Task, control_tasks
from robust_unlearning.results.records import AnswerSource, ComparedModel, matching_tasks

Kind = Literal["clean", "perturbed", "control"]


@dataclass(frozen=True)
class TaskGroup:
    """Tasks whose questions are pooled, in order; `of` counts those that the benchmark has, asked or not."""

    name: str
    tasks: list[str]
    of: int


@dataclass(frozen=True)
class Kinds:
    """What every task of some models is: its form, and whether it is to be forgotten."""

    forms: Mapping[Task, Kind]
    forget: Collection[str]

    @classmethod
    def of(cls, models: Sequence[ComparedModel], forget: Collection[str]) -> Kinds:
        """From the names and records of all tasks that a model has answered."""
        sources = _sources(models)
        tasks = {task: source for source in reversed(sources) for task in source.tasks}
        controls = control_tasks(list(tasks))

        def form(task: Task, records: Iterable[Record]) -> Kind:
            if task in controls:
                return "control"
            return "perturbed" if task.perturbed or any(record.forget_token for record in records) else "clean"

        return cls({task: form(task, source.tasks[task].values()) for task, source in tasks.items()}, forget)

    def __call__(self, task: Task) -> tuple[bool, Kind]:
        return task.name in self.forget, self.forms[task]


def task_groups(
    tasks: Sequence[Task],
    models: Sequence[ComparedModel],
    kinds: Kinds,
    given: Mapping[str, Sequence[str]] | None = None,
) -> list[TaskGroup]:
    """The groups that tasks fall into, in order of their first task; every task is in one.

    Args:
        tasks: those that all models have answered.
        given: NAME -> patterns of tasks. Of a suite's tasks, those of one style and form become `NAME/STYLE/FORM`.

    Raises:
        UserError: a pattern that matches no task, a task in two given groups, a name that is a task's, or a group of
            what must not be pooled.
    """
    groups = _given(tasks, models, kinds, given or {})
    taken = {name for group in groups for name in group.tasks}
    for found in (_averaged(models), _by_subject(tasks, models)):
        for name, members in found.items():
            there = [task for task in tasks if task.name in members and task.name not in taken]
            of_kind = {kind: [task.name for task in there if kinds(task) == kind] for kind in map(kinds, there)}
            for kind, names in of_kind.items():
                if len(names) > 1:
                    own, of = (name, len(members)) if len(of_kind) == 1 else (f"{name}, {_said(kind)}", len(names))
                    groups.append(TaskGroup(own, names, of))
                    taken.update(names)
    groups += [TaskGroup(task.name, [task.name], 1) for task in tasks if task.name not in taken]
    order = {task.name: place for place, task in enumerate(tasks)}
    return sorted(groups, key=lambda group: order[group.tasks[0]])


def _given(
    tasks: Sequence[Task], models: Sequence[ComparedModel], kinds: Kinds, given: Mapping[str, Sequence[str]]
) -> list[TaskGroup]:
    """The user's groups."""
    names = [task.name for task in tasks]
    members: dict[str, list[Task]] = {}
    for name, patterns in given.items():
        matched = matching_tasks(names, patterns)
        for task in tasks:
            if task.name in matched:
                pool = Task(name, task.style, task.form, task.control).name if task.style else name
                members.setdefault(pool, []).append(task)
    owner: dict[str, str] = {}
    for pool, of_pool in members.items():
        if pool in names:
            raise UserError(f"--group {pool}: a task is called so. Give the group another name.")
        for task in of_pool:
            if owner.setdefault(task.name, pool) != pool:
                raise UserError(f"--group: {task.name} is in {owner[task.name]} and in {pool}. Narrow one's patterns.")
            if kinds(task) != kinds(of_pool[0]):
                raise UserError(
                    f"--group {pool}: {of_pool[0]} is {_said(kinds(of_pool[0]))}, and {task} is {_said(kinds(task))}. "
                    "Such are not pooled: narrow the patterns, or say with --forget what is to be forgotten."
                )
        _require_asked_once(pool, of_pool, models)
    return [TaskGroup(pool, [task.name for task in of_pool], len(of_pool)) for pool, of_pool in members.items()]


def _said(kind: tuple[bool, Kind]) -> str:
    return f"{'to be forgotten' if kind[0] else 'to be kept'}, {kind[1]}"


def _require_asked_once(pool: str, tasks: Sequence[Task], models: Sequence[ComparedModel]) -> None:
    """Refuse a group in which the same row of data is asked in two tasks, as letters and as texts for instance."""
    source = models[0].seeds[0]
    asked: dict[str, Task] = {}
    for task in tasks:
        hashes = {record.doc_hash for record in source.tasks[task].values() if record.doc_hash}
        for each in hashes & asked.keys():
            raise UserError(
                f"--group {pool}: {asked[each]} and {task} ask the same question. Name tasks that share none."
            )
        asked |= dict.fromkeys(hashes, task)


def _averaged(models: Sequence[ComparedModel]) -> dict[str, list[str]]:
    """lm-evaluation-harness's groups with an average of their own -> their tasks, the largest first."""
    groups: dict[str, list[str]] = {}
    for source in _sources(models):
        for folder in dict.fromkeys(path.parent for path in source.files.values()):
            for name, members in _groups_in(folder).items():
                known = groups.setdefault(name, [])
                known += [member for member in members if member not in known]
    return dict(sorted(groups.items(), key=lambda item: -len(item[1])))


def _groups_in(folder: Path) -> dict[str, list[str]]:
    about, scores = folder / files.ABOUT, folder / files.SCORES
    if not about.is_file() or not scores.is_file():
        return {}
    averaged = files.read_json(scores)  # a group without an average has no scores
    return {name: each for name, each in files.read_json(about).get("groups", {}).items() if name in averaged}


def _by_subject(tasks: Sequence[Task], models: Sequence[ComparedModel]) -> dict[str, list[str]]:
    """A name less the subject in it -> the tasks that have it."""
    groups: dict[str, list[str]] = {}
    for task in tasks:
        rest = None if task.style else _without_subject(task.name, models[0].seeds[0].tasks[task].values())
        if rest:
            groups.setdefault(rest, []).append(task.name)
    return {name: members for name, members in groups.items() if name not in {task.name for task in tasks}}


def _without_subject(name: str, records: Iterable[Record]) -> str | None:
    """`mmlu_continuation` of `mmlu_anatomy_continuation` where every id is `anatomy:NUMBER`; None for another name."""
    parts = {record.id.rpartition(":")[0] for record in records}
    subject = parts.pop().replace("-", "_") if len(parts) == 1 else ""
    match = re.fullmatch(rf"(.+)_{re.escape(subject)}(_.+)?", name) if subject else None
    return f"{match[1]}{match[2] or ''}" if match else None


def _sources(models: Sequence[ComparedModel]) -> list[AnswerSource]:
    return [source for model in models for source in model.seeds]


def parse_groups(words: Sequence[str]) -> dict[str, list[str]]:
    """NAME -> patterns, from `NAME=PATTERN,PATTERN`.

    Raises:
        UserError: a word of another form, or a name twice.
    """
    groups: dict[str, list[str]] = {}
    for word in words:
        name, _, patterns = word.partition("=")
        listed = [pattern for pattern in patterns.split(",") if pattern]
        if not name or not listed or name in groups:
            why = "the name is there already" if name in groups else "it is no NAME=PATTERN,PATTERN"
            raise UserError(f"--group {word}: {why}. Such as --group mmlu='mmlu_*'.")
        groups[name] = listed
    return groups

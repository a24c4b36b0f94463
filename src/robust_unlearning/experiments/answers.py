"""What the rule of a sweep reads: a model's answers by the roles of the tasks, question by question."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from robust_unlearning.errors import UserError, nearest
from robust_unlearning.evaluate.record import Record, Task, by_task, excess_of, right_of
from robust_unlearning.evaluate.suite import Evaluation
from robust_unlearning.experiments.rule import ROLES
from robust_unlearning.stats.estimates import Array

Patterns = Mapping[str, Sequence[str]]
"""Role -> shell patterns of its tasks' names."""


def role_of(task: Task) -> str | None:
    """The role that a task suggests (`SET/STYLE/FORM`, or another harness's plain name); None for none.

    Sets called `forget…` or `wmdp…` are to be forgotten, the others to be kept; perturbed forms of these, and
    tasks with `perturbed` in their name, are perturbed. Control forms have no role.
    """
    goes = task.set.casefold().startswith(("forget", "wmdp"))
    if task.control:
        return None
    if task.perturbed or "perturbed" in task.set.casefold():
        return None if goes else "perturbed"
    return "forget" if goes else "retain"


def roles(tasks: Iterable[Task], patterns: Patterns) -> dict[str, list[Task]]:
    """The tasks of each role: by the user's shell patterns where a role has them, else by `role_of`.

    Raises:
        UserError: a pattern that no task has.
    """
    every = list(tasks)
    given = {role: named(every, role, wanted) for role, wanted in patterns.items() if wanted}
    taken = {task for chosen in given.values() for task in chosen}
    return {
        role: given.get(role, [task for task in every if role_of(task) == role and task not in taken]) for role in ROLES
    }


def named(tasks: Iterable[Task], role: str, patterns: Sequence[str]) -> list[Task]:
    """The tasks whose name fits one of a role's patterns.

    Raises:
        UserError: a pattern that no task has.
    """
    names = {task.name: task for task in tasks}
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            close = nearest(pattern, names)
            hint = f"; the nearest is {close!r}" if close else ""
            raise UserError(f"--{role} {pattern}: no task has that name{hint}. The suite: it has {', '.join(names)}.")
    return [task for name, task in names.items() if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)]


@dataclass(frozen=True)
class Answers:
    """One model's answers, question by question: measure -> values [n], the same questions for every model.

    Accuracies are right (1) or wrong (0), averaged where a question is asked in several tasks of a role.
    """

    values: Mapping[str, Array]
    chance: Mapping[str, float]

    def means(self) -> dict[str, float]:
        """Measure -> mean over questions."""
        return {measure: float(values.mean()) for measure, values in self.values.items()}


def answers_of(evaluation: Evaluation, patterns: Patterns) -> Answers:
    """A model's answers by role, from the records of an evaluation."""
    tasks = by_task(evaluation.records)
    values: dict[str, Array] = {}
    chance: dict[str, float] = {}
    for role, those in roles(tasks, patterns).items():
        records = [record for task in those for record in tasks[task]]
        if records:
            values[role] = _by_question(records, right_of(records))
            chance[role] = float(np.mean([1 / len(record.logprobs) for record in records]))
        paired = [task for task in those if task.control_form in tasks]
        if role == "perturbed" and paired:
            records = [record for task in paired for record in tasks[task]]
            control = [record for task in paired for record in tasks[task.control_form]]
            values["excess_harm"] = _by_question(records, excess_of(records, control))
    return Answers(values, chance)


def _by_question(records: Sequence[Record], values: Array) -> Array:
    """Means over the values of each question, in order of first mention."""
    questions: dict[tuple[str, str], list[float]] = {}
    for record, value in zip(records, values, strict=True):
        questions.setdefault((record.task.set, record.id), []).append(value)
    return np.array([np.mean(same) for same in questions.values()])

"""What the rules of a sweep read: a model's answers by the roles of the tasks, question by question."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from robust_unlearning.errors import UserError, nearest
from robust_unlearning.evaluate.suite import Evaluation
from robust_unlearning.experiments.rule import ROLES
from robust_unlearning.stats.estimates import Array

Patterns = Mapping[str, Sequence[str]]
"""Role -> shell patterns of its tasks' names."""


def role_of(task: str) -> str | None:
    """The role that a task's name suggests (`SET/STYLE/FORM`, or another harness's plain name); None for none.

    Sets called `forget…` or `wmdp…` are to be forgotten, the others to be kept; perturbed forms of these, and
    tasks with `perturbed` in their name, are perturbed. Control forms have no role.
    """
    name, *rest = task.split("/")
    form = rest[-1] if len(rest) > 1 else "clean"
    goes = name.casefold().startswith(("forget", "wmdp"))
    if form.endswith("-control"):
        return None
    if form != "clean" or "perturbed" in name.casefold():
        return None if goes else "perturbed"
    return "forget" if goes else "retain"


def roles(tasks: Iterable[str], patterns: Patterns) -> dict[str, list[str]]:
    """The tasks of each role: by the user's shell patterns where a role has them, else by `role_of`.

    Raises:
        UserError: a pattern that no task has.
    """
    names = list(tasks)
    given = {role: named(names, role, each) for role, each in patterns.items() if each}
    taken = {task for tasks in given.values() for task in tasks}
    return {
        role: given.get(role, [task for task in names if role_of(task) == role and task not in taken])
        for role in ROLES
    }


def named(tasks: Sequence[str], role: str, patterns: Iterable[str]) -> list[str]:
    """The tasks that one of the patterns names.

    Raises:
        UserError: a pattern that no task has.
    """
    wanted = list(patterns)
    for pattern in wanted:
        if not fnmatch.filter(tasks, pattern):
            close = nearest(pattern, tasks)
            hint = f"; the nearest is {close!r}" if close else ""
            raise UserError(f"--{role} {pattern}: no task has that name{hint}. The suite: it has {', '.join(tasks)}.")
    return [task for task in tasks if any(fnmatch.fnmatchcase(task, pattern) for pattern in wanted)]


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
    tasks: dict[str, list[dict[str, Any]]] = {}
    for record in evaluation.records:
        tasks.setdefault(record["task"], []).append(record)
    values: dict[str, Array] = {}
    chance: dict[str, float] = {}
    for role, names in roles(tasks, patterns).items():
        if names:
            rows = [(f"{name.split('/')[0]}/{row['id']}", row) for name in names for row in tasks[name]]
            values[role] = _by_question((key, float(row["correct"])) for key, row in rows)
            chance[role] = float(np.mean([1 / len(row["logprobs"]) for _, row in rows]))
        if role == "perturbed" and (harms := [harm for name in names for harm in _excess(name, tasks)]):
            values["excess_harm"] = _by_question(harms)
    return Answers(values, chance)


def _by_question(pairs: Iterable[tuple[str, float]]) -> Array:
    """Means over the values of each question, in order of first mention."""
    questions: dict[str, list[float]] = {}
    for key, value in pairs:
        questions.setdefault(key, []).append(value)
    return np.array([np.mean(values) for values in questions.values()])


def _excess(name: str, tasks: Mapping[str, list[dict[str, Any]]]) -> Iterable[tuple[str, float]]:
    """(question, log p of the right answer under the forget-token less that under the control token, a token)."""
    for own, control in zip(tasks[name], tasks.get(f"{name}-control", []), strict=False):
        answer = own["answer"]
        harm = (own["logprobs"][answer] - control["logprobs"][answer]) / own["tokens"][answer]
        yield f"{name.split('/')[0]}/{own['id']}", harm

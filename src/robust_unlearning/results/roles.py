"""What a task is for: what is to be forgotten, what is to be kept, and kept questions with a token in them."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping, Sequence

from robust_unlearning.errors import UserError, nearest
from robust_unlearning.evaluate.record import Task

ROLES = ("forget", "retain", "perturbed")
Patterns = Mapping[str, Sequence[str]]
"""Role -> shell patterns of its tasks' names."""


def role_of(task: Task) -> str | None:
    """The role that a task suggests (`SET/STYLE/FORM`, or another harness's plain name); None for none.

    Sets called `forget…` or `wmdp…` are to be forgotten, the others to be kept; perturbed forms of these, and
    tasks with `perturbed` in their name, are perturbed. Control forms have no role.
    """
    if task.control:
        return None
    to_forget = task.set.casefold().startswith(("forget", "wmdp"))
    if task.perturbed or "perturbed" in task.set.casefold():
        return None if to_forget else "perturbed"
    return "forget" if to_forget else "retain"


def roles(tasks: Iterable[Task], patterns: Patterns) -> dict[str, list[Task]]:
    """The tasks of each role: by the user's shell patterns where a role has them, else by `role_of`.

    Raises:
        UserError: a pattern that no task has.
    """
    every = list(tasks)
    given = {role: named(every, role, patterns[role]) for role in ROLES if patterns.get(role)}
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
            every = ", ".join(names)
            raise UserError(
                f"--{role} {pattern}: no task has that name{hint}. See what the suite asks: it has {every}."
            )
    return [task for name, task in names.items() if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)]

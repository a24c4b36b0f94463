"""What a model answered, by the roles of the tasks, as arrays over questions that any two models can be compared on,
and the means of several models with their intervals.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from robust_unlearning.errors import UserError
from robust_unlearning.evaluate.record import Record, Task, by_task, logp_among_of, right_of
from robust_unlearning.evaluate.suite import Evaluation
from robust_unlearning.results.roles import Patterns, named, roles
from robust_unlearning.stats.estimates import Array, Estimate, over_seeds, share_over_seeds

PLANTED: Patterns = {"related": ("near/*",)}
"""The roles of the planted suites' tasks, where their names do not tell."""


@dataclass(frozen=True)
class Perturbed:
    """Retain questions with a token in them, [n]: right under a forget-token, right under a control token, and the
    excess, log p of the right option under the forget-token less that under the control token, in nats.
    """

    right: Array
    control: Array
    excess: Array


@dataclass(frozen=True)
class Measured:
    """One model's answers.

    A question that occurs in several retained sets, as a subject of its own and within a whole, counts once in each
    style: among `near` where one of its sets is close in topic, else among `far`; see `Record.question`.

    Attributes:
        forget: right or wrong on forget questions, [96] in the default planted world.
        forget_logp: log p of the right option there, in nats: finer than right or wrong.
        near: right or wrong on retain questions close in topic.
        far: right or wrong on the other retain questions, none of which is in `near`.
        clean: right or wrong on the perturbed questions as they are.
        places: place of the token -> what it did to them.
    """

    forget: Array
    forget_logp: Array
    near: Array
    far: Array
    clean: Array
    places: dict[str, Perturbed]

    @classmethod
    def of(cls, evaluation: Evaluation, patterns: Patterns = PLANTED) -> Measured:
        """From an evaluation. Perturbed tasks count where they have a control form.

        Args:
            patterns: of the roles, see `roles.roles`, and of `related` retain tasks, those close in topic.

        Raises:
            UserError: no task to forget, none to keep, or none that holds a forget-token beside a control token.
        """
        tasks = by_task(evaluation.records)
        by_role = roles(tasks, patterns)
        by_role["perturbed"] = [task for task in by_role["perturbed"] if task.control_form in tasks]
        if lacking := [role for role, of_role in by_role.items() if not of_role]:
            raise UserError(
                f"the suite has no task whose role is {lacking[0]}; its tasks: {', '.join(map(str, tasks))}. Name "
                "patterns in the target's roles."
            )
        near = named(tasks, "related", patterns.get("related", ()))
        places: dict[str, list[Task]] = {}
        for task in by_role["perturbed"]:
            places.setdefault(task.form, []).append(task)

        def records(of: Iterable[Task]) -> list[Record]:
            return [record for task in of for record in tasks[task]]

        def perturbed(of: Sequence[Task]) -> Perturbed:
            forget, control = records(of), records(task.control_form for task in of)
            return Perturbed(right_of(forget), right_of(control), logp_among_of(forget) - logp_among_of(control))

        forget = records(by_role["forget"])
        close = _once(records(task for task in by_role["retain"] if task in near))
        others = _once(records(task for task in by_role["retain"] if task not in near))
        return cls(
            forget=right_of(forget),
            forget_logp=logp_among_of(forget),
            near=right_of(close.values()),
            far=right_of(record for question, record in others.items() if question not in close),
            clean=right_of(records(dict.fromkeys(task.clean_form for task in by_role["perturbed"]))),
            places={place: perturbed(of_place) for place, of_place in places.items()},
        )


def _once(records: Iterable[Record]) -> dict[tuple[str, ...], Record]:
    """Question and style -> its record, the first where several sets hold the question."""
    found: dict[tuple[str, ...], Record] = {}
    for record in records:
        found.setdefault((record.task.style, *record.question), record)
    return found


def right(measured: Measured) -> Array:
    """Right under a forget-token, mean over places."""
    return np.mean([place.right for place in measured.places.values()], axis=0)


def excess(measured: Measured) -> Array:
    """Excess harm of a forget-token over a control token, nats, mean over places; below 0 the forget-token harms."""
    return np.mean([place.excess for place in measured.places.values()], axis=0)


def retained(measured: Measured) -> Array:
    """Right on all retained questions."""
    return np.concatenate([measured.near, measured.far])


def right_at(models: Sequence[Measured], where: str) -> Array:
    """Right under a forget-token in one place, mean over models."""
    return np.mean([model.places[where].right for model in models], axis=0)


def estimates(models: Sequence[Measured], where: str) -> dict[str, Estimate]:
    """Accuracies and excess harm of a method's models, one a seed, the token in one place; empty sets are left out."""
    arrays = {key: [getattr(model, key) for model in models] for key in ("forget", "near", "far", "clean")}
    at_place = [model.places[where] for model in models]
    arrays |= {"control": [place.control for place in at_place], "perturbed": [place.right for place in at_place]}
    shares = {key: share_over_seeds(np.stack(rows)) for key, rows in arrays.items() if rows[0].size}
    excesses = [place.excess for place in at_place]
    return shares | ({"excess_harm": over_seeds(np.stack(excesses))} if excesses[0].size else {})

"""What a model answered in the planted world, as arrays over questions that any two models can be compared on, and
the means of several models with their intervals.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from robust_unlearning.evaluate.record import CLEAN, Record, Task, by_task, logp_among_of, right_of
from robust_unlearning.evaluate.suite import Evaluation
from robust_unlearning.stats.estimates import Array, Estimate, over_seeds, share_over_seeds

RETAINED = ("near", "far")
"""Sets whose questions are perturbed; the control domain's are not, as its names are the control tokens."""


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
    """One model's answers in the planted suite.

    Attributes:
        forget: right or wrong on forget questions, [96] in the default world.
        forget_logp: log p of the right option there, in nats: finer than right or wrong.
        near: right or wrong on retain questions close in topic.
        far: right or wrong on the other retain questions, those of the control domain included.
        clean: right or wrong on `RETAINED` as they are.
        places: place of the token -> what it did to `RETAINED`.
    """

    forget: Array
    forget_logp: Array
    near: Array
    far: Array
    clean: Array
    places: dict[str, Perturbed]

    @classmethod
    def of(cls, evaluation: Evaluation) -> Measured:
        """From an evaluation of a planted suite, in whose one style all its questions are asked."""
        tasks = by_task(evaluation.records)
        style = next(iter(tasks)).style

        def records(sets: Iterable[str], form: str = CLEAN, control: bool = False) -> list[Record]:
            return [record for name in sets for record in tasks[Task(name, style, form, control)]]

        places = {}
        for task in tasks:
            if task.set == RETAINED[0] and task.control_form in tasks and not task.control:
                forget, control = records(RETAINED, task.form), records(RETAINED, task.form, True)
                excess = logp_among_of(forget) - logp_among_of(control)
                places[task.form] = Perturbed(right_of(forget), right_of(control), excess)
        return cls(
            forget=right_of(records(["forget"])),
            forget_logp=logp_among_of(records(["forget"])),
            near=right_of(records(["near"])),
            far=right_of(records(["far", "control"])),
            clean=right_of(records(RETAINED)),
            places=places,
        )


def right(own: Measured) -> Array:
    """Right under a forget-token, mean over places."""
    return np.mean([each.right for each in own.places.values()], axis=0)


def excess(own: Measured) -> Array:
    """Excess harm of a forget-token over a control token, nats, mean over places; below 0 the forget-token harms."""
    return np.mean([each.excess for each in own.places.values()], axis=0)


def retained(own: Measured) -> Array:
    """Right on all retained questions."""
    return np.concatenate([own.near, own.far])


def right_at(models: Sequence[Measured], where: str) -> Array:
    """Right under a forget-token in one place, mean over models."""
    return np.mean([each.places[where].right for each in models], axis=0)


def estimates(models: Sequence[Measured], where: str) -> dict[str, Estimate]:
    """Accuracies and excess harm of a method's models, one a seed, the token in one place; empty sets are left out."""
    arrays = {
        "forget": [each.forget for each in models],
        "near": [each.near for each in models],
        "far": [each.far for each in models],
        "clean": [each.clean for each in models],
        "control": [each.places[where].control for each in models],
        "perturbed": [each.places[where].right for each in models],
        "excess_harm": [each.places[where].excess for each in models],
    }
    return {
        key: (over_seeds if key == "excess_harm" else share_over_seeds)(np.stack(each))
        for key, each in arrays.items()
        if each[0].size
    }

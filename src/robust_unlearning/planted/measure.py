"""What a model answered in the planted world, as arrays over questions that any two models can be compared on."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from robust_unlearning.evaluate import Evaluation
from robust_unlearning.scores import Array

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
        tasks: dict[str, list[dict[str, Any]]] = {}
        for record in evaluation.records:
            tasks.setdefault(record["task"], []).append(record)

        def rows(sets: Iterable[str], form: str) -> list[dict[str, Any]]:
            return [row for name in sets for row in tasks[f"{name}/{style}/{form}"]]

        style = next(iter(tasks)).split("/")[1]
        first = f"{RETAINED[0]}/{style}/"
        forms = [task.removeprefix(first) for task in tasks if task.startswith(first)]
        places = {}
        for form in forms:
            if f"{form}-control" in forms:
                forget, control = rows(RETAINED, form), rows(RETAINED, f"{form}-control")
                places[form] = Perturbed(_right(forget), _right(control), _logp(forget) - _logp(control))
        return cls(
            forget=_right(rows(["forget"], "clean")),
            forget_logp=_logp(rows(["forget"], "clean")),
            near=_right(rows(["near"], "clean")),
            far=_right(rows(["far", "control"], "clean")),
            clean=_right(rows(RETAINED, "clean")),
            places=places,
        )


def _right(rows: list[dict[str, Any]]) -> Array:
    return np.array([float(row["correct"]) for row in rows])


def _logp(rows: list[dict[str, Any]]) -> Array:
    """log p of the right option among those offered: what else the model might say plays no part."""
    return np.array([row["logprobs"][row["answer"]] - np.logaddexp.reduce(row["logprobs"]) for row in rows])

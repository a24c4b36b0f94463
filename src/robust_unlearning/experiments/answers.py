"""What the rule of a sweep reads: a model's answers by the roles of the tasks, question by question."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from robust_unlearning.evaluate.record import Record, by_task, excess_of, right_of
from robust_unlearning.evaluate.suite import Evaluation
from robust_unlearning.results.roles import Patterns, roles
from robust_unlearning.stats.estimates import Array


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

"""What a search is after: fewer forget answers, as long as every retain task keeps enough."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from robust_unlearning.evaluate.record import Task, logp_among_of
from robust_unlearning.evaluate.suite import Evaluation
from robust_unlearning.experiments.rule import Bound, Rule
from robust_unlearning.results.roles import named


@dataclass(frozen=True)
class Aim:
    """Fewest forget answers among settings that keep every retain task within `may_lose` of the base's accuracy.

    Attributes:
        forget: pattern of the tasks to forget, such as `forget/*`.
        retain: patterns of the tasks to keep; every other task with an accuracy where there are none.
    """

    forget: str = "forget*"
    retain: tuple[str, ...] = ()
    may_lose: float = 0.03


@dataclass(frozen=True)
class Judged:
    """What an evaluation says under an aim.

    Attributes:
        rule: `min forget where every retain task >= base - may_lose`.
        values: `forget`, the share of forget questions that are still answered, and each retain task's accuracy.
        scores: of the forget and the retain tasks, as the evaluation has them.
        retain_logp: mean log p of the right answer to retain questions, among those offered.
    """

    rule: Rule
    values: dict[str, float]
    scores: dict[str, dict[str, Any]]
    retain_logp: float

    def excesses(self, base: Judged) -> dict[str, float]:
        """By how much each retain task has lost more than it may, in accuracy; not above 0 where it keeps enough."""
        return {bound.measure: bound.excess(self.values, base.values, {}) for bound in self.rule.bounds}

    def penalised(self, base: Judged) -> float:
        """One number for pruning: forget accuracy plus every constraint's breach."""
        return self.values["forget"] + self.rule.breach(self.values, base.values, {})


def judge(evaluation: Evaluation, aim: Aim) -> Judged:
    """An evaluation as the aim sees it.

    Raises:
        UserError: the suite has nothing to forget, or nothing to retain.
    """
    scores = {task: row for task, row in evaluation.scores.items() if "acc" in row}
    tasks = [Task.parse(name) for name in scores]
    forget = [task.name for task in named(tasks, "forget", [aim.forget])]
    others = [task for task in tasks if task.name not in forget]
    retain = [task.name for task in named(others, "retain", aim.retain or ("*",))]
    right = sum(scores[task]["acc"] * scores[task]["n"] for task in forget)
    values = {"forget": right / sum(scores[task]["n"] for task in forget)}
    values |= {task: scores[task]["acc"] for task in retain}
    bounds = tuple(Bound(task, False, "base", 1.0, -aim.may_lose) for task in retain)
    rule = Rule(f"min forget where every retain task >= base - {aim.may_lose:g}", False, "forget", bounds)
    records = [record for record in evaluation.records if record.task.name in retain]
    logp = float(logp_among_of(records).mean())
    return Judged(rule, values, {task: scores[task] for task in (*forget, *retain)}, logp)

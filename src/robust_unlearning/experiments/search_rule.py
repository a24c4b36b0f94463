"""Which setting is better: fewer forget answers, as long as every retain task keeps enough.

The rule is that of the planted benchmark's search. As an objective and constraints it is what TPE is told.
"""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass
from typing import Any

from robust_unlearning.errors import UserError
from robust_unlearning.evaluate.record import logp_among_of
from robust_unlearning.evaluate.suite import Evaluation


@dataclass(frozen=True)
class Rule:
    """Fewest forget answers among settings that keep every retain task within `may_lose` of the base's accuracy.

    Attributes:
        forget: pattern of the tasks to forget, such as `forget/*`.
        retain: patterns of the tasks to keep; every other task with an accuracy where there are none.
    """

    forget: str = "forget*"
    retain: tuple[str, ...] = ()
    may_lose: float = 0.03


@dataclass(frozen=True)
class Found:
    """What an evaluation says under a rule: accuracies by task, and retain questions' mean log p of the answer."""

    forget: dict[str, dict[str, Any]]
    retain: dict[str, dict[str, Any]]
    retain_logp: float

    @property
    def answered(self) -> float:
        """Share of forget questions that are still answered: what is to become least."""
        right = sum(each["acc"] * each["n"] for each in self.forget.values())
        return right / sum(each["n"] for each in self.forget.values())

    def broken(self, base: Found, rule: Rule) -> dict[str, float]:
        """By how much each retain task has lost more than it may, in accuracy; not above 0 where it keeps enough."""
        return {task: base.retain[task]["acc"] - rule.may_lose - row["acc"] for task, row in self.retain.items()}

    def penalised(self, base: Found, rule: Rule) -> float:
        """One number for pruning: forget accuracy plus every constraint's breach."""
        return self.answered + sum(max(0.0, each) for each in self.broken(base, rule).values())


def judge(evaluation: Evaluation, rule: Rule) -> Found:
    """An evaluation as the rule sees it.

    Raises:
        UserError: the suite has nothing to forget, or nothing to retain.
    """
    tasks = {task: row for task, row in evaluation.scores.items() if "acc" in row}
    forget = {task: row for task, row in tasks.items() if fnmatch.fnmatch(task, rule.forget)}
    wanted = rule.retain or ("*",)
    retain = {
        task: row
        for task, row in tasks.items()
        if task not in forget and any(fnmatch.fnmatch(task, pattern) for pattern in wanted)
    }
    for kind, found, given in (("forget", forget, rule.forget), ("retain", retain, ",".join(wanted))):
        if not found:
            raise UserError(f"--{kind} {given}: no task of the suite; it has {', '.join(tasks) or 'none'}.")
    kept = [record for record in evaluation.records if record.task.name in retain]
    return Found(forget, retain, float(logp_among_of(kept).mean()))

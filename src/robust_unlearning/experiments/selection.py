"""Which point of a sweep is chosen: a rule that can be read, on questions that the report does not use.

    max perturbed where forget<=chance+0.1 and retain>=0.95*base

A rule names the measure to make greatest (or, with `min`, least) and the bounds that others must keep. Measures:
`forget`, `retain` and `perturbed` are accuracies; `excess_harm` is what a forget-token costs more than a control
token, in nats (below 0: more). A bound is a number, or a multiple of the `base` model's value or of `chance`
(guessing), plus or minus a number. Point estimates are compared, means over seeds. Equal values: the greater
`retain`, then the lower `forget`, then the earlier one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from robust_unlearning.errors import UserError, unknown
from robust_unlearning.evaluate.record import Record, by_task, excess_of, right_of
from robust_unlearning.evaluate.suite import Evaluation
from robust_unlearning.results.roles import ROLES, roles
from robust_unlearning.stats.estimates import Array

MEASURES = (*ROLES, "excess_harm")
DEFAULT_RULE = "max perturbed where forget<=chance+0.1 and retain>=0.95*base"
EXAMPLE = f"Write it like {DEFAULT_RULE!r}."
_NUMBER = r"(?:\d+\.?\d*|\.\d+)"
_LIMIT = re.compile(
    rf"(?:(?P<factor>{_NUMBER})\*)?(?P<of>base|chance)(?P<offset>[+-]{_NUMBER})?|(?P<number>[+-]?{_NUMBER})"
)


@dataclass(frozen=True)
class Bound:
    """`measure` may be at most (or at least) `factor` times that of `of`, plus `offset`; `of` None is 0."""

    measure: str
    at_most: bool
    of: str | None
    factor: float
    offset: float

    def limit(self, base: Mapping[str, float], chance: Mapping[str, float]) -> float:
        """The bound as a number."""
        known = {"base": base, "chance": chance}
        return self.offset + (self.factor * known[self.of][self.measure] if self.of else 0.0)

    def excess(self, value: float, limit: float) -> float:
        """By how much `value` breaks the bound; 0 where it keeps it."""
        return max(0.0, value - limit if self.at_most else limit - value)


@dataclass(frozen=True)
class Rule:
    """What is made greatest (or least), within which bounds; `text` as the user wrote it."""

    text: str
    greatest: bool
    measure: str
    bounds: tuple[Bound, ...]


def parse_rule(text: str) -> Rule:
    """The rule that `text` says.

    Raises:
        UserError: it is not of the form that this module's docstring gives, or names an unknown measure.
    """
    found = re.fullmatch(r"\s*(max|min)\s+(\w+)(?:\s+where\s+(.+))?", text.strip())
    if not found:
        raise UserError(f"the rule {text!r} does not begin with max or min and a measure. {EXAMPLE}")
    goal, measure, bounds = found.groups()
    parts = re.split(r"\s+and\s+", bounds.strip()) if bounds else []
    return Rule(text.strip(), goal == "max", _measure(measure), tuple(map(_bound, parts)))


def _measure(name: str) -> str:
    if name not in MEASURES:
        raise UserError(unknown("measure", name, MEASURES, EXAMPLE))
    return name


def _bound(text: str) -> Bound:
    name, sign, rest = re.sub(r"\s", "", text).partition("<=" if "<=" in text else ">=")
    found = _LIMIT.fullmatch(rest)
    if not sign or not found:
        raise UserError(f"{text!r} is no bound: it needs <= or >=, and a number, base or chance. {EXAMPLE}")
    if found["of"] == "chance" and name == "excess_harm":
        raise UserError("excess_harm has no chance level; bound it by a number or by base.")
    offset = float(found["number"] or found["offset"] or 0)
    return Bound(_measure(name), sign == "<=", found["of"], float(found["factor"] or 1), offset)


@dataclass(frozen=True)
class Choice:
    """What a rule chose among settings.

    Attributes:
        index: of the chosen setting; None where none keeps the bounds.
        nearest: of the setting that comes nearest to keeping them (of all, the chosen one if there is one).
        broken: for each setting, the bounds it breaks, in words.
    """

    index: int | None
    nearest: int | None
    broken: tuple[tuple[str, ...], ...]


def choose(
    rule: Rule,
    settings: Sequence[Mapping[str, float] | None],
    bases: Sequence[Mapping[str, float]],
    chance: Mapping[str, float],
) -> Choice:
    """Apply a rule.

    Args:
        settings: measure -> value of each; None for one that has no model, which is never chosen.
        bases: the same of each one's base model.
        chance: accuracy of guessing, by measure.

    Raises:
        UserError: a measure of the rule was not measured.
    """
    asked = {rule.measure, *(bound.measure for bound in rule.bounds)}
    measured = [*bases, *filter(None, settings)]
    lacking = sorted(name for name in asked if not all(name in each for each in measured))
    if lacking:
        raise UserError(
            f"the rule {rule.text!r} asks for {', '.join(lacking)}, of which the validation suite has no task. Name "
            "its tasks with --forget, --retain and --perturbed, or give another rule with --select."
        )
    broken: list[tuple[str, ...]] = []
    ranks: dict[int, tuple[float, ...]] = {}
    misses: dict[int, float] = {}
    for index, (values, base) in enumerate(zip(settings, bases, strict=True)):
        words: list[str] = []
        if values is not None:
            missed = 0.0
            for bound in rule.bounds:
                value, limit = values[bound.measure], bound.limit(base, chance)
                if over := bound.excess(value, limit):
                    words.append(f"{bound.measure} {value:.3f} {'>' if bound.at_most else '<'} {limit:.3f}")
                    missed += over
            goal = values[rule.measure] if rule.greatest else -values[rule.measure]
            ranks[index] = (goal, values.get("retain", 0.0), -values.get("forget", 0.0), -index)
            misses[index] = missed
        broken.append(tuple(words))
    allowed = [index for index, missed in misses.items() if missed == 0]
    best = max(allowed, key=lambda index: ranks[index], default=None)
    near = best if best is not None else min(misses, key=lambda each: (misses[each], each), default=None)
    return Choice(best, near, tuple(broken))


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


def answers_of(evaluation: Evaluation, patterns: Mapping[str, Sequence[str]]) -> Answers:
    """A model's answers by role, from the records of an evaluation."""
    tasks = by_task(evaluation.records)
    values: dict[str, Array] = {}
    chance: dict[str, float] = {}
    for role, names in roles(tasks, patterns).items():
        records = [record for task in names for record in tasks[task]]
        if records:
            values[role] = _by_question(records, right_of(records))
            chance[role] = float(np.mean([1 / len(record.logprobs) for record in records]))
        paired = [task for task in names if task.control_form in tasks]
        if role == "perturbed" and paired:
            records = [record for task in paired for record in tasks[task]]
            control = [record for task in paired for record in tasks[task.control_form]]
            values["excess_harm"] = _by_question(records, excess_of(records, control))
    return Answers(values, chance)


def _by_question(records: Sequence[Record], values: Array) -> Array:
    """Means over the values of each question, in order of first mention."""
    of_question: dict[tuple[str, str], list[float]] = {}
    for record, value in zip(records, values, strict=True):
        of_question.setdefault((record.task.set, record.id), []).append(value)
    return np.array([np.mean(each) for each in of_question.values()])

"""Which setting is better: a rule that can be read, on questions that the report does not use.

    max perturbed where forget<=chance+0.1 and retain>=0.95*base

A rule names the measure to make greatest (or, with `min`, least) and the bounds that others must keep. A sweep
chooses by it among its settings; a search tells it to TPE, the goal as its objective and the bounds as constraints.
Measures of a sweep: `forget`, `retain` and `perturbed` are accuracies; `excess_harm` is what a forget-token costs
more than a control token, in nats (below 0: more). A bound is a number, or a multiple of the `base` model's value or
of `chance` (guessing), plus or minus a number. Point estimates are compared, means over seeds. Equal values: the
greater `retain`, then the lower `forget`, then the earlier one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from robust_unlearning.errors import UserError, unknown
from robust_unlearning.evaluate.record import Record, by_task, excess_of, groups_of, logp_among_of, right_of
from robust_unlearning.evaluate.suite import Evaluation
from robust_unlearning.results.roles import ROLES, Patterns, roles
from robust_unlearning.stats.estimates import Array
from robust_unlearning.stats.factors import Groups

MEASURES = (*ROLES, "excess_harm")
FORGETTING = "forgetting"
"""−log p of the right answer to what is to be forgotten, among those offered, nats: no rule is about it."""
DEFAULT_RULE = "max perturbed where forget<=chance+0.1 and retain>=0.95*base"
EXAMPLE = f"Write it like {DEFAULT_RULE!r}."
_NUMBER = r"(?:\d+\.?\d*|\.\d+)"
_LIMIT = re.compile(
    rf"(?:(?P<factor>{_NUMBER})\*)?(?P<of>base|chance)(?P<offset>[+-]{_NUMBER})?|(?P<number>[+-]?{_NUMBER})"
)
Values = Mapping[str, float]
"""Measure -> a model's value."""


@dataclass(frozen=True)
class Bound:
    """`measure` may be at most (or at least) `factor` times that of `of`, plus `offset`; `of` None is 0."""

    measure: str
    at_most: bool
    of: str | None
    factor: float
    offset: float

    def limit(self, base: Values, chance: Values) -> float:
        """The bound as a number."""
        known = {"base": base, "chance": chance}
        return self.offset + (self.factor * known[self.of][self.measure] if self.of else 0.0)

    def excess(self, values: Values, base: Values, chance: Values) -> float:
        """By how much a model breaks the bound; not above 0 where it keeps it."""
        beyond = values[self.measure] - self.limit(base, chance)
        return beyond if self.at_most else -beyond


@dataclass(frozen=True)
class Rule:
    """What is made greatest (or least), within which bounds; `text` as the user wrote it."""

    text: str
    greatest: bool
    measure: str
    bounds: tuple[Bound, ...]

    def breach(self, values: Values, base: Values, chance: Values) -> float:
        """What a model breaks the bounds by, all together; 0 where it keeps them."""
        return sum(max(0.0, bound.excess(values, base, chance)) for bound in self.bounds)


def parse_rule(text: str) -> Rule:
    """The rule that `text` says.

    Raises:
        UserError: it is not of the form that this module's docstring gives, or names an unknown measure.
    """
    parts = re.fullmatch(r"\s*(max|min)\s+(\w+)(?:\s+where\s+(.+))?", text.strip())
    if not parts:
        raise UserError(f"the rule {text!r} does not begin with max or min and a measure. {EXAMPLE}")
    goal, measure, bounds = parts.groups()
    bounded = re.split(r"\s+and\s+", bounds.strip()) if bounds else []
    return Rule(text.strip(), goal == "max", _measure(measure), tuple(map(_bound, bounded)))


def _measure(name: str) -> str:
    if name not in MEASURES:
        raise UserError(unknown("measure", name, MEASURES, EXAMPLE))
    return name


def _bound(text: str) -> Bound:
    name, sign, rest = re.sub(r"\s", "", text).partition("<=" if "<=" in text else ">=")
    limit = _LIMIT.fullmatch(rest)
    if not sign or not limit:
        raise UserError(f"{text!r} is no bound: it needs <= or >=, and a number, base or chance. {EXAMPLE}")
    if limit["of"] == "chance" and name == "excess_harm":
        raise UserError("excess_harm has no chance level; bound it by a number or by base.")
    offset = float(limit["number"] or limit["offset"] or 0)
    return Bound(_measure(name), sign == "<=", limit["of"], float(limit["factor"] or 1), offset)


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


def choose(rule: Rule, settings: Sequence[Values | None], bases: Sequence[Values], chance: Values) -> Choice:
    """Apply a rule.

    Args:
        settings: measure -> value of each; None for one that has no model, which is never chosen.
        bases: the same of each one's base model.
        chance: accuracy of guessing, by measure.

    Raises:
        UserError: a measure of the rule was not measured.
    """
    needed = {rule.measure, *(bound.measure for bound in rule.bounds)}
    measured = [*bases, *filter(None, settings)]
    lacking = sorted(name for name in needed if not all(name in values for values in measured))
    if lacking:
        raise UserError(
            f"the rule {rule.text!r} asks for {', '.join(lacking)}, of which the validation suite has no task. Name "
            "its tasks with --forget, --retain and --perturbed, or give another rule with --select."
        )
    broken: list[tuple[str, ...]] = [()] * len(settings)
    ranks: dict[int, tuple[float, ...]] = {}
    breaches: dict[int, float] = {}
    for index, (values, base) in enumerate(zip(settings, bases, strict=True)):
        if values is not None:
            broken[index] = tuple(
                f"{bound.measure} {values[bound.measure]:.3f} {'>' if bound.at_most else '<'} "
                f"{bound.limit(base, chance):.3f}"
                for bound in rule.bounds
                if bound.excess(values, base, chance) > 0
            )
            goal = values[rule.measure] if rule.greatest else -values[rule.measure]
            ranks[index] = (goal, values.get("retain", 0.0), -values.get("forget", 0.0), -index)
            breaches[index] = rule.breach(values, base, chance)
    allowed = [index for index, breach in breaches.items() if breach == 0]
    best = max(allowed, key=lambda index: ranks[index], default=None)
    near = best if best is not None else min(breaches, key=lambda index: (breaches[index], index), default=None)
    return Choice(best, near, tuple(broken))


@dataclass(frozen=True)
class Answers:
    """One model's answers, question by question: measure -> values [n], the same questions for every model.

    Accuracies are right (1) or wrong (0), averaged where a question is asked in several tasks of a role, those of
    several sets that hold it among them: it counts once. `groups` says how a measure's questions hang together.
    """

    values: Mapping[str, Array]
    chance: Mapping[str, float]
    groups: Mapping[str, Groups] = field(default_factory=dict)

    def means(self) -> dict[str, float]:
        """Measure -> mean over questions."""
        return {measure: float(values.mean()) for measure, values in self.values.items()}


def answers_of(evaluation: Evaluation, patterns: Patterns) -> Answers:
    """A model's answers by role, from the records of an evaluation."""
    tasks = by_task(evaluation.records)
    values: dict[str, Array] = {}
    chance: dict[str, float] = {}
    groups: dict[str, Groups] = {}
    for role, those in roles(tasks, patterns).items():
        records = [record for task in those for record in tasks[task]]
        if records:
            values[role] = _by_question(records, right_of(records))
            groups[role] = _groups(records)
            chance[role] = float(np.mean([1 / len(record.logprobs) for record in records]))
        if role == "forget" and records and all(record.scored for record in records):
            values[FORGETTING] = _by_question(records, -logp_among_of(records))
            groups[FORGETTING] = groups[role]
        paired = [task for task in those if task.control_form in tasks]
        if role == "perturbed" and paired:
            records = [record for task in paired for record in tasks[task]]
            control = [record for task in paired for record in tasks[task.control_form]]
            values["excess_harm"] = _by_question(records, excess_of(records, control))
            groups["excess_harm"] = _groups(records)
    return Answers(values, chance, groups)


def _groups(records: Sequence[Record]) -> Groups:
    """How the questions of `_by_question` hang together, by the first record of each."""
    firsts: dict[tuple[str, ...], Record] = {}
    for record in records:
        firsts.setdefault(record.question, record)
    return groups_of(list(firsts.values()))


def _by_question(records: Sequence[Record], values: Array) -> Array:
    """Means over the values of each question, in order of first mention."""
    questions: dict[tuple[str, ...], list[float]] = {}
    for record, value in zip(records, values, strict=True):
        questions.setdefault(record.question, []).append(value)
    return np.array([np.mean(same) for same in questions.values()])

"""What a model answered, by the roles of the tasks, as arrays over questions that any two models can be compared on,
and the means of several models with their intervals.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from robust_unlearning.errors import UserError
from robust_unlearning.evaluate.record import Record, Task, by_task, logp_among_of, right_of
from robust_unlearning.evaluate.suite import Evaluation
from robust_unlearning.results.roles import Patterns, named, roles
from robust_unlearning.stats import paired
from robust_unlearning.stats.estimates import Array, Estimate
from robust_unlearning.stats.factors import FEWEST_SEEDS, Groups
from robust_unlearning.stats.means import over_seeds, share_over_seeds

PLANTED: Patterns = {"related": ("near/*",)}
"""The roles of the planted suites' tasks, where their names do not tell."""


@dataclass(frozen=True)
class Perturbed:
    """Questions with a token in them, [n]: right under a forget-token, right under a control token, and the excess, log
    p of the right option under the forget-token less that under the control token, in nats.
    """

    right: Array
    control: Array
    excess: Array


@dataclass(frozen=True)
class Asked:
    """How the questions of a `Measured` hang together: a number [n] for each, the same for those about one thing, or
    with one word in them.

    Attributes:
        forget, near, far, clean, perturbed: clusters; a question of no cluster is one by itself.
        words: the forget-token in each perturbed question.
        forget_perturbed, forget_words: the same of questions to be forgotten; empty where none were perturbed.
    """

    forget: Array
    near: Array
    far: Array
    clean: Array
    perturbed: Array
    forget_perturbed: Array
    words: Array
    forget_words: Array

    @classmethod
    def of(cls, **sets: Sequence[Record]) -> Asked:
        """From the records of each array; words are read from those of the perturbed ones."""
        numbers: dict[str | None, float] = {}

        def coded(labels: Iterable[str | None]) -> Array:
            return np.array([numbers.setdefault(label, float(len(numbers))) for label in labels])

        clusters = {key: coded(each.cluster or f"question {each.question}" for each in of) for key, of in sets.items()}
        words, forget_words = (
            coded(each.forget_token for each in sets[key]) for key in ("perturbed", "forget_perturbed")
        )
        return cls(**clusters, words=words, forget_words=forget_words)


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
        forget_perturbed: right or wrong on forget questions with a forget-token in them, mean over places; empty where
            there are none.
        asked: how the questions hang together.
    """

    forget: Array
    forget_logp: Array
    near: Array
    far: Array
    clean: Array
    places: dict[str, Perturbed]
    forget_perturbed: Array
    asked: Asked

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
        related = named(tasks, "related", patterns.get("related", ()))
        places: dict[str, list[Task]] = {}
        for task in by_role["perturbed"]:
            places.setdefault(task.form, []).append(task)

        def records(of: Iterable[Task]) -> list[Record]:
            return [record for task in of for record in tasks[task]]

        def perturbed(of: Sequence[Task]) -> Perturbed:
            forget, control = records(of), records(task.control_form for task in of)
            return Perturbed(right_of(forget), right_of(control), logp_among_of(forget) - logp_among_of(control))

        forget = records(by_role["forget"])
        close = _once(records(task for task in by_role["retain"] if task in related))
        others = _once(records(task for task in by_role["retain"] if task not in related))
        near, far = list(close.values()), [record for question, record in others.items() if question not in close]
        clean = records(dict.fromkeys(task.clean_form for task in by_role["perturbed"]))
        at_places = [records(of) for of in places.values()]
        forget_places: dict[str, list[Task]] = {}
        for task in tasks:
            if task.perturbed and not task.control and task.clean_form in by_role["forget"]:
                forget_places.setdefault(task.form, []).append(task)
        with_tokens = [records(of) for of in forget_places.values()] or [[]]
        return cls(
            forget=right_of(forget),
            forget_logp=logp_among_of(forget),
            near=right_of(near),
            far=right_of(far),
            clean=right_of(clean),
            places={place: perturbed(of) for place, of in places.items()},
            forget_perturbed=np.mean([right_of(each) for each in with_tokens], axis=0),
            asked=Asked.of(
                forget=forget,
                near=near,
                far=far,
                clean=clean,
                perturbed=at_places[0],
                forget_perturbed=with_tokens[0],
            ),
        )


def _once(records: Iterable[Record]) -> dict[tuple[str, ...], Record]:
    """Question and style -> its record, the first where several sets hold the question."""
    found: dict[tuple[str, ...], Record] = {}
    for record in records:
        found.setdefault((record.task.style, *record.question), record)
    return found


@dataclass(frozen=True)
class QuestionMeasure:
    """A number for each of n questions, and how these hang together.

    Called with a model's answers it gives the numbers [n].
    """

    of: Callable[[Measured], Array]
    groups: Callable[[Measured], Groups]
    share: bool = True

    def __call__(self, answers: Measured) -> Array:
        return self.of(answers)

    def over(self, models: Sequence[Measured], base: Measured | None = None) -> Estimate:
        """The mean over models, one a seed; with `base`, of the differences to it."""
        table = np.stack([self.of(each) for each in models]) - (0.0 if base is None else self.of(base))
        mean = share_over_seeds if self.share and base is None else over_seeds
        return mean(table, self.groups(models[0]))


def _in_place(key: str, where: str | None) -> Callable[[Measured], Array]:
    def of(answers: Measured) -> Array:
        places = answers.places.values() if where is None else [answers.places[where]]
        return np.mean([getattr(place, key) for place in places], axis=0)

    return of


def _words(answers: Measured) -> Groups:
    return Groups(answers.asked.perturbed, answers.asked.words)


def right_in(where: str | None = None) -> QuestionMeasure:
    """Right under a forget-token, in one place or mean over all."""
    return QuestionMeasure(_in_place("right", where), _words)


def control_in(where: str | None = None) -> QuestionMeasure:
    """Right under a control token, in one place or mean over all."""
    return QuestionMeasure(_in_place("control", where), _words)


def excess_in(where: str | None = None) -> QuestionMeasure:
    """Excess harm of a forget-token over a control token, nats, in one place or mean over all; below 0 the forget-token
    harms.
    """
    return QuestionMeasure(_in_place("excess", where), _words, share=False)


def _set(key: str) -> QuestionMeasure:
    return QuestionMeasure(lambda answers: getattr(answers, key), lambda answers: Groups(getattr(answers.asked, key)))


forget, near, far, clean = map(_set, ("forget", "near", "far", "clean"))
right, excess = right_in(), excess_in()
forgetting = QuestionMeasure(
    lambda answers: -answers.forget_logp, lambda answers: Groups(answers.asked.forget), share=False
)
"""−log p of the right option on forget questions, nats. What is forgotten is this less the base's, question by
question: also a model that never knew the answer has some of it."""
retained = QuestionMeasure(
    lambda answers: np.concatenate([answers.near, answers.far]),
    lambda answers: Groups(np.concatenate([answers.asked.near, answers.asked.far])),
)
"""Right on all retained questions."""
forget_perturbed = QuestionMeasure(
    lambda answers: answers.forget_perturbed,
    lambda answers: Groups(answers.asked.forget_perturbed, answers.asked.forget_words),
)
"""Right on forget questions with a forget-token in them (the paper's perturbed WMDP)."""


def estimates(models: Sequence[Measured], where: str) -> dict[str, Estimate]:
    """Accuracies and excess harm of a method's models, one a seed, the token in one place; empty sets are left out."""
    shares = {"forget": forget, "near": near, "far": far, "clean": clean}
    shares |= {"control": control_in(where), "perturbed": right_in(where)}
    there = {key: measure.over(models) for key, measure in shares.items() if measure(models[0]).size}
    return there | {"excess_harm": excess_in(where).over(models)}


def reduction(models: Sequence[Measured], base: Measured, of: QuestionMeasure = right) -> Estimate:
    """The paper's reduction of accuracy with a forget-token, over seeds and questions."""
    return paired.reduction([of(base)], np.stack([of(each) for each in models]), groups=of.groups(base))


def recovery(
    rna: Sequence[Measured], plain: Sequence[Measured], base: Measured, of: QuestionMeasure = right
) -> Estimate:
    """The paper's recovery of that accuracy; models in the same order of seeds."""
    before, after = (np.stack([of(each) for each in models]) for models in (plain, rna))
    return paired.recovery([of(base)], before, after, pair_seeds=True, groups=of.groups(base))


def structure(base: Measured, seeds: int) -> str:
    """What counts as one observation in a table's intervals, and how many of each there are, for its note."""
    clusters = len(set(np.concatenate([base.asked.forget, base.asked.near, base.asked.far]).tolist()))
    questions = sum(map(len, (base.forget, base.near, base.far)))
    words = len(set(base.asked.words.tolist()))
    about = (
        f"{clusters} entities that the {questions} questions are about"
        if clusters < questions
        else f"{questions} questions"
    )
    of_models = (
        f"{seeds} training seeds, "
        if seeds >= FEWEST_SEEDS
        else f"(the {seeds} training seed{'s' * (seeds > 1)} as given: other seeds may differ by more) "
    )
    return (
        "Intervals count as one observation what comes of one training seed, is about one entity or holds one word, "
        f"and are the wider the fewer there are: {of_models}{about}, {words} forget-tokens in them."
    )

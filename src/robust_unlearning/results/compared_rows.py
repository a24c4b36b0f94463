"""Rows of a comparison: a model against the reference on the questions of a group or a subject; and single questions.

The statistics are in `stats.paired`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from robust_unlearning.evaluate.record import control_tasks
from robust_unlearning.results.records import SharedTask
from robust_unlearning.results.task_groups import TaskGroup
from robust_unlearning.stats import paired
from robust_unlearning.stats.estimates import Array, Estimate
from robust_unlearning.stats.factors import Groups
from robust_unlearning.stats.means import share_over_seeds
from robust_unlearning.stats.paired import PairedTest, StandardErrors

Reading = Literal["better", "worse", "inconclusive"]


@dataclass(frozen=True)
class AgainstReference:
    """A model against the reference on the questions of a row; differences are model less reference, intervals paired.

    Attributes:
        difference: of accuracy, a fraction; `spread` are its standard errors, by question and by seed.
        test: of no difference, with the seeds, entities and words as they are.
        p: the test's, or that of the difference's interval, in which those vary, where it is larger.
        p_holm: `p`, adjusted by Holm over all rows and models of the table; in a subject's row over the subjects of its
            group and its model.
        verdict: `better` or `worse` where `p_holm` is below 1 - level and the interval leaves out 0; else
            `inconclusive`.
        of_these: the verdict is of the models at hand: of one of the two there are fewer than `FEWEST_SEEDS` trained.
        reduction: share of the reference's accuracy that was lost.
        recovery: share of what the unlearned model lost that this one has again; None where none is defined to be.
        forgotten: log p of the right answer among those offered, on all clean questions to be forgotten, reference less
            model, nats: one number a model, whatever the row. None where no such task was asked, or log p not scored.
        logp, logp_per_token: of the right answer, nats; None where not scored.
        added_harm: excess harm less the reference's, nats per token; None where the task has no control form.
    """

    difference: Estimate
    spread: StandardErrors
    test: PairedTest
    p: float
    p_holm: float
    verdict: Reading
    of_these: bool
    reduction: Estimate
    recovery: Estimate | None
    forgotten: Estimate | None
    logp: Estimate | None
    logp_per_token: Estimate | None
    added_harm: Estimate | None


@dataclass(frozen=True)
class ComparedRow:
    """One model on the questions of a group, or of one subject of a group.

    Attributes:
        task: the questions.
        group: whose they are.
        to_forget: whether fewer right answers are better.
        accuracy: `spread` and `by_seed` are of it.
        against: None for the reference.
    """

    task: SharedTask
    group: TaskGroup
    to_forget: bool
    model: str
    accuracy: Estimate
    spread: StandardErrors
    by_seed: list[float]
    against: AgainstReference | None


@dataclass(frozen=True)
class Flip:
    """A question that the reference answered and a model did not.

    With several seeds: that most seeds of the reference answered, and at most half of the model's.

    `token` is the forget-token or control token that stood in it, if any. `logp` is the change of log p of the right
    answer, nats, mean over seeds; None where not scored.
    """

    task: str
    model: str
    id: str
    token: str
    right: Any
    reference_said: list[Any]
    model_said: list[Any]
    logp: float | None


@dataclass(frozen=True)
class Shared:
    """What all rows share: the comparison's settings, models with few seeds, and what each model has forgotten."""

    reference: str
    unlearned: str | None
    level: float
    pair: bool
    few: set[str]
    forgotten: Mapping[str, Estimate | None]


def row_of(task: SharedTask, group: TaskGroup, to_forget: bool, name: str, about: Shared) -> ComparedRow:
    """A model's row; `p_holm` and the verdict, which rest on the whole table, come later."""
    answers, base = task.models[name], task.models[about.reference]
    level, pair, groups = about.level, about.pair, task.groups
    row = ComparedRow(
        task=task,
        group=group,
        to_forget=to_forget,
        model=name,
        accuracy=share_over_seeds(answers.correct, groups, level),
        spread=paired.standard_errors(answers.correct),
        by_seed=[float(share) for share in answers.correct.mean(axis=1)],
        against=None,
    )
    if name == about.reference:
        return row

    def change(before: Array | None, after: Array | None, of: Groups = groups) -> Estimate | None:
        return None if before is None or after is None else paired.difference(before, after, level, pair, of)

    recovery = None
    if about.unlearned not in (None, name):
        lost = task.models[about.unlearned].correct
        recovery = paired.recovery(base.correct, lost, answers.correct, level, pair, groups)
    test, logp = paired.paired_test(base.correct, answers.correct), change(base.logp, answers.logp)
    difference = paired.difference(base.correct, answers.correct, level, pair, groups)
    p = max(test.p, difference.p()) if difference.parts else test.p
    of_one_token = base.of_one_token and answers.of_one_token
    against = AgainstReference(
        difference=difference,
        spread=paired.standard_errors(answers.correct, base.correct, pair),
        test=test,
        p=p,
        p_holm=p,
        verdict="inconclusive",
        of_these=bool(about.few & {name, about.reference}),
        reduction=paired.reduction(base.correct, answers.correct, level, pair, groups),
        recovery=recovery,
        forgotten=about.forgotten.get(name),
        logp=logp,
        logp_per_token=logp if of_one_token else change(base.logp_per_token, answers.logp_per_token),
        added_harm=change(base.excess, answers.excess, task.harm_groups),
    )
    return replace(row, against=against)


def adjusted(rows: Sequence[ComparedRow], level: float) -> list[ComparedRow]:
    """The rows with Holm's p-values over all of them and the verdicts that follow."""
    waiting = iter(paired.holm([row.against.p for row in rows if row.against]))
    done = []
    for row in rows:
        if row.against is not None:
            p, difference = next(waiting), row.against.difference
            clear = difference.low is not None and difference.high is not None and difference.low * difference.high > 0
            gained = (difference.value or 0.0) > 0
            verdict: Reading = "inconclusive"
            if clear and p < 1 - level:
                verdict = "worse" if gained == row.to_forget else "better"
            row = replace(row, against=replace(row.against, p_holm=p, verdict=verdict))
        done.append(row)
    return done


def flips_of(tasks: Sequence[SharedTask], reference: str, name: str) -> list[Flip]:
    """Questions that the reference answered and the model did not, the largest fall of log p first."""
    flips = []
    controls = control_tasks([task.tasks[0] for task in tasks])
    for task in tasks:
        base, answers = task.models[reference], task.models[name]
        change = None
        if base.logp is not None and answers.logp is not None:
            change = answers.logp.mean(axis=0) - base.logp.mean(axis=0)
        lost = (base.correct.mean(axis=0) > 0.5) & (answers.correct.mean(axis=0) <= 0.5)
        for index in np.flatnonzero(lost):
            record, is_control = task.records[index], task.tasks[0] in controls
            flip = Flip(
                task=task.name,
                model=name,
                id=record.id,
                token=(record.control_token if is_control else record.forget_token) or "",
                right=record.answer,
                reference_said=[row[index] for row in base.predictions],
                model_said=[row[index] for row in answers.predictions],
                logp=None if change is None else float(change[index]),
            )
            flips.append(flip)
    return sorted(flips, key=lambda flip: flip.logp or 0.0)

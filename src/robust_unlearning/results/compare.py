"""Models that answered the same questions, compared task by task with a reference: differences, tests, rates, harm.

Needs nothing but the answers on disk; no model is loaded. The statistics are in `stats.paired`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from typing import Any, Literal

import numpy as np

from robust_unlearning.errors import UserError, unknown
from robust_unlearning.evaluate.record import control_tasks
from robust_unlearning.results.records import (
    FORGOTTEN,
    ComparedModel,
    SharedTask,
    matching_tasks,
    shared_tasks,
)
from robust_unlearning.stats import paired
from robust_unlearning.stats.estimates import Array, Estimate, accuracy
from robust_unlearning.stats.means import over_seeds
from robust_unlearning.stats.paired import PairedTest, StandardErrors

Reading = Literal["better", "worse", "open"]


@dataclass(frozen=True)
class AgainstReference:
    """A model against the reference in one task; differences are model less reference, intervals paired.

    Attributes:
        difference: of accuracy, a fraction; `spread` are its standard errors, by question and by seed.
        test: of no difference.
        p_holm: the test's p, adjusted by Holm over all tasks and models of the comparison.
        verdict: `better` or `worse` where `p_holm` is below 1 - level and the interval leaves out 0; else `open`.
        reduction: share of the reference's accuracy that was lost.
        recovery: share of what the unlearned model lost that this one has again; None where none is defined to be.
        logp, logp_per_token: of the right answer, nats; None where not scored.
        added_harm: excess harm less the reference's, nats per token; None where the task has no control form.
    """

    difference: Estimate
    spread: StandardErrors
    test: PairedTest
    p_holm: float
    verdict: Reading
    reduction: Estimate
    recovery: Estimate | None
    logp: Estimate | None
    logp_per_token: Estimate | None
    added_harm: Estimate | None


@dataclass(frozen=True)
class ComparedRow:
    """One model in one task; `spread` and `by_seed` are of its accuracy; `against` is None for the reference."""

    task: SharedTask
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
class Comparison:
    """The whole comparison.

    Attributes:
        models: name -> folders, one for each seed.
        unlearned: the model that `recovery` measures the loss of; None with two models.
        forgotten: tasks that are to be forgotten, where fewer right answers are better.
        missing: tasks that not all models have answered.
        paired_seeds: the training seeds that all models with several have in common, and so are drawn together.
    """

    models: dict[str, list[str]]
    reference: str
    unlearned: str | None
    level: float
    forgotten: list[str]
    missing: list[str]
    paired_seeds: list[int]
    rows: list[ComparedRow]
    flips: list[Flip]

    def as_dict(self) -> dict[str, Any]:
        """For JSON: task -> model -> numbers."""
        tasks: dict[str, Any] = {}
        for row in self.rows:
            about = {"n": len(row.task.keys), "left_out": row.task.left_out, "to_be_forgotten": self.forgets(row.task)}
            models = tasks.setdefault(row.task.name, {**about, "models": {}})["models"]
            models[row.model] = {"accuracy": row.accuracy.as_dict(), **_spread("accuracy", row.spread)}
            models[row.model]["accuracy_by_seed"] = row.by_seed
            if row.against is not None:
                numbers = dict(vars(row.against))
                models[row.model] |= _spread("difference", numbers.pop("spread"))
                models[row.model] |= {key: _plain(value) for key, value in numbers.items()}
        fields = ("models", "reference", "unlearned", "level", "missing", "paired_seeds")
        flips = [asdict(flip) for flip in self.flips]
        return {**{field: getattr(self, field) for field in fields}, "tasks": tasks, "flips": flips}

    def forgets(self, task: SharedTask) -> bool:
        """Whether a task is to be forgotten."""
        return task.name in self.forgotten


def _plain(value: Any) -> Any:
    if isinstance(value, Estimate):
        return value.as_dict()
    return asdict(value) if isinstance(value, PairedTest) else value


def _spread(of: str, spread: StandardErrors) -> dict[str, Any]:
    return {f"{of}_stderr_by_question": spread.by_question, f"{of}_stderr_by_seed": spread.by_seed}


def compare(
    models: Sequence[ComparedModel],
    *,
    base: str | None = None,
    unlearned: str | None = None,
    tasks: Sequence[str] = ("*",),
    forget: Sequence[str] | None = None,
    level: float = 0.95,
    flips: int = 0,
) -> Comparison:
    """Compare each model with a reference on the questions that all of them were asked.

    Args:
        base: the reference's name; left out: the first model.
        unlearned: the model whose loss `recovery` is a share of; left out: with three models or more, the first that
            is not the reference.
        tasks: patterns of tasks' names.
        forget: patterns of the tasks that are to be forgotten; left out: `FORGOTTEN`, and sets of questions called
            like a topic of one of the runs.
        level: of the intervals; findings are told at 1 - level.
        flips: how many questions to list for each model that the reference answered and the model did not.

    Raises:
        UserError: an unknown name, `unlearned` without a third model, a pattern that matches no
            task, or what `records.shared_tasks` raises.
    """
    names = [model.name for model in models]
    for name in (base, unlearned):
        if name is not None and name not in names:
            raise UserError(unknown("model", name, names))
    reference = base or names[0]
    others = [name for name in names if name != reference]
    if unlearned is not None and (unlearned == reference or len(others) < 2):
        raise UserError(
            f"recovery needs the base, the unlearned model and a third; {unlearned!r} is the unlearned one, the base "
            f"is {reference!r}, the models are {', '.join(names)}."
        )
    lost = unlearned or (others[0] if len(others) > 1 else None)
    shared, missing = shared_tasks(models, tasks)
    shared_names = [task.name for task in shared]
    if forget is None:
        topics = {topic for model in models for source in model.seeds for topic in source.recipe.get("topics") or ()}
        patterns = [*FORGOTTEN, *(f"{topic}/*" for topic in topics)]
        forgotten = [name for name in shared_names if any(fnmatchcase(name, pattern) for pattern in patterns)]
    else:
        forgotten = matching_tasks(shared_names, forget)
    seeds = _common_seeds(models)
    rows = [_row(task, name, reference, lost, level, bool(seeds)) for task in shared for name in (reference, *others)]
    return Comparison(
        models={model.name: [str(source.folder) for source in model.seeds] for model in models},
        reference=reference,
        unlearned=lost,
        level=level,
        forgotten=forgotten,
        missing=missing,
        paired_seeds=seeds,
        rows=_adjusted(rows, forgotten, level),
        flips=[flip for name in others for flip in _flips(shared, reference, name)[:flips]],
    )


def _common_seeds(models: Sequence[ComparedModel]) -> list[int]:
    """The seeds in the recipes of every model that has several, if they are the same in the same order; else none.

    Runs with one seed saw the same batches, so what a seed did to both is no difference between the two.
    """
    lists = [[source.recipe.get("seed") for source in model.seeds] for model in models if len(model.seeds) > 1]
    same = len(lists) > 1 and None not in lists[0] and all(seeds == lists[0] for seeds in lists)
    return [int(seed) for seed in lists[0] if seed is not None] if same else []


def _row(task: SharedTask, name: str, reference: str, unlearned: str | None, level: float, pair: bool) -> ComparedRow:
    """A model's row; `p_holm` and the verdict, which rest on the whole table, come later."""
    answers, base = task.models[name], task.models[reference]
    row = ComparedRow(
        task=task,
        model=name,
        accuracy=over_seeds(answers.correct, level=level)
        if len(answers.correct) > 1
        else accuracy(answers.correct[0], level),
        spread=paired.standard_errors(answers.correct),
        by_seed=[float(share) for share in answers.correct.mean(axis=1)],
        against=None,
    )
    if name == reference:
        return row

    def change(before: Array | None, after: Array | None) -> Estimate | None:
        return None if before is None or after is None else paired.difference(before, after, level, pair)

    recovery = None
    if unlearned not in (None, name):
        recovery = paired.recovery(base.correct, task.models[unlearned].correct, answers.correct, level, pair)
    test, logp = paired.paired_test(base.correct, answers.correct), change(base.logp, answers.logp)
    of_one_token = base.of_one_token and answers.of_one_token
    against = AgainstReference(
        difference=paired.difference(base.correct, answers.correct, level, pair),
        spread=paired.standard_errors(answers.correct, base.correct, pair),
        test=test,
        p_holm=test.p,
        verdict="open",
        reduction=paired.reduction(base.correct, answers.correct, level, pair),
        recovery=recovery,
        logp=logp,
        logp_per_token=logp if of_one_token else change(base.logp_per_token, answers.logp_per_token),
        added_harm=change(base.excess, answers.excess),
    )
    return replace(row, against=against)


def _adjusted(rows: Sequence[ComparedRow], forgotten: Sequence[str], level: float) -> list[ComparedRow]:
    """The rows with Holm's p-values and the verdicts that follow from them."""
    waiting = iter(paired.holm([row.against.test.p for row in rows if row.against]))
    done = []
    for row in rows:
        if row.against is not None:
            p, difference = next(waiting), row.against.difference
            clear = difference.low is not None and difference.high is not None and difference.low * difference.high > 0
            gained = (difference.value or 0.0) > 0
            verdict: Reading = "open"
            if clear and p < 1 - level:
                verdict = "worse" if gained == (row.task.name in forgotten) else "better"
            row = replace(row, against=replace(row.against, p_holm=p, verdict=verdict))
        done.append(row)
    return done


def _flips(tasks: Sequence[SharedTask], reference: str, name: str) -> list[Flip]:
    """Questions that the reference answered and the model did not, the largest fall of log p first."""
    flips = []
    controls = control_tasks([task.task for task in tasks])
    for task in tasks:
        base, answers = task.models[reference], task.models[name]
        change = None
        if base.logp is not None and answers.logp is not None:
            change = answers.logp.mean(axis=0) - base.logp.mean(axis=0)
        lost = (base.correct.mean(axis=0) > 0.5) & (answers.correct.mean(axis=0) <= 0.5)
        for index in np.flatnonzero(lost):
            question, forget, control = task.keys[index]
            flip = Flip(
                task=task.name,
                model=name,
                id=question,
                token=control if task.task in controls else forget,
                right=task.right[index],
                reference_said=[row[index] for row in base.predictions],
                model_said=[row[index] for row in answers.predictions],
                logp=None if change is None else float(change[index]),
            )
            flips.append(flip)
    return sorted(flips, key=lambda flip: flip.logp or 0.0)

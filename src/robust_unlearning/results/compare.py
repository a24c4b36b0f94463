"""Models that answered the same questions, compared with a reference: differences, tests, rates, harm.

A row is a group of tasks (`task_groups`), over all of its questions, each with the same weight; its tasks, the
subjects of a benchmark, are rows of a second table. Needs nothing but the answers on disk; no model is loaded.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from glob import escape
from typing import Any

from robust_unlearning.errors import UserError, unknown
from robust_unlearning.results.compared_rows import ComparedRow, Flip, Shared, adjusted, flips_of, row_of
from robust_unlearning.results.records import (
    FORGOTTEN,
    ComparedModel,
    SharedTask,
    every_task,
    matching_tasks,
    pooled,
    shared_tasks,
)
from robust_unlearning.results.task_groups import Kinds, TaskGroup, task_groups
from robust_unlearning.stats import paired
from robust_unlearning.stats.estimates import Estimate
from robust_unlearning.stats.factors import FEWEST_SEEDS
from robust_unlearning.stats.paired import PairedTest, StandardErrors


@dataclass(frozen=True)
class Comparison:
    """The whole comparison.

    Attributes:
        models: name -> folders, one for each seed.
        unlearned: the model that `recovery` measures the loss of; None with two models.
        forget_tasks: tasks that are to be forgotten, where fewer right answers are better.
        forgotten: why no row says what was forgotten; empty where all do.
        missing: tasks that not all models have answered.
        paired_seeds: the training seeds that all models with several have in common, and so are paired.
        rows: groups.
        subjects: the tasks of those groups that have several.
    """

    models: dict[str, list[str]]
    reference: str
    unlearned: str | None
    level: float
    forget_tasks: list[str]
    forgotten: str
    missing: list[str]
    paired_seeds: list[int]
    rows: list[ComparedRow]
    subjects: list[ComparedRow]
    flips: list[Flip]

    def as_dict(self) -> dict[str, Any]:
        """For JSON: group -> model -> numbers, and subject -> model -> numbers."""
        fields = ("models", "reference", "unlearned", "level", "forget_tasks", "missing", "paired_seeds")
        tables = {"groups": _as_dict(self.rows), "subjects": _as_dict(self.subjects)}
        return {**{field: getattr(self, field) for field in fields}, **tables, "flips": [asdict(f) for f in self.flips]}


def _as_dict(rows: Iterable[ComparedRow]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for row in rows:
        about: dict[str, Any] = {
            "n": len(row.task.records),
            "left_out": row.task.left_out,
            "to_be_forgotten": row.to_forget,
        }
        of_subject = row.task.name != row.group.name
        about |= {"group": row.group.name} if of_subject else {"tasks": row.group.tasks, "of": row.group.of}
        models = found.setdefault(row.task.name, {**about, "models": {}})["models"]
        models[row.model] = {"accuracy": row.accuracy.as_dict(), **_spread("accuracy", row.spread)}
        models[row.model]["accuracy_by_seed"] = row.by_seed
        if row.against is not None:
            numbers = dict(vars(row.against))
            models[row.model] |= _spread("difference", numbers.pop("spread"))
            models[row.model] |= {key: _plain(value) for key, value in numbers.items()}
    return found


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
    groups: Mapping[str, Sequence[str]] | None = None,
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
        groups: NAME -> patterns of tasks to be pooled, beside those that `task_groups` finds.
        forget: patterns of the tasks that are to be forgotten; left out: `FORGOTTEN`, and sets of questions called
            like a topic of one of the runs. What was forgotten is over them, also where `tasks` leaves them out.
        level: of the intervals; findings are told at 1 - level.
        flips: how many questions to list for each model that the reference answered and the model did not.

    Raises:
        UserError: an unknown name, `unlearned` without a third model, a pattern that matches no task, or what
            `records.shared_tasks` and `task_groups.task_groups` raise.
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
    forget_tasks = _forget_tasks(models, forget)
    kinds = Kinds.of(models, forget_tasks)
    found = task_groups([task.tasks[0] for task in shared], models, kinds, groups)
    seeds = _common_seeds(models)
    forgotten = _forgotten(models, shared, kinds, reference, others, level, bool(seeds))
    about = Shared(reference, lost, level, bool(seeds), _few(models, reference), forgotten)
    by_name = {task.name: task for task in shared}

    def rows(task: SharedTask, group: TaskGroup) -> list[ComparedRow]:
        return [row_of(task, group, group.tasks[0] in forget_tasks, name, about) for name in (reference, *others)]

    of_groups, of_subjects = [], []
    for group in found:
        members = [by_name[name] for name in group.tasks]
        several = len(members) > 1
        of_groups += rows(pooled(group.name, members) if several else members[0], group)
        if several:
            detail = [row for member in members for row in rows(member, group)]
            for name in others:
                own = iter(adjusted([row for row in detail if row.model == name], level))
                detail = [next(own) if row.model == name else row for row in detail]
            of_subjects += detail
    scored = all(each is not None for each in forgotten.values())
    return Comparison(
        models={model.name: [str(source.folder) for source in model.seeds] for model in models},
        reference=reference,
        unlearned=lost,
        level=level,
        forget_tasks=forget_tasks,
        forgotten="" if forgotten and scored else "not scored" if forgotten else "not asked",
        missing=missing,
        paired_seeds=seeds,
        rows=adjusted(of_groups, level),
        subjects=of_subjects,
        flips=[flip for name in others for flip in flips_of(shared, reference, name)[:flips]],
    )


def _forget_tasks(models: Sequence[ComparedModel], forget: Sequence[str] | None) -> list[str]:
    """Names of the tasks to be forgotten, of all that a model has answered."""
    names = [task.name for task in every_task(models)]
    if forget is not None:
        return matching_tasks(names, forget)
    topics = {topic for model in models for source in model.seeds for topic in source.recipe.get("topics") or ()}
    patterns = [*FORGOTTEN, *(f"{topic}/*" for topic in topics)]
    return [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]


def _forgotten(
    models: Sequence[ComparedModel],
    shared: Sequence[SharedTask],
    kinds: Kinds,
    reference: str,
    others: Sequence[str],
    level: float,
    pair: bool,
) -> dict[str, Estimate | None]:
    """What each model has forgotten beyond the reference; empty where no clean task to be forgotten was asked of all.

    Values are None where log p was not scored.
    """
    sources = [source for model in models for source in model.seeds]
    clean = [task for task in kinds.forms if kinds(task) == (True, "clean")]
    asked = [task.name for task in clean if all(task in source.tasks for source in sources)]
    if not asked:
        return {}
    there = {task.name: task for task in shared}
    if rest := [escape(name) for name in asked if name not in there]:
        there |= {task.name: task for task in shared_tasks(models, rest)[0]}
    questions = pooled("", [there[name] for name in asked])
    before = questions.models[reference].logp_among

    def fall(name: str) -> Estimate | None:
        after = questions.models[name].logp_among
        if before is None or after is None:
            return None
        return paired.difference(after, before, level, pair, questions.groups)

    return {name: fall(name) for name in others}


def _common_seeds(models: Sequence[ComparedModel]) -> list[int]:
    """The seeds in the recipes of every model that has several, if they are the same in the same order; else none.

    Runs with one seed saw the same batches, so what a seed did to both is no difference between the two.
    """
    lists = [[source.recipe.get("seed") for source in model.seeds] for model in models if len(model.seeds) > 1]
    same = len(lists) > 1 and None not in lists[0] and all(seeds == lists[0] for seeds in lists)
    return [int(seed) for seed in lists[0] if seed is not None] if same else []


def _few(models: Sequence[ComparedModel], reference: str) -> set[str]:
    """Names of models of which too few were trained to say anything of others; an untrained reference is none."""
    few = {model.name for model in models if len(model.seeds) < FEWEST_SEEDS}
    untrained = next(len(each.seeds) == 1 and not each.seeds[0].recipe for each in models if each.name == reference)
    return few - ({reference} if untrained else set())

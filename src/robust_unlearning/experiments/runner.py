"""The one runner of every experiment: sweep, study, demo, and what a reproduction trains.

    the bases are scored -> all points are trained, side by side -> every model is scored over its loaded base

An experiment says which points there are, what they are scored on and what is read of a score; it pools over seeds,
and makes tables and figures, from what stands in `bases`, `models` and `failed` afterwards. A run that is finished
and a score that is there are taken as they are, so an experiment that was stopped goes on where it was.

| in the experiment's folder | what |
|---|---|
| `runs/POINT/` | run folders, with the scores of the finished model; scores of earlier steps in `snapshots/step-N/` |
| `base/`, or `base/MODEL-HASH/` where there may be several | scores of the models as they were |
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic, Self, TypeVar

from robust_unlearning.errors import UserError
from robust_unlearning.evaluate.evaluator import Evaluator, Variant, open_target
from robust_unlearning.evaluate.harness import TaskSet
from robust_unlearning.evaluate.suite import Evaluation
from robust_unlearning.experiments.grid import Point
from robust_unlearning.models.checkpoint import pick_device
from robust_unlearning.plan.memory import free_memory, need
from robust_unlearning.plan.text import size
from robust_unlearning.recipe import Recipe, shared_fields
from robust_unlearning.run.folder import RunFolder
from robust_unlearning.train.progress import EvaluationProgress, GroupProgress

Say = Callable[[str], None]
Answers = TypeVar("Answers")


def say_aloud(text: str) -> None:
    """Print a line at once."""
    print(text, flush=True)


def base_of(recipe: Recipe) -> str:
    """What the scores of a recipe's base model are kept under, where there may be several bases."""
    digest = hashlib.sha256(repr((recipe.model, recipe.dtype)).encode()).hexdigest()[:8]
    return f"{Path(recipe.model).name}-{digest}"


@dataclass
class Runner(Generic[Answers]):
    """Points on their way to scores.

    Attributes:
        points: what is trained.
        task_sets: name -> what every model is scored on.
        out: folder of the experiment.
        read: what is kept of an evaluation.
        own: the task set whose scores lie in a model's own folder, those of the others in `scores/NAME` below it.
            Earlier steps are scored on it alone.
        one_base: all points must have one base model.
        strict: every point must get its scores; else those that fail stop no other.
        at_once: how many points are trained side by side at most; None for as many as memory allows.
        say: told what is done.
        bases: `base_of` of its recipes, or "base" where there is one -> task set -> answers.
        models: (name of the point, step) -> the same.
        failed: name of the point -> why it has no model.
    """

    points: Sequence[Point]
    task_sets: Mapping[str, TaskSet]
    out: Path
    read: Callable[[Evaluation], Answers]
    own: str | None = "suite"
    one_base: bool = False
    strict: bool = False
    at_once: int | None = None
    say: Say = say_aloud
    bases: dict[str, dict[str, Answers]] = field(default_factory=dict)
    models: dict[tuple[str, int], dict[str, Answers]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    def run(self) -> Self:
        """All of it. What is wrong with the task sets or the base is known before anything is trained.

        Raises:
            UserError: a task set or a base cannot be used, a folder holds a run of another recipe, or no point (with
                `strict`: not every point) could be trained and scored.
        """
        self.score_bases()
        self.train()
        self.score_models()
        return self

    @property
    def base(self) -> dict[str, Answers]:
        """Of the first base, or of the only one."""
        return next(iter(self.bases.values()))

    def folder(self, point: Point) -> Path:
        """Where a point's run lies."""
        return self.out / "runs" / point.name

    def score_bases(self) -> None:
        """Score the models as they were. A folder of another run, or a second base with `one_base`, is found first."""
        for point in self.points:
            if (path := self.folder(point)).exists():
                RunFolder.open(path, point.recipe, resume=True)  # one of another recipe is found at once
        models = {point.recipe.model for point in self.points}
        if self.one_base and len(models) > 1:
            raise UserError(f"all must have one base model; these recipes name {', '.join(sorted(models))}.")
        for base, evaluator, (first, *_) in self._by_base():
            self.say(f"scoring the base {first.recipe.model}")
            folder = self.out / "base" / ("" if self.one_base else base)
            self.bases[base] = self._scores(evaluator, bare(first.recipe), folder, self.task_sets)

    def train(self) -> None:
        """Train every point that has not failed before and is not finished."""
        waiting = [point for point in self.points if point.name not in self.failed]
        runs = {point.name: RunFolder.open(self.folder(point), point.recipe, resume=True) for point in waiting}
        there = sum(run.status == "finished" for run in runs.values())
        self.say(f"{len(self.points)} points: {there} trained before, {len(self.failed)} failed before")
        errors = train_all(list(runs.values()), self.at_once, self.say)
        self.failed |= {name: errors[run.path] for name, run in runs.items() if run.path in errors}

    def score_models(self) -> None:
        """Score every point that has a model, over its base, loaded once."""
        if len(self.failed) == len(self.points):
            name, why = next(iter(self.failed.items()))
            raise UserError(f"all {len(self.points)} points failed, {name} for instance: {why}")
        self._require_all()
        if self.task_sets:
            self.say(f"scoring {len(self.points) - len(self.failed)} points over one loaded base")
        for _, evaluator, points in self._by_base():
            for point in points:
                if point.name not in self.failed:
                    self._score(evaluator, point)
        self._require_all()

    def _score(self, evaluator: Evaluator, point: Point) -> None:
        run = RunFolder(self.folder(point), point.recipe)
        for step in (*point.earlier, point.recipe.steps):
            last = step == point.recipe.steps
            task_sets = self.task_sets if last else {name: self.task_sets[name] for name in (self.own,) if name}
            self.say(f"  {point.name} after {step} steps")
            try:
                variant = open_target(str(run.path if last else run.snapshot(step)))
                self.models[point.name, step] = self._scores(evaluator, variant, variant.folder, task_sets)
            except UserError as error:  # the base could be scored: it is this model's weights
                self.failed[point.name] = f"trained, but cannot be scored after {step} steps: {error}"
                return

    def _scores(
        self, evaluator: Evaluator, variant: Variant, folder: Path | None, task_sets: Mapping[str, TaskSet]
    ) -> dict[str, Answers]:
        assert folder is not None  # only a bare model has none of its own
        below = {name: "" if name == self.own else f"scores/{Path(name).stem}" for name in task_sets}
        return {
            name: self.read(scored(evaluator, variant, task_set, folder / below[name]))
            for name, task_set in task_sets.items()
        }

    def _by_base(self) -> Iterator[tuple[str, Evaluator, list[Point]]]:
        """Points by their base, in order of the first, and what scores them; none where nothing is scored."""
        bases: dict[str, list[Point]] = {}
        for point in self.points if self.task_sets else ():
            bases.setdefault("base" if self.one_base else base_of(point.recipe), []).append(point)
        for base, points in bases.items():  # an evaluator of its own lets the base before go
            yield base, Evaluator(points[0].recipe.dtype, points[0].recipe.device), points

    def _require_all(self) -> None:
        if self.strict and self.failed:
            raise UserError("\n".join(f"{self.out / 'runs' / name}: {why}" for name, why in self.failed.items()))


def bare(recipe: Recipe) -> Variant:
    """A recipe's base model, to be scored as it is."""
    return open_target(recipe.model, **recipe.model_options)


def scored(evaluator: Evaluator, variant: Variant, task_set: TaskSet, folder: Path) -> Evaluation:
    """An evaluation that is kept in `folder`, with its progress shown."""
    with EvaluationProgress(folder.name) as progress:
        return evaluator.evaluate(variant, task_set, folder, progress.tick)


def groups(runs: Sequence[RunFolder]) -> list[list[RunFolder]]:
    """Runs that can share trunk, batches and reference, in order of their first; the key is the trainer's own."""
    grouped: dict[tuple[tuple[str, str], ...], list[RunFolder]] = {}
    for run in runs:
        grouped.setdefault(tuple(shared_fields(run.recipe).items()), []).append(run)
    return list(grouped.values())


def train_all(runs: Sequence[RunFolder], at_once: int | None = None, say: Say = say_aloud) -> dict[Path, str]:
    """Train every run that is not finished, each to the delta it would have alone, to the bit.

    A run that fails does not stop the others. One whose loss was not finite is marked failed; one that could not
    begin (no such file, no such layer) keeps the status it had.

    Args:
        at_once: how many at most side by side; left out, as many as memory allows.
        say: told what is trained.

    Returns:
        The folder of each run that failed -> why.
    """
    grouped = groups([run for run in runs if run.status != "finished"])
    failed: dict[Path, str] = {}
    for number, group in enumerate(grouped, 1):
        try:
            most, words = _room(group) if at_once is None else (at_once, "as told")
        except UserError as error:  # the model cannot be had
            failed |= {run.path: str(error) for run in group}
            continue
        count = min(most, len(group))
        say(f"group {number} of {len(grouped)}: {len(group)} points, {count} side by side ({words})")
        failed |= _train_group(group, count, say)
    return failed


def _room(group: Sequence[RunFolder]) -> tuple[int, str]:
    """How many points of a group fit side by side, and the reckoning."""
    needed = need([run.recipe for run in group])
    free = free_memory(pick_device(group[0].recipe.device))
    return needed.fits(free), (
        f"each {size(needed.point)}, model {size(needed.model)}, step {size(needed.step)}; {size(free)} free"
    )


def _train_group(group: Sequence[RunFolder], count: int, say: Say) -> dict[Path, str]:
    """Train a group `count` at a time, fewer where a GPU's memory does not suffice after all."""
    import torch

    failed: dict[Path, str] = {}
    waiting = list(group)
    while waiting:
        now = waiting[:count]
        try:
            failed |= _train_together(now)
            waiting = waiting[count:]
        except torch.OutOfMemoryError as error:
            if len(now) == 1:
                failed[now[0].path] = f"not enough memory for one point; lower batch_size or max_tokens ({error})"
                waiting = waiting[1:]
            count = max(1, len(now) // 2)
        if waiting:
            torch.cuda.empty_cache()
            say(f"  {len(waiting)} points left, {min(count, len(waiting))} side by side")
    return failed


def _train_together(runs: Sequence[RunFolder]) -> dict[Path, str]:
    """One pass of the trainer; if it cannot begin, point by point, so that only the one at fault fails."""
    from robust_unlearning.train.trainer import Diverged, Trainer

    try:
        with GroupProgress(sum(run.recipe.steps for run in runs)) as progress:
            Trainer(runs).train(progress.row)
    except Diverged as error:
        return error.runs
    except UserError as error:
        if len(runs) == 1:
            return {runs[0].path: str(error)}
        return {path: why for run in runs for path, why in _train_together([run]).items()}
    return {}

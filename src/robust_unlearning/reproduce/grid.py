"""Training and scoring a stage's points. All stages keep their runs in one folder, by content of the recipe, so what
several ask for is trained and scored once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from robust_unlearning.errors import UserError
from robust_unlearning.evaluate.evaluator import Evaluator, open_target
from robust_unlearning.evaluate.suite import Evaluation, Suite, load_suite
from robust_unlearning.experiments.grid import Point
from robust_unlearning.experiments.selection import choose, parse_rule
from robust_unlearning.experiments.side_by_side import train_all
from robust_unlearning.recipe import Recipe
from robust_unlearning.reproduce.results import Grid, Model, chance_of, measured, selection_values
from robust_unlearning.reproduce.target import Stage, Target, points_of
from robust_unlearning.results.measures import Measured
from robust_unlearning.run.folder import RunFolder
from robust_unlearning.train.progress import EvaluationProgress

Say = Callable[[str], None]


def run_folder(out: Path, point: Point) -> Path:
    """Where a point's run lies, whatever stage asks for it."""
    return out / "runs" / f"{Path(point.source).stem}-{point.recipe.content_hash()}"


def steps_of(stage: Stage, recipe: Recipe) -> list[int]:
    """The steps after which a stage scores a run: all that are kept in the main stage, else the last."""
    kept = [each for each in recipe.snapshots if each < recipe.steps] if stage.kind == "main" else []
    return [*sorted(kept), recipe.steps]


def suites_of(target: Target) -> tuple[Suite, Suite | None]:
    """The target's suite and the one for choices, cut to `limit` questions a set."""
    own = load_suite(target.suite).limited(target.limit)
    return own, load_suite(target.validation).limited(target.limit) if target.validation else None


class Scorer:
    """Scores models of one target, loading its base once; what was scored before is read."""

    def __init__(self, target: Target, recipe: Recipe) -> None:
        self.target = target
        self.suite, self.validation = suites_of(target)
        self.evaluator = Evaluator(recipe.dtype, recipe.device)

    def evaluate(self, name: str, suite: Suite, folder: Path) -> Evaluation:
        """A model's evaluation on any suite, kept in `folder`."""
        with EvaluationProgress(folder.name) as progress:
            return self.evaluator.evaluate(open_target(name), suite, folder, progress.tick)

    def score(self, name: str, folder: Path, *, validate: bool) -> tuple[Measured, Measured | None, float]:
        """A model's answers on the suite, on the one for choices where asked, and the accuracy of guessing."""
        result = self.evaluate(name, self.suite, folder)
        other = None
        if validate and self.validation is not None:
            kept = self.evaluate(name, self.validation, folder / "scores" / "validation")
            other = measured(kept, self.target.roles)
        return measured(result, self.target.roles), other, chance_of(result)


def run_grid(target: Target, stage: Stage, out: Path, say: Say) -> Grid:
    """Train and score what is not there yet, and read all of it.

    Raises:
        UserError: the recipes have several base models, the suite lacks a role, or not one run has a model.
    """
    points = points_of(target, stage)
    bases = {point.recipe.model for point in points}
    if len(bases) > 1:
        raise UserError(f"a stage has one base model; its recipes name {', '.join(sorted(bases))}.")
    scorer = Scorer(target, points[0].recipe)
    main = stage.kind == "main"
    base, base_validation, chance = scorer.score(bases.pop(), out / "base", validate=main)
    runs = {run_folder(out, point): point for point in points}
    opened = [RunFolder.open(path, point.recipe, resume=True) for path, point in runs.items()]
    errors = train_all(opened, say=say)
    failed = {path.name: why for path, why in errors.items()}
    if len(failed) == len(runs):
        name, why = next(iter(failed.items()))
        raise UserError(f"all {len(runs)} runs failed, {name} for instance: {why}")
    models = []
    for path, point in runs.items():
        if path.name in failed:
            continue
        run = RunFolder(path, point.recipe)
        for step in steps_of(stage, point.recipe):
            last = step == point.recipe.steps
            delta = path if last else run.snapshot(step)
            folder = path if last else delta.with_suffix("")
            try:
                own, validation, _ = scorer.score(str(delta), folder, validate=main and last)
            except UserError as error:  # the base could be scored: it is this model's weights
                failed[path.name] = f"trained, but cannot be scored after {step} steps: {error}"
                break
            models.append(_model(point, run, step, folder, out, own, validation))
    return Grid(base, base_validation, chance, models, failed)


def _model(
    point: Point, run: RunFolder, step: int, folder: Path, out: Path, own: Measured, validation: Measured | None
) -> Model:
    recipe = point.recipe
    return Model(
        recipe=point.source,
        title=recipe.title,
        seed=recipe.seed,
        noise=recipe.rna_std,
        fields=dict(point.setting),
        step=step,
        last=step == recipe.steps,
        run=str(run.path.relative_to(out)),
        scores=str(folder.relative_to(out)),
        seconds=run.record["seconds"]["train"],
        test=own,
        validation=validation,
    )


def choose_noise(target: Target, grid: Grid) -> dict[str, float]:
    """The scale of the noise for each method: the rule's choice among those above 0, on validation questions.

    Where no scale keeps the rule's bounds, the one that comes nearest; methods without RNA models have none.
    """
    rule = parse_rule(target.rule)
    chosen = {}
    base = selection_values(grid.base_validation or grid.base)
    for recipe in grid.recipes:
        noises = grid.noises(recipe)
        values = [_mean(grid, recipe, noise) for noise in noises]
        if values:
            found = choose(rule, values, [base] * len(values), dict.fromkeys(base, grid.chance))
            assert found.nearest is not None
            chosen[recipe] = noises[found.nearest]
    return chosen


def _mean(grid: Grid, recipe: str, noise: float) -> Mapping[str, float]:
    """Measures on validation questions (on the suite's where there are none), means over seeds."""
    own = [selection_values(each.validation or each.test) for each in grid.at(recipe, noise)]
    return {key: sum(each[key] for each in own) / len(own) for key in own[0]}

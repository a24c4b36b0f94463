"""Training and scoring a stage's points, by the runner of all experiments. All stages keep their runs in one folder,
by content of the recipe, so what several ask for is trained and scored once.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from robust_unlearning.evaluate.suite import Evaluation, Suite, load_suite
from robust_unlearning.experiments.rule import choose, parse_rule
from robust_unlearning.experiments.runner import Runner, Say
from robust_unlearning.reproduce.results import Grid, Model, selection_values
from robust_unlearning.reproduce.target import Stage, Target, points_of
from robust_unlearning.results.measures import Measured
from robust_unlearning.run.folder import RunFolder


def suites_of(target: Target) -> tuple[Suite, Suite | None]:
    """The target's suite and the one for choices, cut to `limit` questions a set."""
    suite = load_suite(target.suite).limited(target.limit)
    return suite, load_suite(target.validation).limited(target.limit) if target.validation else None


def run_grid(target: Target, stage: Stage, out: Path, say: Say) -> Grid:
    """Train and score what is not there yet, and read all of it.

    Raises:
        UserError: the recipes have several base models, the suite lacks a role, or not one run has a model.
    """
    suite, validation = suites_of(target)
    task_sets = {"suite": suite, **({"validation": validation} if validation and stage.kind == "main" else {})}

    def read(evaluation: Evaluation) -> tuple[Measured, float]:
        chance = np.mean([1 / len(record.logprobs) for record in evaluation.records])
        return Measured.of(evaluation, target.roles.model_dump()), float(chance)

    points = points_of(target, stage)
    runner = Runner(points, task_sets, out, read, one_base=True, say=say).run()
    models = []
    for point in points:
        recipe, run = point.recipe, RunFolder(runner.folder(point), point.recipe)
        for step in (*point.earlier, recipe.steps):
            if (answers := runner.models.get((point.name, step))) is None:
                break
            last = step == recipe.steps
            scores = run.path if last else run.snapshot(step).with_suffix("")
            models.append(
                Model(
                    recipe=point.source,
                    title=recipe.title,
                    seed=recipe.seed,
                    noise=recipe.rna_std,
                    fields=point.setting,
                    step=step,
                    last=last,
                    run=str(run.path.relative_to(out)),
                    scores=str(scores.relative_to(out)),
                    seconds=run.record["seconds"]["train"],
                    test=answers["suite"][0],
                    validation=answers["validation"][0] if "validation" in answers else None,
                )
            )
    (base, chance), *checks = runner.base.values()
    return Grid(base, checks[0][0] if checks else None, chance, models, runner.failed)


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
            choice = choose(rule, values, [base] * len(values), dict.fromkeys(base, grid.chance))
            assert choice.nearest is not None
            chosen[recipe] = noises[choice.nearest]
    return chosen


def _mean(grid: Grid, recipe: str, noise: float) -> Mapping[str, float]:
    """Measures on validation questions (on the suite's where there are none), means over seeds."""
    seeds = [selection_values(model.validation or model.test) for model in grid.at(recipe, noise)]
    return {key: sum(values[key] for values in seeds) / len(seeds) for key in seeds[0]}

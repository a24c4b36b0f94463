"""The paper's question, asked where the answer is known: what a forget-token costs, and whether RNA mends it.

Every method is trained at every noise scale, retain weight and seed, and evaluated at several steps, which traces
robustness over forgetting with and without noise. RNA is then compared with the same method, seed and retain
weight without noise *where that has forgotten as much*: noise that merely slows the forgetting looks like a cure
at equal steps and is none at equal forgetting.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from robust_unlearning.errors import UserError
from robust_unlearning.evaluate.evaluator import Evaluator, open_target
from robust_unlearning.evaluate.suite import load_suite
from robust_unlearning.experiments.grid import override_words
from robust_unlearning.experiments.side_by_side import train_all
from robust_unlearning.files import shipped_or_own
from robust_unlearning.recipe import Strict, checked, load_recipe
from robust_unlearning.results.measures import Measured
from robust_unlearning.run.folder import RunFolder
from robust_unlearning.stats.estimates import Array
from robust_unlearning.train.progress import EvaluationProgress


class Study(Strict):
    """What a study trains and evaluates: recipes × noise scales × retain weights × seeds, at several steps."""

    recipes: tuple[str, ...] = Field(min_length=1)
    seeds: tuple[int, ...] = Field((0, 1, 2), min_length=1)
    noise_std: tuple[float, ...] = Field(min_length=1, description="scales of RNA; no noise is always run as well")
    weights: tuple[float, ...] = Field((1.0,), min_length=1, description="factors on the recipes' retain weight")
    steps: tuple[int, ...] = Field(min_length=1, description="evaluated after so many; the last ends the run")
    suite: str = "planted"
    limit: int | None = Field(None, ge=1, description="use so many questions of each set")
    dtype: str = "auto"
    overrides: dict[str, Any] = Field(default_factory=dict, description="changes to every recipe")


def load_study(name: str, overrides: Iterable[str] = ()) -> Study:
    """A shipped study (`tiny`, `tiny-preference`, `smollm2`), or a user's YAML file, with `field=value` overrides.

    Raises:
        UserError: no such study, or fields that are unknown or wrong; all of them in one message.
    """
    data = shipped_or_own("study", name, "assets/planted/studies", "recipes, seeds, noise_std and steps")
    return checked(Study, data, overrides, f"study {name}")


@dataclass(frozen=True)
class Point:
    """One trained candidate at one step; `noise` 0 is the method without RNA."""

    recipe: str
    seed: int
    noise: float
    weight: float
    step: int


@dataclass(frozen=True)
class Measurements:
    """What a study found: the base, and the model at every point."""

    study: Study
    base: Measured
    models: dict[Point, Measured]

    def line(self, recipe: str, seed: int, noise: float, weight: float) -> list[Measured]:
        """One candidate over its steps, the base first."""
        return [self.base, *(self.models[Point(recipe, seed, noise, weight, step)] for step in self.study.steps)]


def run_study(study: Study, out: Path) -> Measurements:
    """Train and evaluate what is not there yet in `out`, and read all of it.

    Raises:
        UserError: the folder holds runs of other recipes, the recipes differ in their model, or a run failed.
    """
    suite = load_suite(study.suite).limited(study.limit)
    runs = dict(_runs(study, out))
    bases = {run.recipe.model for run in runs.values()}
    if len(bases) > 1:
        raise UserError(f"a study has one base model; its recipes name {', '.join(sorted(bases))}.")
    failed = train_all(list(runs.values()))
    if failed:
        raise UserError("\n".join(f"{path}: {why}" for path, why in failed.items()))
    recipe = next(iter(runs.values())).recipe
    evaluator = Evaluator(recipe.dtype, recipe.device)

    def measured(target: str, folder: Path) -> Measured:
        with EvaluationProgress(folder.name) as progress:
            return Measured.of(evaluator.evaluate(open_target(target), suite, folder, progress.tick))

    base = measured(recipe.model, out / "base")
    models = {}
    for (name, seed, noise, weight), run in runs.items():
        for step in study.steps:
            last = step == study.steps[-1]
            path = run.path if last else run.snapshot(step)
            models[Point(name, seed, noise, weight, step)] = measured(str(path), path if last else path.with_suffix(""))
    return Measurements(study, base, models)


def _runs(study: Study, out: Path) -> Iterator[tuple[tuple[str, int, float, float], RunFolder]]:
    """The run folder of each (recipe, seed, noise, weight)."""
    common = {"steps": study.steps[-1], "snapshots": list(study.steps[:-1]), "dtype": study.dtype, **study.overrides}
    for name in study.recipes:
        weight_of = load_recipe(name).retain_weight
        for seed in study.seeds:
            for noise in (0.0, *study.noise_std):
                for weight in study.weights:
                    own = {"seed": seed, "noise_std": noise, "retain_weight": weight_of * weight}
                    recipe = load_recipe(name, override_words({**common, **own}))
                    folder = out / "runs" / _folder_name(name) / f"seed{seed}-noise{noise:g}-weight{weight:g}"
                    yield (name, seed, noise, weight), RunFolder.open(folder, recipe, resume=True)


def _folder_name(recipe: str) -> str:
    return Path(recipe).stem if recipe.endswith((".yaml", ".yml")) else recipe.replace("/", "-")


LEAST = 0.3
"""Forgetting (nats) that a model must have reached to be compared: before that there is nothing to mend."""


def forgetting(model: Measured) -> float:
    """How much is forgotten: mean -log p of the right option on forget questions, in nats (chance: log 4)."""
    return float(-model.forget_logp.mean())


def matched_difference(
    rna: list[Measured], plain: list[Measured], where: str, least: float
) -> tuple[Array, Array, list[float]] | None:
    """RNA less no noise at like forgetting, question by question, averaged over the steps where both are comparable.

    For each model of `rna` that has forgotten at least `least`, `plain` is interpolated between its two first
    neighbours in step that enclose as much forgetting. None where no step is comparable.

    Returns:
        Differences [n] of excess and of right answers under a forget-token, and the forgetting compared at.
    """
    excess, right, at = [], [], []
    strengths = [forgetting(each) for each in plain]
    for model in rna:
        wanted = forgetting(model)
        index = next((i for i in range(len(plain) - 1) if strengths[i] <= wanted <= strengths[i + 1]), None)
        if wanted < least or index is None or strengths[index] == strengths[index + 1]:
            continue
        share = (wanted - strengths[index]) / (strengths[index + 1] - strengths[index])
        own, low, high = (each.places[where] for each in (model, plain[index], plain[index + 1]))
        excess.append(own.excess - ((1 - share) * low.excess + share * high.excess))
        right.append(own.right - ((1 - share) * low.right + share * high.right))
        at.append(wanted)
    if not at:
        return None
    return np.mean(excess, axis=0), np.mean(right, axis=0), at

"""The paper's question, asked where the answer is known: what a forget-token costs, and whether RNA mends it.

Every method is trained at every noise scale, retain weight and seed, and evaluated at several steps, which traces
robustness over forgetting with and without noise. RNA is then compared with the same method, seed and retain
weight without noise *where that has forgotten as much*, see `matched.py`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field

from robust_unlearning.evaluate.suite import load_suite
from robust_unlearning.experiments.grid import Point, override_words, point_of
from robust_unlearning.experiments.runner import Runner
from robust_unlearning.files import shipped_or_own
from robust_unlearning.recipe import Strict, checked, load_recipe
from robust_unlearning.results.measures import Measured


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

    @property
    def scales(self) -> tuple[float, ...]:
        """Scales of the noise, 0 first: the method without RNA."""
        return 0.0, *self.noise_std


def load_study(name: str, overrides: Iterable[str] = ()) -> Study:
    """A shipped study (`tiny`, `tiny-preference`, `smollm2`), or a user's YAML file, with `field=value` overrides.

    Raises:
        UserError: no such study, or fields that are unknown or wrong; all of them in one message.
    """
    data = shipped_or_own("study", name, "assets/planted/studies", "recipes, seeds, noise_std and steps")
    return checked(Study, data, overrides, f"study {name}")


@dataclass(frozen=True)
class StudyResult:
    """What a study's models answered: the base, and by (run, step) all others."""

    study: Study
    base: Measured
    models: Mapping[tuple[str, int], Measured]

    def line(self, recipe: str, seed: int, noise: float, weight: float) -> list[Measured]:
        """One run over its steps, the base first."""
        name = run_name(recipe, seed, noise, weight)
        return [self.base, *(self.models[name, step] for step in self.study.steps)]


def run_name(recipe: str, seed: int, noise: float, weight: float) -> str:
    """Where a run lies below `runs/`."""
    folder = Path(recipe).stem if recipe.endswith((".yaml", ".yml")) else recipe.replace("/", "-")
    return f"{folder}/seed{seed}-noise{noise:g}-weight{weight:g}"


def points_of(study: Study) -> list[Point]:
    """Every run of a study, to be scored at each of its steps.

    Raises:
        UserError: recipes or overrides that are wrong.
    """
    *earlier, last = study.steps
    common = {"steps": last, "snapshots": earlier, "dtype": study.dtype, **study.overrides}
    points: dict[str, Point] = {}
    for source in study.recipes:
        retain_weight = load_recipe(source).retain_weight
        for seed, noise, weight in itertools.product(study.seeds, study.scales, study.weights):
            fields = {"seed": seed, "noise_std": noise, "retain_weight": retain_weight * weight}
            name = run_name(source, seed, noise, weight)
            points[name] = point_of(source, fields, override_words({**common, **fields}), name, earlier)
    return list(points.values())


def run_study(study: Study, out: Path) -> StudyResult:
    """Train and evaluate what is not there yet in `out`, and read all of it.

    Raises:
        UserError: the folder holds runs of other recipes, the recipes differ in their model, or a run failed.
    """
    suite = load_suite(study.suite).limited(study.limit)
    runner = Runner(points_of(study), {"suite": suite}, out, Measured.of, one_base=True, strict=True).run()
    return StudyResult(study, runner.base["suite"], {key: answers["suite"] for key, answers in runner.models.items()})

"""The paper's question, asked where the answer is known: what a forget-token costs, and whether RNA mends it.

Every method is trained at every noise scale, retain weight and seed, and evaluated at several steps, which traces
robustness over forgetting with and without noise. RNA is then compared with the same method, seed and retain
weight without noise *where that has forgotten as much*, see `matched.py`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field

from robust_unlearning import files
from robust_unlearning.errors import UserError
from robust_unlearning.evaluate.suite import load_suite
from robust_unlearning.experiments.grid import Point, override_words, point_of
from robust_unlearning.experiments.matched import LEAST, WINDOW, compare_lines, for_machines
from robust_unlearning.experiments.runner import Runner
from robust_unlearning.files import shipped_or_own
from robust_unlearning.recipe import Strict, checked, load_recipe
from robust_unlearning.report.figures import Series, trade_off
from robust_unlearning.report.tables import INCONCLUSIVE, Column, Table
from robust_unlearning.results.measures import (
    Measured,
    estimates,
    excess_in,
    forgetting,
    recovery,
    reduction,
    right_in,
    structure,
)
from robust_unlearning.stats import paired
from robust_unlearning.stats.estimates import Estimate
from robust_unlearning.stats.factors import FEWEST_SEEDS
from robust_unlearning.stats.format import NATS, PERCENT, NumberForm


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
        UserError: recipes or overrides that are wrong, or two recipes of one name.
    """
    *earlier, last = study.steps
    common = {"steps": last, "snapshots": earlier, "dtype": study.dtype, **study.overrides}
    points: dict[str, Point] = {}
    for source, other in itertools.combinations(study.recipes, 2):
        if run_name(source, 0, 0, 1) == run_name(other, 0, 0, 1):
            raise UserError(f"the runs of {source} and {other} would lie in one folder: give one file another name.")
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


ACCURACIES = {
    "forget": "forget", "near": "near", "far": "far", "clean": "clean", "control": "+control",
    "perturbed": "+forget-token",
}  # fmt: skip
COLUMNS: dict[str, str | Column] = {
    "name": "model",
    "forgotten": Column("forgotten", NATS),
    **{key: Column(header, PERCENT) for key, header in ACCURACIES.items()},
    "excess_harm": Column("excess harm", NATS),
    "reduction": Column("reduction", PERCENT),
    "recovery": Column("recovery", PERCENT),
}
MATCHED: dict[str, str | Column] = {
    "name": "model",
    "where": "token in",
    "seeds": "seeds",
    "points": "models",
    "span": "forgotten",
    "excess_difference": Column("excess harm: RNA less none", NATS),
    "right_difference": Column("right: RNA less none", PERCENT),
    "p_holm": Column("Holm p of the harm", NumberForm(".2g")),
    "verdict": "verdict",
}


def summarise(result: StudyResult, out: Path) -> str:
    """Write `study.md`, `study.json` and the figure (`study.png`, .svg, .csv) into `out`; returns the text for the
    terminal.
    """
    study, base = result.study, result.base
    questions = f"{len(base.forget)} forget, {len(base.near)} near and {len(base.far)} far questions"
    notes = [
        f"{len(study.seeds)} seeds, {study.steps[-1]} steps; {questions}, {len(base.clean)} of them perturbed. "
        f"Accuracy in %, with 95 % intervals. {structure(base, len(study.seeds))} Chance is 25 %.",
        "Forgotten: log p of the right option on forget questions, the base's less the model's, nats: what the base "
        "knew and the model does not. Excess harm: log p of the right option under a forget-token less that under a "
        "control token, nats; below 0 the forget-token does more harm than an unrelated name. Reduction and recovery "
        "are the paper's rates of accuracy with a forget-token; no bound: what they are a share of may be 0.",
    ]
    tables = {where: _table(result, where) for where in base.places}
    about = (
        "RNA less the same method, seed and retain weight without noise, where that has forgotten as much: at least "
        f"{LEAST} nats beyond the base, with a snapshot without noise on either side within {WINDOW} nats, and a "
        "monotone curve between them, which can be off by no more than the harms of the two allow; that is part of the "
        "interval. A positive difference speaks for RNA; the verdict is on excess harm. Models: with noise, compared "
        "over seeds, retain weights and steps. Holm's p is for all rows together, and a verdict needs p < 0.05."
    )
    pairs = [
        _like_forgetting(result, recipe, noise, where)
        for recipe in study.recipes
        for where in base.places
        for noise in study.noise_std
    ]
    matched = Table("At like forgetting", MATCHED, _judged(pairs), about)
    sections = [part for table in tables.values() for part in (f"## {table.title}", table.markdown())]
    sections += [f"## {matched.title}", matched.notes, matched.markdown()]
    text = [part for table in (*tables.values(), matched) for part in (table.title, table.text())]
    try:
        _draw(result, next(iter(base.places)), out / "study.png")
        sections.append("![excess harm over forgetting](study.png)")
    except UserError as error:
        notes.append(f"No figure: {error}")
    files.write_text(out / "study.md", "\n\n".join(["# Study", *notes, *sections]) + "\n")
    data = {
        "study": study.model_dump(mode="json"),
        "tables": {where: table.as_json() for where, table in tables.items()},
        "like_forgetting": for_machines(matched),
    }
    files.write_json(out / "study.json", data)
    return "\n\n".join([*text, about, *notes])


def _table(result: StudyResult, where: str) -> Table:
    """The base, and every recipe at every noise scale and the plain retain weight, after the last step, over seeds."""
    study = result.study
    weight = min(study.weights, key=lambda factor: abs(math.log(factor)))

    def seeds(recipe: str, noise: float) -> list[Measured]:
        return [result.line(recipe, seed, noise, weight)[-1] for seed in study.seeds]

    methods = [(recipe, {noise: seeds(recipe, noise) for noise in study.scales}) for recipe in study.recipes]
    title = f"After {study.steps[-1]} steps, a token in place of or in: {where}"
    return Table(title, COLUMNS, method_rows(result.base, methods, where, "noise_std"))


def method_rows(
    base: Measured, methods: Iterable[tuple[str, Mapping[float, Sequence[Measured]]]], where: str, scale: str
) -> list[dict[str, Any]]:
    """The base, and every method at every scale of the noise over its seeds, tokens in one place.

    Args:
        methods: what tables call each, and scale, 0 without noise -> a model for each seed.
        scale: the field that holds the scale.
    """
    rows: list[dict[str, Any]] = [{"name": "base", **estimates([base], where)}]
    right = right_in(where)
    for method, scales in methods:
        plain = scales.get(0.0, ())
        for noise, models in scales.items():
            if models:
                cells = {"forgotten": forgetting.over(models, base), **estimates(models, where)}
                cells["reduction"] = reduction(models, base, right)
                if noise and len(plain) == len(models):
                    cells["recovery"] = recovery(models, plain, base, right)
                rows.append({"name": method + (f" + RNA {noise:g}" if noise else ""), scale: noise, **cells})
    return rows


def _like_forgetting(result: StudyResult, recipe: str, noise: float, where: str) -> dict[str, Any]:
    """RNA at one scale against no noise at like forgetting: averaged over weights and steps, then over seeds."""
    study, base = result.study, result.base
    lines = {
        seed: [
            (result.line(recipe, seed, noise, weight)[1:], result.line(recipe, seed, 0.0, weight)[1:])
            for weight in study.weights
        ]
        for seed in study.seeds
    }
    (harm, at), (right, _) = (compare_lines(lines, base, of(where)) for of in (excess_in, right_in))
    row = {"name": f"{recipe} + RNA {noise:g}", "recipe": recipe, "noise_std": noise, "where": where, "points": len(at)}
    if harm is None or right is None:
        models = [model for of_seed in lines.values() for pair in of_seed for line in pair for model in line]
        strongest = max(forgetting.over([model], base).value or 0.0 for model in models)
        return {
            **row,
            "verdict": f"nothing to compare: at most {strongest:.2f} nats forgotten, or no match within {WINDOW}",
        }
    return {
        **row,
        "seeds": len(harm.by_seed),
        "span": f"{min(at):.2f} to {max(at):.2f}",
        "excess_difference": harm.estimate(),
        "right_difference": right.estimate(),
        "forgetting": at,
    }


def _judged(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows with a verdict each: of Holm's p among all of them, so that one false one comes in 5 % of studies."""
    compared = [row for row in rows if "excess_difference" in row]
    for row, p in zip(compared, paired.holm([row["excess_difference"].p() for row in compared]), strict=True):
        mends = (row["excess_difference"].value or 0.0) > 0
        verdict = INCONCLUSIVE if p >= paired.ALPHA else "RNA mends" if mends else "RNA harms"
        of_these = ", of these models" * (verdict != INCONCLUSIVE and row["seeds"] < FEWEST_SEEDS)
        row |= {"p_holm": p, "verdict": f"{verdict}{of_these}"}
    return list(rows)


def _draw(result: StudyResult, where: str, path: Path) -> None:
    """A panel for each recipe: excess harm over forgetting, a line for each noise scale (mean over seeds)."""
    study = result.study
    panels = []
    for recipe in study.recipes:
        series = []
        for noise in study.scales:
            points = []
            for weight in study.weights:
                lines = [result.line(recipe, seed, noise, weight) for seed in study.seeds]
                for models in zip(*lines, strict=True):
                    forgotten = forgetting.over(models, result.base)
                    points.append((Estimate(forgotten.value), excess_in(where).over(models)))
            label = f"RNA {noise:g}" if noise else "no noise"
            series.append(Series(label, points, "D" if noise else "o", joined=len(study.weights) == 1))
        panels.append((f"{recipe}: excess harm (nats), token in {where}", series))
    trade_off(
        panels,
        "forgotten: log p of the right option, base less model, nats (more is stronger)",
        "What a forget-token costs at each degree of forgetting (95 % intervals over seeds and questions)",
        path,
    )

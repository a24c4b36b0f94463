"""Training and scoring a stage's points, by the runner of all experiments, and what their models answered: arrays over
questions, the same questions for every model of a target, kept as plain numbers in a stage's `result.json`.

All stages keep their runs in one folder, by content of the recipe, so what several ask for is trained and scored once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Self, Union, get_args, get_origin, get_type_hints

import numpy as np

from robust_unlearning.evaluate.suite import Evaluation, Suite, load_suite
from robust_unlearning.experiments.rule import Answers, Rule, Values, choose, parse_rule
from robust_unlearning.experiments.runner import Runner, Say
from robust_unlearning.reproduce.target import Stage, Target, points_of
from robust_unlearning.results.measures import Measured, excess, retained, right
from robust_unlearning.run.folder import RunFolder
from robust_unlearning.stats.format import NATS, PERCENT, shown

MEASURES = {
    "forget": ("forget accuracy", PERCENT, "%"),
    "retain": ("retain accuracy", PERCENT, "%"),
    "perturbed": ("accuracy with a forget-token", PERCENT, "%"),
    "excess_harm": ("excess harm", NATS, "nats"),
}
"""A rule's measures as a sentence names them, how their numbers are written, and their unit."""


@dataclass(frozen=True)
class Model:
    """One trained model at one step.

    Attributes:
        recipe: its name; `title` is what tables call the method.
        noise: √ν, 0 without RNA.
        fields: what differs between the stage's points, seeds left out.
        step: it was scored after so many.
        last: whether the run ends there.
        run: run folder, relative to the reproduction's.
        scores: folder of its evaluation on the target's suite, relative to the reproduction's.
        seconds: of training, all steps.
        test, validation: its answers.
    """

    recipe: str
    title: str
    seed: int
    noise: float
    fields: Mapping[str, Any]
    step: int
    last: bool
    run: str
    scores: str
    seconds: float
    test: Measured
    validation: Measured | None

    @property
    def label(self) -> str:
        """What tables call it."""
        return self.title + (f" + RNA {self.noise:g}" if self.noise else "")


@dataclass(frozen=True)
class Grid:
    """What a grid of models answered, and their base.

    Attributes:
        base, base_validation: the base's answers.
        chance: accuracy of guessing.
        models: at every step that was scored.
        failed: name of a run -> why it has no model.
    """

    base: Measured
    base_validation: Measured | None
    chance: float
    models: Sequence[Model]
    failed: Mapping[str, str]

    def as_json(self) -> dict[str, Any]:
        """All of it for `result.json`."""
        return dict(to_json(self))

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """The reverse of `as_json`."""
        made: Self = from_json(cls, data)
        return made

    @property
    def recipes(self) -> dict[str, str]:
        """Recipe -> what tables call it, in order."""
        return {model.recipe: model.title for model in self.models}

    @property
    def places(self) -> list[str]:
        """Where tokens were put."""
        return list(self.base.places)

    def noises(self, recipe: str) -> list[float]:
        """Scales above 0 that a recipe was trained with."""
        return sorted({model.noise for model in self.models if model.recipe == recipe and model.noise})

    def pick(self, recipe: str, wanted: Callable[[Model], bool], *, last: bool = True) -> list[Model]:
        """A recipe's models, by seed and step; only those of the last step unless told otherwise."""
        models = [model for model in self.models if model.recipe == recipe and (model.last or not last)]
        return sorted(filter(wanted, models), key=lambda model: (model.seed, model.step))

    def at(self, recipe: str, noise: float, *, last: bool = True) -> list[Model]:
        """A recipe's models with noise of one scale, by seed and step."""
        return self.pick(recipe, lambda model: model.noise == noise, last=last)

    def pairs(self, recipe: str, noise: float) -> list[tuple[Model, Model]]:
        """(without noise, with it) after the last step, for every seed that has both."""
        plain = {model.seed: model for model in self.at(recipe, 0)}
        return [(plain[model.seed], model) for model in self.at(recipe, noise) if model.seed in plain]


def to_json(value: Any) -> Any:
    """Dataclasses, mappings, sequences and arrays as JSON; numbers of arrays to a millionth."""
    if is_dataclass(value):
        return {field.name: to_json(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, np.ndarray):
        return np.round(value, 6).tolist()
    if isinstance(value, Mapping):
        return {key: to_json(inner) for key, inner in value.items()}
    return [to_json(inner) for inner in value] if isinstance(value, list | tuple) else value


def from_json(kind: Any, data: Any) -> Any:
    """The reverse of `to_json`: what a type hint says `data` is."""
    if is_dataclass(kind):
        hints = get_type_hints(kind)
        return kind(**{key: from_json(hints[key], value) for key, value in data.items()})  # type: ignore[operator]
    origin, inner = get_origin(kind), get_args(kind)
    if origin is np.ndarray:
        return np.array(data, dtype=float)
    if origin in (Union, UnionType):
        return None if data is None else from_json(inner[0], data)
    if isinstance(data, dict) and inner:
        return {key: from_json(inner[1], value) for key, value in data.items()}
    return [from_json(inner[0], value) for value in data] if isinstance(data, list) and inner else data


def selection_values(answers: Measured) -> dict[str, float]:
    """What a selection rule reads."""
    values = {
        "forget": answers.forget,
        "retain": retained(answers),
        "perturbed": right(answers),
        "excess_harm": excess(answers),
    }
    return Answers(values, {}).means()


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


@dataclass(frozen=True)
class NoiseChoice:
    """What a rule chose among the scales of the noise.

    Attributes:
        scales: recipe -> the chosen scale, which keeps the rule's bounds.
        unkept: recipe -> why none was chosen, a sentence: which bound no scale keeps, and by how much.
    """

    scales: Mapping[str, float]
    unkept: Mapping[str, str]


def choose_noise(target: Target, grid: Grid) -> NoiseChoice:
    """The scale of the noise for each method: the rule's choice among those above 0, on validation questions.

    A method of which no scale keeps the rule's bounds has none: what breaks them is no RNA that could be judged.
    Methods without RNA models stand in neither part.
    """
    rule = parse_rule(target.rule)
    scales, unkept = {}, {}
    base = selection_values(grid.base_validation or grid.base)
    chance = dict.fromkeys(base, grid.chance)
    for recipe in grid.recipes:
        noises = grid.noises(recipe)
        values = [_mean(grid, recipe, noise) for noise in noises]
        if not values:
            continue
        choice = choose(rule, values, [base] * len(values), chance)
        if choice.index is not None:
            scales[recipe] = noises[choice.index]
            continue
        assert choice.nearest is not None
        apart = f"{noises[choice.nearest]:g} comes nearest, with {' and '.join(choice.broken[choice.nearest])}"
        unkept[recipe] = _unkept(rule, noises, values, base, chance) or f"no scale keeps all bounds together: {apart}"
    return NoiseChoice(scales, unkept)


def _unkept(rule: Rule, noises: Sequence[float], values: Sequence[Values], base: Values, chance: Values) -> str:
    """The bounds that no scale keeps, each with the scale that comes nearest; nothing where each is kept by one."""
    parts = []
    for bound in rule.bounds:
        beyond, noise, value = min(
            (bound.excess(each, base, chance), noise, each[bound.measure])
            for noise, each in zip(noises, values, strict=True)
        )
        if beyond > 0:
            name, form, unit = MEASURES[bound.measure]
            limit, found, by = (shown(number, form) for number in (bound.limit(base, chance), value, beyond))
            parts.append(
                f"no scale keeps {name} {'at most' if bound.at_most else 'at least'} {limit} {unit}: "
                f"{found} {unit} at best (scale {noise:g}), {by} beyond it"
            )
    return "; ".join(parts)


def _mean(grid: Grid, recipe: str, noise: float) -> Mapping[str, float]:
    """Measures on validation questions (on the suite's where there are none), means over seeds."""
    seeds = [selection_values(model.validation or model.test) for model in grid.at(recipe, noise)]
    return {key: sum(values[key] for values in seeds) / len(seeds) for key in seeds[0]}

"""What trained models answered, kept as plain numbers in a stage's `result.json`.

Answers are arrays over questions, the same questions for every model of a target, so that any two can be compared
question by question.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Self, Union, get_args, get_origin, get_type_hints

import numpy as np

from robust_unlearning.experiments.answers import Answers
from robust_unlearning.results.measures import Measured, excess, retained, right


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


def folder_of(out: Path, name: str) -> Path:
    """A stage's own folder."""
    return out / "stages" / name

"""What trained models answered: read from evaluations, kept as plain numbers in a stage's `result.json`.

Answers are arrays over questions, the same questions for every model of a target, so that any two can be compared
question by question.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from robust_unlearning.evaluate.suite import Evaluation
from robust_unlearning.experiments.selection import Answers
from robust_unlearning.reproduce.target import Roles
from robust_unlearning.results.measures import Measured, Perturbed, excess, retained, right
from robust_unlearning.stats.estimates import Array


def measured(evaluation: Evaluation, own: Roles) -> Measured:
    """One model's answers by a target's roles, see `Measured.of`."""
    return Measured.of(evaluation, own.model_dump())


def chance_of(evaluation: Evaluation) -> float:
    """Accuracy of guessing, mean over all questions."""
    return float(np.mean([1 / len(record.logprobs) for record in evaluation.records]))


def as_json(own: Measured) -> dict[str, Any]:
    """Answers as lists, log-probabilities to a millionth of a nat."""

    def numbers(values: Array) -> list[float]:
        return [float(each) for each in np.round(values, 6)]

    places = {place: {key: numbers(each) for key, each in vars(one).items()} for place, one in own.places.items()}
    return {key: numbers(each) for key, each in vars(own).items() if key != "places"} | {"places": places}


def from_json(data: Mapping[str, Any]) -> Measured:
    """The reverse of `as_json`."""
    arrays = {key: np.array(value, dtype=float) for key, value in data.items() if key != "places"}
    places = {
        place: Perturbed(**{key: np.array(value, dtype=float) for key, value in one.items()})
        for place, one in data["places"].items()
    }
    return Measured(**arrays, places=places)


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

    def as_json(self) -> dict[str, Any]:
        """All of it for `result.json`."""
        data = dict(vars(self)) | {"fields": dict(self.fields), "test": as_json(self.test)}
        return data | {"validation": as_json(self.validation) if self.validation else None}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Model:
        """The reverse of `as_json`."""
        validation = from_json(data["validation"]) if data["validation"] else None
        return cls(**{**data, "test": from_json(data["test"]), "validation": validation})


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
        validation = as_json(self.base_validation) if self.base_validation else None
        about = {"base": as_json(self.base), "base_validation": validation, "chance": self.chance}
        return about | {"failed": dict(self.failed), "models": [each.as_json() for each in self.models]}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Grid:
        """The reverse of `as_json`."""
        validation = from_json(data["base_validation"]) if data["base_validation"] else None
        models = [Model.from_json(each) for each in data["models"]]
        return cls(from_json(data["base"]), validation, data["chance"], models, data["failed"])

    @property
    def recipes(self) -> dict[str, str]:
        """Recipe -> what tables call it, in order."""
        return {each.recipe: each.title for each in self.models}

    @property
    def places(self) -> list[str]:
        """Where tokens were put."""
        return list(self.base.places)

    def noises(self, recipe: str) -> list[float]:
        """Scales above 0 that a recipe was trained with."""
        return sorted({each.noise for each in self.models if each.recipe == recipe and each.noise})

    def pick(self, recipe: str, wanted: Callable[[Model], bool], *, last: bool = True) -> list[Model]:
        """A recipe's models, by seed and step; only those of the last step unless told otherwise."""
        own = [each for each in self.models if each.recipe == recipe and wanted(each) and (each.last or not last)]
        return sorted(own, key=lambda each: (each.seed, each.step))

    def at(self, recipe: str, noise: float, *, last: bool = True) -> list[Model]:
        """A recipe's models with noise of one scale, by seed and step."""
        return self.pick(recipe, lambda each: each.noise == noise, last=last)

    def pairs(self, recipe: str, noise: float) -> list[tuple[Model, Model]]:
        """(without noise, with it) after the last step, for every seed that has both."""
        plain = {each.seed: each for each in self.at(recipe, 0)}
        return [(plain[each.seed], each) for each in self.at(recipe, noise) if each.seed in plain]


def selection_values(own: Measured) -> dict[str, float]:
    """What a selection rule reads."""
    values = {"forget": own.forget, "retain": retained(own), "perturbed": right(own), "excess_harm": excess(own)}
    return Answers(values, {}).means()


def folder_of(out: Path, name: str) -> Path:
    """A stage's own folder."""
    return out / "stages" / name

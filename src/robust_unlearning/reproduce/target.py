"""What a reproduction consists of: a model, its questions, and stages, each with the paper's items it stands for.

Three targets are shipped as YAML: `tiny`, `smollm2`, `zephyr-7b`. A stage is a grid of recipes that are trained and
scored, an analysis of models that the main stage has trained, or a measurement of time.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator

from robust_unlearning.errors import UserError, all_of, unknown
from robust_unlearning.experiments.grid import Point, Sweep, expand
from robust_unlearning.experiments.rule import DEFAULT_RULE, parse_rule
from robust_unlearning.files import shipped, shipped_or_own
from robust_unlearning.recipe import Strict, checked, wrong_changes

Kind = Literal["main", "grid", "ngrams", "noise-sensitivity", "theory", "activations", "time"]
TRAINING = ("main", "grid")
"""Kinds that train models; the others look at those of the main stage, but `time`, which times runs of its own."""
_SHIPPED = "assets/reproduce/targets"


class Stage(Strict):
    """One stage.

    `main` is the grid that the other stages lean on: methods with and without RNA, scored along their steps, with a
    noise scale chosen for each method on validation questions. A `grid` is scored after its last step.
    """

    title: str
    kind: Kind
    stands_for: str = Field(description="items of the paper")
    command: str = Field(description="what does the same alone; for `time` only `unlearn reproduce` itself with --only")
    reduced: str = Field("", description="what is less here than in the paper, said in the report")
    grids: tuple[dict[str, Any], ...] = Field(
        (), description="as in a sweep; seeds are the target's, unless one names its own"
    )
    seeds: int = Field(1, ge=1, description="use the target's first so many seeds")
    recipes: tuple[str, ...] = Field((), description="of an analysis: the main stage's recipes to look at")
    rna: bool = Field(True, description="of an analysis: look at them with the chosen noise too")
    documents: int = Field(12, ge=1, description="of an analysis; those whose own top n-grams are taken")
    questions: int = Field(32, ge=1, description="of each question set")
    probes: int = Field(4, ge=1)
    draws: int = Field(32, ge=20, description="of the noise, for Theorem 4.2")
    max_tokens: int = Field(128, ge=2, description="of a document")
    corpora: tuple[str, ...] = Field((), description="forget text whose n-grams are taken")
    n: tuple[int, ...] = Field((2,), description="words of an n-gram")
    each: int = Field(10, ge=1, description="n-grams of each class (Figure 4)")
    sample: int | None = Field(None, ge=1, description="of classes: at most so many n-grams of a document, drawn")
    per_document: int = Field(10, ge=1, description="n-grams of each of `documents`, the most like it (Tables 2 to 5)")
    embedder: str = "all-minilm-l6-v2"
    pairs: int = Field(8, ge=2, multiple_of=2, description="of kind time: pairs of runs, half of them with RNA first")
    steps: int = Field(10, ge=1, description="of kind time: steps of each run of a pair")


class Roles(Strict):
    """Patterns of task names, where the names themselves do not tell; see `results.roles.role_of`."""

    forget: tuple[str, ...] = ()
    retain: tuple[str, ...] = ()
    perturbed: tuple[str, ...] = ()
    related: tuple[str, ...] = Field((), description="retained tasks close in topic to what is forgotten")


class Target(Strict):
    """A reproduction at one model."""

    about: str
    suite: str
    validation: str | None = Field(None, description="suite on which noise scales are chosen; else on `suite`")
    roles: Roles = Roles()
    rule: str = Field(DEFAULT_RULE, description="of that choice, among the scales above 0")
    seeds: tuple[int, ...] = Field((0, 1, 2), min_length=1)
    set: dict[str, Any] = Field(default_factory=dict, description="changes to every recipe")
    limit: int | None = Field(None, ge=1, description="use so many questions of each set")
    config: str | None = Field(None, description="config.json for the estimate, where the model is not here")
    prompts: tuple[int, int] | None = Field(
        None, description="of an evaluation on `suite` and on `validation`, for the estimate where they are not here"
    )
    flops: float = Field(2e14, gt=0, description="sustained FLOP/s, for the estimate of models that are not here")
    reduced: tuple[str, ...] = Field((), description="what is less here than in the paper, said in the report")
    stages: dict[str, Stage] = Field(min_length=1)

    @field_validator("set")
    @classmethod
    def _fits_a_recipe(cls, value: dict[str, Any]) -> dict[str, Any]:
        if wrong := wrong_changes(value):
            raise ValueError(" ".join(wrong))
        return value


def target_names() -> list[str]:
    """Names of the shipped targets."""
    return sorted(shipped(_SHIPPED))


def load_target(name: str, overrides: Iterable[str] = ()) -> Target:
    """A shipped target or a YAML file of the user's own, with `field=value` overrides (`stages.NAME.field=value`).

    Raises:
        UserError: no such target, or fields that are unknown or wrong; all of them in one message.
    """
    data = shipped_or_own("target", name, _SHIPPED, "about, suite and stages")
    given = data.get("stages")
    stages = given if isinstance(given, dict) else {}
    kept, errors = [], []
    for word in overrides:
        parts = word.partition("=")[0].split(".")
        if len(parts) > 2 and parts[0] == "stages" and parts[1] not in stages:
            errors.append(unknown("stage", parts[1], stages, f"Given: {word!r}."))
        else:
            kept.append(word)
    target = checked(Target, data, kept, f"target {name}", errors)
    _check(target, name)
    return target


def _check(target: Target, name: str) -> None:
    parse_rule(target.rule)
    mains = [key for key, stage in target.stages.items() if stage.kind == "main"]
    errors = [] if len(mains) == 1 else [f"it needs one stage of kind main; it has {len(mains)}."]
    for key, stage in target.stages.items():
        if stage.kind in TRAINING and not stage.grids:
            errors.append(f"stages.{key}.grids: a stage of kind {stage.kind} trains something.")
        if stage.kind not in TRAINING and not stage.recipes:
            errors.append(f"stages.{key}.recipes: name recipes of the main stage.")
        if stage.kind == "ngrams" and not stage.corpora:
            errors.append(f"stages.{key}.corpora: name forget text.")
    if errors:
        raise all_of(errors, f"target {name}")


def main_name(target: Target) -> str:
    """The name of the main stage."""
    return next(key for key, stage in target.stages.items() if stage.kind == "main")


def chosen_stages(target: Target, only: Iterable[str]) -> dict[str, Stage]:
    """The stages named, all where none is named: the main one first, as others lean on it, else in their order.

    Raises:
        UserError: a name that no stage has.
    """
    names = list(only)
    for name in names:
        if name not in target.stages:
            raise UserError(unknown("stage", name, target.stages))
    ordered = sorted(target.stages.items(), key=lambda item: item[1].kind != "main")
    return {key: stage for key, stage in ordered if not names or key in names}


def points_of(target: Target, stage: Stage) -> list[Point]:
    """What a stage trains, a point for each combination of its grids, its seeds and the target's changes.

    A run is named by its recipe's content, whatever stage asks for it. The main stage scores it after every step of
    which a snapshot is kept too, others after the last alone.

    Raises:
        UserError: recipes or fields that are wrong.
    """
    if not stage.grids:
        return []
    changes = {key: [value] if isinstance(value, list) else value for key, value in _flat(target.set).items()}
    seeds = list(target.seeds[: stage.seeds])
    points = expand(Sweep(grids=tuple({"seed": seeds, **grid, **changes} for grid in stage.grids)))
    return [
        replace(
            point,
            name=f"{Path(point.source).stem}-{point.recipe.content_hash()}",
            earlier=tuple(sorted(step for step in point.recipe.snapshots if step < point.recipe.steps))
            if stage.kind == "main"
            else (),
        )
        for point in points
    ]


def folder_of(out: Path, name: str) -> Path:
    """A stage's own folder."""
    return out / "stages" / name


def _flat(changes: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested changes as dotted fields."""
    flat: dict[str, Any] = {}
    for key, value in changes.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat

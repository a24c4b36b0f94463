"""What a sweep consists of: fields with several values, and the checked recipe of every combination.

A sweep file (YAML) holds one or several grids, each `field: value` or `field: [values]`; a field that is itself a
list takes a list of lists. The recipe is a field like any other.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, ValidationError

from robust_unlearning import files
from robust_unlearning.errors import UserError, nearest
from robust_unlearning.experiments.ranges import parse_values
from robust_unlearning.recipe import Recipe, Strict, checked, load_recipe, recipe_names

SEEDS = ("seed", "noise_seed")
"""Fields whose values repeat a setting rather than change it."""
LONGEST_NAME = 100


class Sweep(Strict):
    """Grids of recipes, and how their models are scored and one of them chosen."""

    grids: tuple[dict[str, Any], ...] = Field(min_length=1, description="field -> a value, or a list of values")
    tasks: str | None = Field(None, description="suite whose scores are reported")
    validation: str | None = Field(None, description="suite on which a point is chosen; planted has its own")
    select: str | None = Field(None, description="rule of the choice; see rule.py")
    forget: tuple[str, ...] = Field((), description="patterns of the tasks whose knowledge should go")
    retain: tuple[str, ...] = Field((), description="patterns of the tasks whose knowledge should stay")
    perturbed: tuple[str, ...] = Field((), description="patterns of retain tasks with a forget-token in them")


@dataclass(frozen=True)
class Point:
    """One model to be trained, whatever asks for it.

    Attributes:
        name: of its run folder, below `runs/`.
        source: the recipe's name.
        fields: what is set in it and differs between the points, `recipe` among them where there are several.
        recipe: the whole recipe.
        earlier: steps before the last after which it is scored too; the recipe keeps a snapshot of each.
    """

    name: str
    source: str
    fields: Mapping[str, Any]
    recipe: Recipe
    earlier: tuple[int, ...] = ()

    @property
    def setting(self) -> dict[str, Any]:
        """`fields` without seeds: points that agree in it are repetitions of each other."""
        return {key: value for key, value in self.fields.items() if key not in SEEDS}


def point_of(
    source: str, fields: Mapping[str, Any], words: Iterable[str], name: str = "", earlier: Iterable[int] = ()
) -> Point:
    """A point from a recipe and the `field=value` words that change it; see `Point` for the rest.

    Without a name it gets one that can be read and is unlike that of any other recipe.

    Raises:
        UserError: the recipe or a change is wrong.
    """
    recipe = load_recipe(source, words)
    readable = re.sub(r"[^\w.=+-]+", "-", label(fields).replace(", ", "_")).strip("-")
    name = name or f"{readable[:LONGEST_NAME] or 'point'}-{recipe.content_hash()[:8]}"
    return Point(name, source, fields, recipe, tuple(earlier))


def label(fields: Mapping[str, Any]) -> str:
    """Fields as they are typed."""
    return ", ".join(f"{key}={_shown(value)}" for key, value in fields.items())


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return "+".join(map(_shown, value)) or "none"
    return "none" if value is None else str(value)


def sweep_names() -> list[str]:
    """Names of the shipped sweeps, as `unlearn list` prints them."""
    folder = _shipped()
    return sorted(str(path.relative_to(folder).with_suffix("")) for path in folder.rglob("*.yaml"))


def sweep_summary(name: str) -> str:
    """The first line of a shipped sweep's file, which says what it is."""
    return (_shipped() / f"{name}.yaml").read_text(encoding="utf-8").splitlines()[0].lstrip("# ")


def _shipped() -> Path:
    return files.package_dir() / "assets" / "sweeps"


def load_sweep(name: str, words: Iterable[str] = (), **options: Any) -> Sweep:
    """The sweep that a command line names.

    Args:
        name: a shipped sweep, a YAML file with `grids`, or one or several recipes with commas.
        words: `field=values`; in a sweep they take the place of the field's values in every grid.
        options: fields of `Sweep` that take the place of the file's, where they are not None and not empty.

    Raises:
        UserError: no such sweep or recipe, or fields that are unknown or wrong.
    """
    data: dict[str, Any] = _file(name) or {"grids": [{"recipe": parse_values(name)}]}
    source = f"sweep {name}"
    data |= {key: value for key, value in options.items() if value}
    swept = {}
    for word in words:
        field, equals, text = word.partition("=")
        if not equals or not field:
            raise UserError(f"{source}: {word!r} is no field=value, for example noise_std=0,0.01,0.02.")
        swept[field.strip().removeprefix("--")] = parse_values(text)
    try:
        sweep = checked(Sweep, data, [], source)
    except UserError as error:
        raise UserError("\n".join([str(error), *_wrong_points(data["grids"], swept)])) from error
    return sweep.model_copy(update={"grids": tuple({**grid, **swept} for grid in sweep.grids)})


def _wrong_points(grids: Any, swept: Mapping[str, Any]) -> list[str]:
    """What `expand` finds wrong with the grids of a sweep that cannot be made; nothing where they are no grids."""
    if not isinstance(grids, list) or not all(isinstance(grid, dict) and grid for grid in grids):
        return []
    try:
        expand(Sweep(grids=tuple({**grid, **swept} for grid in grids)))
    except UserError as error:
        return [str(error)]
    except ValidationError:
        return []
    return []


def _file(name: str) -> dict[str, Any] | None:
    """The data of a sweep file; None where `name` means recipes."""
    shipped = sweep_names()
    if name in shipped:
        path = _shipped() / f"{name}.yaml"
    elif name.endswith((".yaml", ".yml")) and "," not in name:
        path = files.locate(name)
    elif all(part in recipe_names() or part.endswith((".yaml", ".yml")) for part in name.split(",")):
        return None
    else:
        close = nearest(name, [*shipped, *recipe_names()])
        hint = f" Did you mean {close!r}?" if close else ""
        raise UserError(
            f"no sweep and no recipe {name!r}.{hint} Run `unlearn list sweeps` and `unlearn list recipes`, or name "
            "a YAML file."
        )
    data = files.read_yaml(path, "sweep or recipe")
    return data if isinstance(data, dict) and "grids" in data else None


def expand(sweep: Sweep) -> list[Point]:
    """A point for every combination of every grid, in order; equal recipes are kept once.

    Raises:
        UserError: a grid without a recipe, or recipes that are wrong; every error in one message.
    """
    combinations: list[dict[str, Any]] = []
    for grid in sweep.grids:
        if "recipe" not in grid:
            raise UserError(f"a grid needs a recipe; this one has {', '.join(grid) or 'nothing'}.")
        values = [value if isinstance(value, list) else [value] for value in grid.values()]
        combinations += [dict(zip(grid, chosen, strict=True)) for chosen in itertools.product(*values)]
    keys = dict.fromkeys(key for given in combinations for key in given)
    swept = [key for key in keys if len({repr(given.get(key)) for given in combinations}) > 1]
    points: dict[str, Point] = {}
    errors: dict[str, list[str]] = {}  # a sentence -> the points it is said of
    for given in combinations:
        changes = {key: value for key, value in given.items() if key != "recipe"}
        fields = {key: given[key] for key in swept if key in given}
        source = str(given["recipe"])
        try:
            point = point_of(source, fields, override_words(changes))
        except UserError as error:
            sentence = str(error).replace(source, "…")  # the same of another recipe is said once
            errors.setdefault(sentence, []).append(f"{source} {label(fields)}".strip())
            continue
        points.setdefault(point.recipe.content_hash(), point)
    if errors:
        wrong = sum(map(len, errors.values()))
        lines = [f"{where[0] or 'recipe'}: {error}" for error, where in list(errors.items())[:5]]
        raise UserError("\n".join([f"{wrong} of {len(combinations)} points are wrong, for instance:", *lines]))
    if not points:
        raise UserError("the sweep has no point: a field has no value.")
    return list(points.values())


def override_words(changes: Mapping[str, Any]) -> list[str]:
    """The `field=value` words that `load_recipe` takes for these changes."""

    def text(value: Any) -> str:
        return yaml.safe_dump(value, default_flow_style=True, width=float("inf")).removesuffix("...\n").strip()

    return [f"{key}={text(value)}" for key, value in changes.items()]

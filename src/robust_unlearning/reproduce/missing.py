"""What a target needs that the package does not bring: models, corpora, questions, an embedder. One list of what is
missing, and how to bring it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import yaml

from robust_unlearning import files
from robust_unlearning.data.corpora import HUB
from robust_unlearning.errors import UserError
from robust_unlearning.evaluate.suite import BUNDLED_SUITES
from robust_unlearning.models.convert import BUNDLED_MODELS
from robust_unlearning.recipe import Recipe
from robust_unlearning.reproduce.target import Stage, Target, main_name, points_of


def missing(target: Target, stages: Mapping[str, Stage]) -> list[str]:
    """A sentence for each thing that is not here; empty where all stages can begin. Nothing is loaded or fetched."""
    every = [*stages.values(), target.stages[main_name(target)]]
    recipes = list({point.name: point.recipe for stage in every for point in points_of(target, stage)}.values())
    lacking = [why for model in dict.fromkeys(recipe.model for recipe in recipes) if (why := _model(model))]
    wanted = [(path, f"set.{key}=PATH") for recipe in recipes for key, path in _texts(recipe)]
    wanted += [(path, "stages of kind ngrams: corpora") for stage in stages.values() for path in stage.corpora]
    for field in ("suite", "validation"):
        if name := getattr(target, field):
            paths, why = _suite(name)
            lacking += [why] if why else []
            wanted += [(path, f"{field}=SUITE.yaml with other paths") for path in paths]
    for path in dict.fromkeys(path for path, _ in wanted):
        if why := _path(path):
            ways = dict.fromkeys(way for other, way in wanted if other == path)
            lacking.append(f"{why} Bring it, or name another: {', '.join(ways)}.")
    return lacking


def _model(name: str) -> str:
    if name in BUNDLED_MODELS or Path(name).expanduser().exists():
        return ""
    if _cached(name, "model", "config.json") or not _offline():
        return ""
    where = "not in the hub's cache, and HF_HUB_OFFLINE forbids to fetch it"
    return f"model {name}: {where}. Bring it, or name a folder: set.model=DIR."


def _texts(recipe: Recipe) -> Iterable[tuple[str, str]]:
    for name, topic in recipe.topics.items():
        for side in ("forget", "retain"):
            of_topic, common = getattr(topic, side), getattr(recipe, side, None)
            if of_topic is not None:
                yield f"topics.{name}.{side}.path", of_topic.path
            elif common is not None:
                yield f"{side}.path", common.path


def _path(path: str) -> str:
    if path.startswith(HUB):
        name = path.removeprefix(HUB)
        if _cached(name, "dataset", "README.md") or not _offline():
            return ""
        return f"the data set {name} is not in the hub's cache, and HF_HUB_OFFLINE forbids to fetch it."
    try:
        files.locate(path)
    except UserError as error:
        return str(error).rstrip(".") + "."
    return ""


def _suite(name: str) -> tuple[list[str], str]:
    """The paths that a suite's questions name, and why they cannot be known; the suite is checked when it is loaded."""
    try:
        data = yaml.safe_load(files.locate(BUNDLED_SUITES.get(name, name)).read_text(encoding="utf-8"))
        sets = data["questions"].values()
        return [str(source["path"]) for source in sets], ""
    except (UserError, OSError, yaml.YAMLError, AttributeError, KeyError, TypeError) as error:
        return [], f"suite {name}: it cannot be read: {error}"


def _offline() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "").casefold() in {"1", "true", "yes", "on"}


def _cached(name: str, kind: str, file: str) -> bool:
    from huggingface_hub import try_to_load_from_cache

    try:
        return isinstance(try_to_load_from_cache(name, file, repo_type=kind), str)
    except ValueError:  # no name of the hub's form
        return False

"""What a target needs that the package does not bring: models, corpora, questions, an embedder. One list of what is
missing, and how to bring it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import yaml

from robust_unlearning import files
from robust_unlearning.conversion import BUNDLED_MODELS
from robust_unlearning.corpora import HUB
from robust_unlearning.errors import UserError
from robust_unlearning.evaluate import BUNDLED_SUITES
from robust_unlearning.recipe import Recipe
from robust_unlearning.reproduce.target import Stage, Target, points_of


def missing(target: Target, stages: Mapping[str, Stage]) -> list[str]:
    """A sentence for each thing that is not here; empty where all stages can begin. Nothing is loaded or fetched."""
    recipes = {point.recipe.content_hash(): point.recipe for each in stages.values() for point in points_of(target, each)}
    found: list[str] = []
    for model in dict.fromkeys(each.model for each in recipes.values()):
        if why := _model(model):
            found.append(why)
    for key, path in dict.fromkeys(pair for each in recipes.values() for pair in _texts(each)):
        if why := _path(path):
            found.append(f"{key}: {why} Name where it lies with set.{key}=PATH.")
    for name in filter(None, (target.suite, target.validation)):
        found += _suite(name)
    for stage in stages.values():
        for corpus in stage.corpora:
            if why := _path(corpus):
                found.append(f"stages of kind ngrams, corpora: {why}")
    return list(dict.fromkeys(found))


def _model(name: str) -> str:
    if name in BUNDLED_MODELS or name == "tiny" or Path(name).expanduser().exists():
        return ""
    if _cached(name, "model", "config.json") or not _offline():
        return ""
    return f"model {name}: not in the hub's cache, and HF_HUB_OFFLINE forbids to fetch it. Or name a folder: set.model=DIR."


def _texts(recipe: Recipe) -> Iterable[tuple[str, str]]:
    for name, topic in recipe.topics.items():
        for side in ("forget", "retain"):
            own, common = getattr(topic, side), getattr(recipe, side, None)
            if own is not None:
                yield f"topics.{name}.{side}.path", own.path
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


def _suite(name: str) -> list[str]:
    """The files that a suite names and that are not here; the suite itself is checked when it is loaded."""
    try:
        path = files.locate(BUNDLED_SUITES.get(name, name))
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (UserError, OSError, yaml.YAMLError) as error:
        return [f"suite {name}: {error}"]
    sets = data.get("questions") if isinstance(data, dict) else None
    found = []
    for key, each in (sets or {}).items():
        if why := _path(str(each.get("path"))):
            found.append(f"questions {key} of the suite {name}: {why}")
    return found


def _offline() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "").casefold() in {"1", "true", "yes", "on"}


def _cached(name: str, kind: str, file: str) -> bool:
    from huggingface_hub import try_to_load_from_cache

    try:
        return isinstance(try_to_load_from_cache(name, file, repo_type=kind), str)
    except ValueError:  # no name of the hub's form
        return False

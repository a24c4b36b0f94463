"""Remove knowledge from a causal language model and keep the model usable afterwards.

>>> from robust_unlearning import RandomNoiseAugmentation, load_recipe, unlearn   # doctest: +SKIP
>>> unlearn(load_recipe("smollm2/rmu", ["noise_std=0.5"]), "runs/rmu-rna")        # doctest: +SKIP
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

from robust_unlearning import files

__version__ = "0.1.0"

_HOMES = {
    "FastLM": "evaluate.fast_lm",
    "RandomNoiseAugmentation": "methods.noise",
    "Recipe": "recipe",
    "UserError": "errors",
    "load_recipe": "recipe",
    "unlearn": "train.trainer",
}

__all__ = ["FastLM", "RandomNoiseAugmentation", "Recipe", "UserError", "load_recipe", "unlearn"]


def __getattr__(name: str) -> Any:
    """Import a public name when first used, so that `unlearn --help` need not wait for torch."""
    if name in _HOMES:
        return getattr(import_module(f"robust_unlearning.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _planted_world() -> Path:
    from robust_unlearning.planted.export import built_world

    return built_world()


files.BUILT["planted:"] = _planted_world

"""Whether a run fits into some memory, and which changes of the recipe would make it fit."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from robust_unlearning.errors import UserError
from robust_unlearning.plan.plan import Plan, make_plan
from robust_unlearning.recipe import Recipe

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


def parse_bytes(text: str) -> int:
    """Bytes from `80GiB`, `24GB`, `512MiB` or a plain number.

    Raises:
        UserError: it is written otherwise.
    """
    found = re.fullmatch(r"\s*([0-9.]+)\s*([kmgt]i?|)b?\s*", text.lower())
    try:
        size = int(float(found[1]) * _UNITS[found[2]]) if found else 0
    except ValueError:
        size = 0
    if size < 1:
        raise UserError(f"memory {text!r}: write a number and a unit, for example 80GiB, 24GB or 512MiB.")
    return size


@dataclass(frozen=True)
class Change:
    """A change of the recipe, as one would type it, and what the run would then take.

    Attributes:
        text: what to add to the command.
        peak: bytes on the device.
    """

    text: str
    peak: int


def changes(recipe: Recipe, plan: Plan, *, config: Path | None = None) -> list[Change]:
    """Changes that may make a run smaller, one by one, then all that keep its method together; each planned anew."""
    single = dict(_single(recipe, plan))
    keeping = [text for text in single if not text.startswith("method")]
    together = {key: value for text in keeping for key, value in single[text].items()}
    every = dict(single)
    if len(keeping) > 1:
        every[" ".join(keeping)] = together
    found = []
    for text, values in every.items():
        points = values.pop("points", plan.points)
        changed = recipe.model_copy(update=values)
        found.append(Change(text, make_plan(changed, config=config, points=points, floor=plan.floor).peak))
    return found


def _single(recipe: Recipe, plan: Plan) -> Iterator[tuple[str, dict[str, Any]]]:
    if plan.points > 1:
        yield "--points 1", {"points": 1}
    if "tensors as stored" in plan.memory["loading"]:
        yield "dtype=auto", {"dtype": "auto"}
    elif plan.dtype == "float32":
        yield "dtype=bfloat16", {"dtype": "bfloat16"}
    if recipe.needs_tail and not recipe.recompute_tail:
        yield "recompute_tail=true", {"recompute_tail": True}
    if recipe.batch_size > 1:
        yield "batch_size=1", {"batch_size": 1}
    if recipe.max_tokens >= 64 and all(topic.max_tokens is None for topic in recipe.topics.values()):
        yield f"max_tokens={recipe.max_tokens // 2}", {"max_tokens": recipe.max_tokens // 2}
    if len(recipe.band_layers) > 1:
        highest = max(recipe.band_layers)
        yield f"train_layers=[{highest}]", {"train_layers": (highest,)}
    if recipe.needs_tail:
        text = "method=rmu retain_loss=hidden_mse steering_scale=…"
        values = {"method": "rmu", "retain_loss": "hidden_mse", "steering_scale": 1.0, "noise_layers": None}
        yield text, values

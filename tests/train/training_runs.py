"""Short runs for the tests of training, and what they are compared by."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from robust_unlearning import load_recipe, unlearn
from robust_unlearning.run.delta import load_delta
from robust_unlearning.run.folder import RunFolder
from robust_unlearning.train.candidate import Candidate
from robust_unlearning.train.trainer import Trainer

STEPWISE = ["log_every=1", "checkpoint_every=3"]
Report = Callable[[Candidate, dict[str, Any]], None]


def two_topics(recipe: dict[str, Any], texts: dict[str, Path]) -> dict[str, Any]:
    return {**recipe, "topics": {**recipe["topics"], "potions": {"forget": str(texts["second"])}}}


def run_recipe(
    recipe: dict[str, Any], out: Path, *overrides: str, report: Report | None = None, resume: bool = False
) -> RunFolder:
    return unlearn(load_recipe(recipe, [*STEPWISE, *overrides]), out, report=report, resume=resume)


def tensors_of(run: RunFolder) -> dict[str, Tensor]:
    return load_delta(run.path).tensors


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def rows_of(run: RunFolder) -> list[dict[str, Any]]:
    """The metrics without what a clock decides."""
    timed = {"seconds", "tokens_per_second"}
    return [{key: value for key, value in row.items() if key not in timed} for row in run.rows()]


def trainer_of(recipe: dict[str, Any], out: Path, *overrides: str) -> Trainer:
    return Trainer([RunFolder.open(out, load_recipe(recipe, [*STEPWISE, *overrides]))])


def stop_at(step: int) -> Report:
    def report(_candidate: Candidate, row: dict[str, Any]) -> None:
        if row["step"] == step:
            raise KeyboardInterrupt

    return report

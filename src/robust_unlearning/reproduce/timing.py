"""What RNA costs in time ("RNA costs no time", Section 5): runs alone, without it (A) and with it (B), in turns.

`seconds` of runs that were trained side by side are shares of a common bill (`train.ledger`), so nothing is judged by
them. Here each run has its trunk, batches and reference to itself. Model and texts are read, and reference
log-probabilities scored, before any clock is read; then both runs take a few steps, which are thrown away, and after
that turns of as many steps in the order A B B A A B B A …, each run going on where it stopped. Two neighbouring turns
are a pair, over the same batches. In every other pair the run with RNA comes first, so what the first of a pair pays
more, and what drifts steadily, such as a processor that grows warm, cancels out.

How long a draw takes does not depend on the noise's scale, so the scale of a stage that ran before one was chosen is
as good as any.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from robust_unlearning.analyze.output import Report
from robust_unlearning.errors import UserError
from robust_unlearning.experiments.runner import Say
from robust_unlearning.models import checkpoint
from robust_unlearning.recipe import Recipe, load_recipe
from robust_unlearning.report.tables import Column, Table
from robust_unlearning.reproduce.analyses import as_data
from robust_unlearning.reproduce.target import Stage, Target, main_name, points_of
from robust_unlearning.run.folder import RunFolder
from robust_unlearning.stats.format import NATS, NumberForm
from robust_unlearning.stats.ratios import mean_excess
from robust_unlearning.train.ledger import Clock, wait_for
from robust_unlearning.train.trainer import Trainer

Turn = Callable[[], float]
"""Takes a run's next steps; returns their seconds."""
SECONDS = NumberForm(".3f")


@dataclass(frozen=True)
class Pair:
    """Two neighbouring turns.

    Attributes:
        plain, rna: seconds of training without and with RNA.
        plain_first: whether the turn without came first.
    """

    plain: float
    rna: float
    plain_first: bool

    @property
    def log_ratio(self) -> float:
        """log of the seconds with RNA over those without."""
        return math.log(self.rna / self.plain)


def timed_pairs(plain: Turn, rna: Turn, count: int) -> list[Pair]:
    """`count` pairs in the order A B B A A B B A …, after one turn of each that is thrown away."""
    plain(), rna()
    pairs = []
    for number in range(count):
        first, second = (plain, rna) if number % 2 == 0 else (rna, plain)
        seconds = {first: first(), second: second()}
        pairs.append(Pair(seconds[plain], seconds[rna], first is plain))
    return pairs


def steps_of(stage: Stage) -> int:
    """Steps that the stage takes with each recipe, without and with RNA together."""
    return 2 * (stage.pairs + 1) * stage.steps


def measure(target: Target, stage: Stage, chosen: Mapping[str, float], folder: Path, say: Say) -> dict[str, Any]:
    """Time the stage's recipes and write the tables into `folder`/analysis; returns its numbers.

    Args:
        chosen: recipe -> scale of the noise; the smallest of the main stage where none was chosen.

    Raises:
        UserError: the main stage does not train a recipe without and with RNA, or a loss was not finite.
    """
    ratios: list[dict[str, Any]] = []
    single: list[dict[str, Any]] = []
    clock_says = ""
    for name in stage.recipes:
        plain, rna = _without_and_with(target, name, chosen)
        say(f"  timing {rna.title}, {stage.pairs} pairs of {stage.steps} steps")
        pairs, clock_says = _timed(plain, rna, stage)
        of = {"title": rna.title, "noise": rna.rna_std}
        ratios.append({**of, "pairs": len(pairs), "excess": mean_excess([pair.log_ratio for pair in pairs])})
        single += [
            {
                **of,
                "pair": number,
                "first": "without" if pair.plain_first else "with RNA",
                "plain": pair.plain,
                "rna": pair.rna,
                "log_ratio": pair.log_ratio,
            }
            for number, pair in enumerate(pairs, start=1)
        ]
    notes = [
        f"Runs alone, in the order A B B A …, {stage.steps} steps a turn, a first turn of each thrown away; training "
        "alone is timed, no reading of model and texts, no writing of files. The interval is Student's over the pairs' "
        f"log ratios. {clock_says}"
    ]
    heads: dict[str, str | Column] = {
        "title": "method", "noise": "noise", "pairs": "pairs",
        "excess": Column("time with RNA over that without, less 1", NATS),
    }  # fmt: skip
    summary = Table("Time with RNA over that without", heads, ratios, key="ratios")
    columns: dict[str, str | Column] = {
        "title": "method", "noise": "noise", "pair": "pair", "first": "first", "plain": Column("without, s", SECONDS),
        "rna": Column("with RNA, s", SECONDS), "log_ratio": Column("log ratio", NumberForm("+.4f")),
    }  # fmt: skip
    each = Table("Every pair", columns, single, key="pairs")
    about = {"pairs": stage.pairs, "steps": stage.steps, "clock": clock_says}
    return as_data(Report("time", "What RNA costs in time", about, notes, [summary, each]), folder)


def _without_and_with(target: Target, name: str, chosen: Mapping[str, float]) -> tuple[Recipe, Recipe]:
    """A recipe as the main stage trains it with its first seed, without RNA and with it."""
    main = main_name(target)
    recipes = [point.recipe for point in points_of(target, target.stages[main]) if point.source == name]
    plain = next((recipe for recipe in recipes if not recipe.rna_std), None)
    noised = [recipe for recipe in recipes if recipe.rna_std and plain and recipe.seed == plain.seed]
    if plain is None or not noised:
        raise UserError(f"the main stage, {main!r}, does not train {name} both without noise and with it.")
    noise = chosen.get(name, min(recipe.rna_std for recipe in noised))
    return plain, next(recipe for recipe in noised if recipe.rna_std == noise)


def _timed(plain: Recipe, rna: Recipe, stage: Stage) -> tuple[list[Pair], str]:
    """The pairs of two recipes, and the sentence that says which clock was read."""
    with tempfile.TemporaryDirectory() as folder:
        alone = [Alone(recipe, Path(folder) / side, stage) for side, recipe in (("plain", plain), ("rna", rna))]
        return timed_pairs(alone[0], alone[1], stage.pairs), alone[0].clock_says


class Alone:
    """A run by itself, its model and texts in memory; a call takes its next steps and returns their seconds."""

    def __init__(self, recipe: Recipe, path: Path, stage: Stage) -> None:
        total = steps_of(stage) // 2
        kept = {"snapshots": [], "log_every": total, "checkpoint_every": total + 1}  # nothing is written between turns
        run = RunFolder.open(path, load_recipe({**recipe.model_dump(mode="json"), "steps": total, **kept}))
        self.steps = stage.steps
        clock, self.clock_says = clock_of(checkpoint.pick_device(recipe.device))
        self.trainer = Trainer([run], clock=clock)
        self.trainer.prepare_references(total)

    def __call__(self) -> float:
        """Take the next steps.

        Raises:
            UserError: a loss was not finite.
        """
        (candidate,) = self.trainer.candidates
        before = candidate.seconds
        for step in range(candidate.step, candidate.step + self.steps):
            if failed := self.trainer.advance(step, [candidate]):
                raise UserError(failed[candidate])
        return candidate.seconds - before


def clock_of(device: torch.device) -> tuple[Clock, str]:
    """The clock to time a device by, and the sentence that says which it is.

    On a CPU the processor time of this process, in all its threads, which what runs beside it disturbs least; elsewhere
    the wall's, read when the device has done what it was given.
    """
    if device.type == "cpu":
        return time.process_time, "Seconds are processor time of the process (CPU, time.process_time)."

    def settled() -> float:
        wait_for(device)
        return time.perf_counter()

    return settled, f"Seconds are the wall's, the device waited for ({device.type}, time.perf_counter)."

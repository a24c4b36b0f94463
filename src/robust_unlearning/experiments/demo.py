"""`unlearn demo`: base against RMU against RMU with RNA on a small real model, compared at like forgetting.

Noise that has merely stopped the forgetting looks like a cure and is not. So RMU is also stopped early, at
`SNAPSHOTS`, which traces what robustness each degree of forgetting costs without noise; RNA's models are set
against the point of that line where RMU has forgotten as much. And because noise also slows the forgetting, RMU
with a heavier retain weight, `SLOWER`, is trained as a control: slow without noise.

Every model is a run folder or a snapshot in the demo's folder, and every evaluation is kept, so a demo that was
stopped continues where it was.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from robust_unlearning import files
from robust_unlearning.errors import UserError
from robust_unlearning.evaluate.suite import Suite, load_suite
from robust_unlearning.experiments.demo_summary import DemoAnswers, Level, report
from robust_unlearning.experiments.grid import Point, override_words, point_of
from robust_unlearning.experiments.runner import Runner
from robust_unlearning.models.checkpoint import pick_device, quick_dtype
from robust_unlearning.recipe import Recipe, load_recipe

RECIPE = "smollm2/rmu"
NOISE_LEVELS = (1.0, 3.0)
NOISE_SEEDS = (0, 1, 2)
SNAPSHOTS = (30, 45, 60)
SLOWER = 300
"""Retain weight of the control, against 100 of the others."""
OWN_FIELDS = {
    "noise_std",
    "noise_variance",
    "noise_seed",
    "retain_weight",
    "snapshots",
    "topics.astronomy.retain_weight",
}
"""What makes the demo's models differ, so no override may set it."""


def points_of(overrides: Sequence[str]) -> list[Point]:
    """The demo's runs: RMU with its snapshots, the slower control, RNA at each noise level and seed of the noise.

    Raises:
        UserError: an override of what makes the demo's models differ.
    """
    taken = {text.partition("=")[0].strip() for text in overrides} & OWN_FIELDS
    if taken:
        raise UserError(f"the demo sets {', '.join(sorted(taken))} itself; use `unlearn run {RECIPE}` to choose.")
    steps = load_recipe(RECIPE, overrides).steps
    snapshots = [step for step in SNAPSHOTS if step < steps]
    settings: dict[str, dict[str, Any]] = {"rmu": {"snapshots": snapshots}, "rmu-slower": {"retain_weight": SLOWER}}
    for std in NOISE_LEVELS:
        settings |= {_rna(std, seed): {"noise_std": std, "noise_seed": seed} for seed in NOISE_SEEDS}
    common = [f"dtype={quick_dtype(pick_device('auto'))}", *overrides]
    return [
        point_of(RECIPE, fields, [*common, *override_words(fields)], name, fields.get("snapshots", ()))
        for name, fields in settings.items()
    ]


def _rna(std: float, seed: int) -> str:
    return f"rna-{std:g}-seed{seed}"


def run_demo(out: Path, overrides: Sequence[str] = ()) -> None:
    """Train, evaluate, print the table, and write `demo.md`, `demo.json` and the figure into `out`.

    Args:
        out: the demo's folder; one that was begun before, with the same overrides, is continued.
        overrides: `field=value` changes to the recipe of every run.

    Raises:
        UserError: the folder holds a demo with other settings, or a run failed.
    """
    suite = load_suite("demo")
    points = points_of(overrides)
    runner = Runner(points, {"suite": suite}, out, DemoAnswers.of, one_base=True, strict=True).run()
    recipe = points[0].recipe
    last = recipe.steps

    def answers(name: str, run: str, step: int = last) -> DemoAnswers:
        return replace(runner.models[run, step]["suite"], name=name)

    line = [(step, answers(f"RMU, step {step}", "rmu", step)) for step in (*points[0].earlier, last)]
    slower = answers(f"RMU, retain weight {SLOWER:g}", "rmu-slower")
    levels = [
        Level(std, [answers(f"RNA {std:g}, seed {seed}", _rna(std, seed)) for seed in NOISE_SEEDS])
        for std in NOISE_LEVELS
    ]
    text = report(replace(runner.base["suite"], name="base"), line, slower, levels, out, _about(suite, recipe))
    print(f"\n{text}\n\nwritten: {out / 'demo.md'}, .json, .png, .svg, .csv; runs in {out / 'runs'}")


def _about(suite: Suite, recipe: Recipe) -> str:
    general, forget = suite.questions["general"], suite.questions["astronomy"]
    held_out = files.locate(suite.texts["forget"].path).read_text(encoding="utf-8").splitlines()
    return (
        f"{recipe.model}, {recipe.title} at layer {recipe.layer}, {recipe.steps} steps of {recipe.batch_size} × "
        f"{recipe.max_tokens} tokens, {recipe.dtype}; general questions {general.path}, forget questions {forget.path} "
        f"(answer texts scored); {len(held_out)} held-out passages of forget text"
    )

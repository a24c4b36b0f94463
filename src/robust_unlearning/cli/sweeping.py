"""Many runs at once: sweep."""

from __future__ import annotations

import argparse
import hashlib
from pathlib import Path

from robust_unlearning.cli import AddVerb, overrides, positive, task_options, task_settings


def add(verb: AddVerb) -> None:
    """Register the verbs."""
    sweep = verb("sweep", _sweep, "train a grid of recipes side by side, score all over one base, choose one")
    sweep.add_argument("sweep", help="a recipe, several with commas, a shipped sweep, or a sweep's YAML file")
    overrides(sweep, "values of a field: noise_std=0,0.01,0.02  noise_std=0:0.1:0.01  noise_layers=[1],[2],[0,1,2]")
    sweep.add_argument("--out", type=Path, help="folder (default: sweeps/NAME-HASH); a sweep that was begun continues")
    sweep.add_argument("--tasks", help="what is reported: a suite (demo, planted, a YAML file) or tasks of lm-eval")
    sweep.add_argument("--validation", help="what the choice is made on, named like --tasks (planted has its own)")
    sweep.add_argument("--select", help="rule of the choice: 'max perturbed where forget<=0.3 and retain>=0.95*base'")
    for role, what in (
        ("forget", "should go"),
        ("retain", "should stay"),
        ("perturbed", "should survive a forget-token"),
    ):
        sweep.add_argument(
            f"--{role}",
            type=lambda text: tuple(text.split(",")),
            metavar="TASKS",
            help=f"tasks of what {what}, patterns with commas (default: by their names)",
        )
    task_options(sweep)
    sweep.add_argument("--at-once", type=positive, metavar="N", help="points side by side (default: as memory allows)")


def _sweep(arguments: argparse.Namespace) -> None:
    from robust_unlearning.experiments.grid import expand, load_sweep

    options = {
        key: getattr(arguments, key) for key in ("tasks", "validation", "select", "forget", "retain", "perturbed")
    }
    sweep = load_sweep(arguments.sweep, arguments.overrides, **options)
    points = expand(sweep)
    hashes = "".join(sorted(point.recipe.content_hash() for point in points))
    stem = "-".join(Path(each).stem for each in arguments.sweep.split(",")[:3])
    out = arguments.out or Path("sweeps") / f"{stem}-{hashlib.sha256(hashes.encode()).hexdigest()[:8]}"

    from robust_unlearning.experiments.sweep import run_sweep, summarise

    print(f"{len(points)} points -> {out}", flush=True)
    result = run_sweep(sweep, points, out, arguments.at_once, settings=task_settings(arguments))
    print(f"\n{summarise(result)}\n\nwritten: {out / 'sweep.json'}, {out / 'sweep.md'}; runs in {out / 'runs'}")

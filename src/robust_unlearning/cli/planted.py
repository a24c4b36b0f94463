"""The planted-knowledge benchmark: planted make, train, study."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from robust_unlearning.cli import AddVerb, overrides


def add(verb: AddVerb) -> None:
    """Register the verbs."""
    planted = verb("planted", _planted_make, "the planted-knowledge benchmark: write its world, teach it to a model")
    inner = planted.add_subparsers(title="what to do", required=True, metavar="WHAT")
    make = inner.add_parser("make", help="write a world of invented facts: texts, questions, suites")
    make.set_defaults(function=_planted_make)
    make.add_argument("--to", required=True, help="new folder")
    overrides(make, "change a size of the world: seed=1 entities=24")
    teaching = inner.add_parser("train", help="teach the world to a model; a stopped training is continued")
    teaching.set_defaults(function=_planted_train)
    teaching.add_argument("plan", help="tiny (made from nothing) or smollm2 (through a LoRA adapter)")
    teaching.add_argument("--out", type=Path, help="folder of the model and its log (default: planted/PLAN)")
    overrides(teaching, "change a field of the plan: steps=8000 world.seed=1")

    study = inner.add_parser("study", help="methods × noise × retain weight × seeds, compared at like forgetting")
    study.set_defaults(function=_planted_study)
    study.add_argument("study", help="tiny, tiny-preference, smollm2, or a YAML file")
    study.add_argument("--out", type=Path, help="folder of the study (default: studies/STUDY; continued if there)")
    overrides(study, "change a field of the study: seeds=[0] noise_std=[1]")


def _planted_make(arguments: argparse.Namespace) -> None:
    from robust_unlearning.planted.export import MANIFEST, export
    from robust_unlearning.planted.world import make_world, world_size

    world = make_world(world_size(arguments.overrides))
    folder = export(world, Path(arguments.to))
    facts = sum(len(each.values) for each in world.entities)
    print(f"{len(world.entities)} entities in {len(world.domains)} domains, {facts} facts: {folder / MANIFEST}")
    print(f"next: unlearn eval MODEL --tasks {folder / 'suite.yaml'} --out DIR")


def _planted_train(arguments: argparse.Namespace) -> None:
    from robust_unlearning.planted.teaching_plan import load_teaching_plan

    plan = load_teaching_plan(arguments.plan, arguments.overrides)

    from robust_unlearning.planted.teach import teach

    out = arguments.out or Path("planted") / arguments.plan

    def report(row: dict[str, Any]) -> None:
        scores = ", ".join(f"{key} {value:.0%}" for key, value in row.items() if "/" in key)
        minutes = row["seconds"] / 60
        print(f"step {row['step']}  loss {row['loss']:.3f}  {scores} (n=64 each)  {minutes:.0f} min", flush=True)

    length = f"{plan.steps} steps" + (f" after a start of at most {plan.start.steps}" if plan.start else "")
    print(f"teaching the planted world to {plan.base or 'a new model'}, {length} -> {out}")
    record = teach(plan, out, report)
    for name, row in record["exam"].items():
        print(f"{name:<14} {row['acc']:.1%} [{row['low']:.1%}, {row['high']:.1%}] (n={row['n']})")


def _planted_study(arguments: argparse.Namespace) -> None:
    from robust_unlearning.experiments.study import load_study, run_study, summarise

    study = load_study(arguments.study, arguments.overrides)
    out = arguments.out or Path("studies") / Path(arguments.study).stem
    print(summarise(run_study(study, out), out))
    print(f"\nwritten: {out / 'study.md'}, .json, .png, .svg, .csv; runs in {out / 'runs'}")

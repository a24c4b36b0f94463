"""Recipes to run folders to models: list, show, run, apply, demo."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from robust_unlearning.cli import AddVerb, in_processes, overrides, processes_option

if TYPE_CHECKING:
    from robust_unlearning.recipe import Recipe


def add(verb: AddVerb) -> None:
    """Register the verbs."""
    listing = verb("list", _list, "list recipes, sweeps, methods, bundled models, and tasks to evaluate on")
    listing.add_argument("what", nargs="?", choices=["recipes", "sweeps", "methods", "models", "tasks"])

    show = verb("show", _show, "print a whole recipe, defaults filled in")
    show.add_argument("recipe", help="a shipped recipe or a YAML file")
    overrides(show)

    run = verb("run", _run, "unlearn: train by a recipe and write a run folder")
    run.add_argument("recipe", help="a shipped recipe or a YAML file")
    overrides(run)
    run.add_argument("--out", type=Path, help="run folder (default: runs/RECIPE-HASH)")
    run.add_argument("--resume", action="store_true", help="continue an unfinished run in that folder")
    processes_option(run)
    run.add_argument(
        "--shard", action="store_true", help="divide the frozen layers among the processes (models that no card holds)"
    )

    joining = verb("apply", _apply, "join a run's delta to its base: a model folder that anything opens")
    joining.add_argument("run", help="run folder or delta file")
    joining.add_argument("--to", required=True, help="new folder for the whole model")
    joining.add_argument("--base", help="where the base lies now (default: the recipe's model)")

    demo = verb("demo", _demo, "base against RMU against RMU with RNA on a small real model, with a table and a plot")
    demo.add_argument("--out", default="demo-run", help="folder of the demo (continued if it is there)")
    overrides(demo)


def _list(arguments: argparse.Namespace) -> None:
    from robust_unlearning.evaluate.suite import BUNDLED_SUITES
    from robust_unlearning.evaluate.task_index import shipped_groups
    from robust_unlearning.experiments.grid import sweep_names, sweep_summary
    from robust_unlearning.methods.table import METHODS
    from robust_unlearning.models.convert import BUNDLED_MODELS
    from robust_unlearning.recipe import recipe_names, recipe_summary

    sections: dict[str, Callable[[], dict[str, str]]] = {
        "recipes": lambda: {name: recipe_summary(name) for name in recipe_names()},
        "sweeps": lambda: {name: sweep_summary(name) for name in sweep_names()},
        "methods": lambda: {name: f"{each.summary} ({each.paper})" for name, each in METHODS.items()},
        "models": lambda: {name: each.about for name, each in BUNDLED_MODELS.items()},
        "tasks": lambda: {
            **dict.fromkeys(BUNDLED_SUITES, "a suite of this package"),
            **shipped_groups(),
            "mmlu, arc_easy, …": "every task of lm-evaluation-harness by its name: lm-eval ls tasks",
        },
    }
    for kind in [arguments.what] if arguments.what else list(sections):
        rows = sections[kind]()
        width = max(map(len, rows))
        print(f"{kind}:")
        for name, text in rows.items():
            print(f"  {name:<{width}}  {text}")


def _show(arguments: argparse.Namespace) -> None:
    from robust_unlearning.recipe import load_recipe

    recipe = load_recipe(arguments.recipe, arguments.overrides)
    print(f"# {arguments.recipe}, content hash {recipe.content_hash()}\n{recipe.as_yaml()}", end="")


def _run(arguments: argparse.Namespace) -> None:
    from robust_unlearning.parallel.launch import check_batch
    from robust_unlearning.recipe import load_recipe

    recipe = load_recipe(arguments.recipe, arguments.overrides)
    name = Path(arguments.recipe).stem
    out = arguments.out or Path("runs") / f"{name}-{recipe.content_hash()[:8]}"
    check_batch(recipe.batch_size, arguments.processes)
    if in_processes(arguments):
        return

    from robust_unlearning import files
    from robust_unlearning.run.folder import RECORD
    from robust_unlearning.train.progress import TrainingProgress
    from robust_unlearning.train.trainer import unlearn

    before = files.read_json(out / RECORD) if (out / RECORD).exists() else {}
    print(f"{recipe.title} on {recipe.model}, noise_std {recipe.rna_std:g}, {recipe.steps} steps -> {out}")
    with TrainingProgress(recipe.steps) as progress:
        run = unlearn(recipe, out, resume=arguments.resume, report=progress.row, shard=arguments.shard)
    record = run.record
    if before.get("status") == "finished":
        print("it was finished already, and nothing was done; to train it anew, give another --out")
    shapes = ", ".join(record["trained_tensors"])
    print(f"trained {record['trained_parameters']:,} parameters: {shapes}")
    print(
        f"{record['status']} after {record['steps']} steps, {record['seconds']['train']:.0f} s, "
        f"{record['tokens_per_second']:.0f} tokens/s, peak memory "
        f"{max(record['peak_memory'].values()) / 2**30:.2f} GiB"
    )
    print(f"next: unlearn eval {out} --tasks {_fitting_suite(recipe)}")


def _fitting_suite(recipe: Recipe) -> str:
    """The bundled suite that asks for what a recipe forgets, if it forgets bundled texts."""
    sources = {topic.forget.path.partition(":")[0] for topic in recipe.topics.values()}
    return sources.pop() if len(sources) == 1 and sources < {"planted", "demo"} else "SUITE.yaml"


def _apply(arguments: argparse.Namespace) -> None:
    from robust_unlearning.models import checkpoint
    from robust_unlearning.recipe import Recipe
    from robust_unlearning.run import delta as deltas
    from robust_unlearning.run.folder import RECIPE, open_run

    delta = deltas.load_delta(arguments.run)
    recipe = Recipe.model_validate(delta.provenance["recipe"])
    base = checkpoint.resolve(arguments.base or recipe.model, **recipe.model_options)
    card = open_run(arguments.run).card() if (Path(arguments.run) / RECIPE).exists() else ""
    rewritten = deltas.apply(delta, base, Path(arguments.to), card)
    shards = len(set(base.weight_map.values()))
    print(
        f"{arguments.to}: {len(delta.tensors)} of {len(base.weight_map)} tensors changed, {len(rewritten)} of {shards} "
        f"weight files rewritten ({', '.join(rewritten)}), the others linked or copied"
    )
    print(f'next: AutoModelForCausalLM.from_pretrained("{arguments.to}")')


def _demo(arguments: argparse.Namespace) -> None:
    from robust_unlearning.experiments.demo import run_demo

    run_demo(Path(arguments.out), arguments.overrides)

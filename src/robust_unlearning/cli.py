"""The `unlearn` command: verbs and their options. Nothing heavy is imported before a verb needs it."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from robust_unlearning.errors import UserError

EPILOG = """examples:
  unlearn demo                                   see the effect on a small real model
  unlearn list                                   recipes, methods and bundled models
  unlearn show smollm2/rmu noise_std=1           the whole recipe, with your changes
  unlearn run smollm2/rmu noise_std=1 --out runs/rna
  unlearn eval runs/rna --tasks demo
  unlearn apply runs/rna --to models/unlearned   a folder that from_pretrained opens
"""


def _list(arguments: argparse.Namespace) -> None:
    from robust_unlearning.conversion import BUNDLED_MODELS
    from robust_unlearning.methods import METHODS
    from robust_unlearning.recipe import recipe_names, recipe_summary

    sections: dict[str, Callable[[], dict[str, str]]] = {
        "recipes": lambda: {name: recipe_summary(name) for name in recipe_names()},
        "methods": lambda: {name: f"{each.summary} ({each.paper})" for name, each in METHODS.items()},
        "models": lambda: {name: each.about for name, each in BUNDLED_MODELS.items()},
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
    from robust_unlearning.recipe import load_recipe

    recipe = load_recipe(arguments.recipe, arguments.overrides)
    name = Path(arguments.recipe).stem
    out = arguments.out or Path("runs") / f"{name}-{recipe.content_hash()[:8]}"

    from robust_unlearning.progress import TrainingProgress
    from robust_unlearning.train import unlearn

    print(f"{recipe.title} on {recipe.model}, noise_std {recipe.noise_scale:g}, {recipe.steps} steps -> {out}")
    with TrainingProgress(recipe.steps) as progress:
        run = unlearn(recipe, out, resume=arguments.resume, report=progress.row)
    record = run.record
    shapes = ", ".join(record["trained_tensors"])
    print(f"trained {record['trained_parameters']:,} parameters: {shapes}")
    print(
        f"{record['status']} after {record['steps']} steps, {record['seconds']['train']:.0f} s, "
        f"{record['tokens_per_second']:.0f} tokens/s, peak memory "
        f"{max(record['peak_memory'].values()) / 2**30:.2f} GiB\nnext: unlearn eval {out} --tasks SUITE.yaml"
    )


def _eval(arguments: argparse.Namespace) -> None:
    from robust_unlearning.evaluate import format_scores, load_suite
    from robust_unlearning.progress import EvaluationProgress
    from robust_unlearning.targets import Evaluator, open_target

    suites = {name: load_suite(name) for name in arguments.tasks.split(",")}
    target = open_target(
        arguments.target, allow_pickle=arguments.allow_pickle, trust_remote_code=arguments.trust_remote_code
    )
    out = arguments.out or target.folder
    if out is None:
        raise UserError(
            f"{arguments.target!r} is no run folder and no delta file; if it is a model, say where its scores go: "
            "--out DIR"
        )
    evaluator = Evaluator(arguments.dtype, arguments.device)
    folder = Path(out)
    for name, suite in suites.items():
        place = folder if len(suites) == 1 else folder / "scores" / Path(name).stem
        with EvaluationProgress() as progress:
            result = evaluator.evaluate(target, suite, place, progress.tick)
        print(format_scores(result.scores))
        print(f"written to {place / 'scores.json'}, one line a question in {place / 'records.jsonl'}")


def _apply(arguments: argparse.Namespace) -> None:
    from robust_unlearning import delta as deltas
    from robust_unlearning import models
    from robust_unlearning.recipe import Recipe
    from robust_unlearning.runs import RECIPE, model_card, open_run

    delta = deltas.load_delta(arguments.run)
    recipe = Recipe.model_validate(delta.provenance["recipe"])
    base = models.resolve(
        arguments.base or recipe.model,
        allow_pickle=recipe.allow_pickle,
        trust_remote_code=recipe.trust_remote_code,
    )
    card = model_card(open_run(arguments.run)) if (Path(arguments.run) / RECIPE).exists() else ""
    rewritten = deltas.apply(delta, base, Path(arguments.to), card)
    shards = len(set(base.weight_map.values()))
    print(
        f"{arguments.to}: {len(delta.tensors)} of {len(base.weight_map)} tensors changed, {len(rewritten)} of {shards} "
        f"weight files rewritten ({', '.join(rewritten)}), the others linked or copied"
    )
    print(f'next: AutoModelForCausalLM.from_pretrained("{arguments.to}")')


def _demo(arguments: argparse.Namespace) -> None:
    from robust_unlearning.demo.pipeline import run_demo

    run_demo(Path(arguments.out), arguments.overrides)


def _planted_make(arguments: argparse.Namespace) -> None:
    from robust_unlearning.planted.export import MANIFEST, export
    from robust_unlearning.planted.world import make_world, world_size

    world = make_world(world_size(arguments.overrides))
    folder = export(world, Path(arguments.to))
    facts = sum(len(each.values) for each in world.entities)
    print(f"{len(world.entities)} entities in {len(world.domains)} domains, {facts} facts: {folder / MANIFEST}")
    print(f"next: unlearn eval MODEL --tasks {folder / 'suite.yaml'} --out DIR")


def _planted_train(arguments: argparse.Namespace) -> None:
    from robust_unlearning.planted.plan import load_plan

    plan = load_plan(arguments.plan, arguments.overrides)

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
    from robust_unlearning.planted.study import load_study, run_study

    study = load_study(arguments.study, arguments.overrides)
    out = arguments.out or Path("studies") / Path(arguments.study).stem

    from robust_unlearning.planted.summary import summarise

    print(summarise(run_study(study, out), out))
    print(f"\nwritten: {out / 'study.md'}, {out / 'study.json'}, {out / 'study.png'}; runs in {out / 'runs'}")


def _parser() -> argparse.ArgumentParser:
    from robust_unlearning import __version__

    parser = argparse.ArgumentParser(
        prog="unlearn",
        description="Remove knowledge from a causal language model and keep the model usable afterwards.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"unlearn {__version__}")
    verbs = parser.add_subparsers(title="verbs", dest="verb", required=True, metavar="VERB")

    def verb(name: str, function: Callable[[argparse.Namespace], None], text: str) -> argparse.ArgumentParser:
        added = verbs.add_parser(name, help=text, description=text)
        added.set_defaults(function=function)
        return added

    def overrides(to: argparse.ArgumentParser, text: str = "change a field of the recipe") -> None:
        to.add_argument("overrides", nargs="*", metavar="field=value", help=text)

    listing = verb("list", _list, "list recipes, methods and bundled models")
    listing.add_argument("what", nargs="?", choices=["recipes", "methods", "models"])

    show = verb("show", _show, "print a whole recipe, defaults filled in")
    show.add_argument("recipe", help="a shipped recipe or a YAML file")
    overrides(show)

    run = verb("run", _run, "unlearn: train by a recipe and write a run folder")
    run.add_argument("recipe", help="a shipped recipe or a YAML file")
    overrides(run)
    run.add_argument("--out", type=Path, help="run folder (default: runs/RECIPE-HASH)")
    run.add_argument("--resume", action="store_true", help="continue an unfinished run in that folder")

    evaluation = verb("eval", _eval, "score a run folder, a delta file or a model")
    evaluation.add_argument("target", help="run folder, delta file, model folder, GGUF file, hub id or bundled model")
    evaluation.add_argument(
        "--tasks", required=True, help="'demo', 'planted' or a suite's YAML file; several with commas"
    )
    evaluation.add_argument("--out", help="folder for scores.json and records.jsonl (default: the run folder)")
    evaluation.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"])
    evaluation.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    evaluation.add_argument("--allow-pickle", action="store_true", help="load pickled weights (they can run code)")
    evaluation.add_argument("--trust-remote-code", action="store_true", help="run a model's own Python code")

    joining = verb("apply", _apply, "join a run's delta to its base: a model folder that anything opens")
    joining.add_argument("run", help="run folder or delta file")
    joining.add_argument("--to", required=True, help="new folder for the whole model")
    joining.add_argument("--base", help="where the base lies now (default: the recipe's model)")

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
    study.add_argument("study", help="tiny, or a YAML file")
    study.add_argument("--out", type=Path, help="folder of the study (default: studies/STUDY; continued if there)")
    overrides(study, "change a field of the study: seeds=[0] noise_std=[1]")

    demo = verb("demo", _demo, "base against RMU against RMU with RNA on a small real model, with a table and a plot")
    demo.add_argument("--out", default="demo-run", help="folder of the demo (continued if it is there)")
    overrides(demo)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; 0 when well, 2 for a user's error, 130 when interrupted."""
    parser = _parser()
    # intermixed, so that options may stand before, between and after field=value
    arguments = _parse(parser, sys.argv[1:] if argv is None else argv)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        arguments.function(arguments)
    except UserError as error:
        print(f"unlearn: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(
            "\nunlearn: stopped; run the same command again (with --resume for `run`) to continue",
            file=sys.stderr,
        )
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:  # a full disk, no permission, a file where a folder should be
        print(f"unlearn: {error}", file=sys.stderr)
        return 2
    return 0


def _parse(parser: argparse.ArgumentParser, argv: Sequence[str]) -> Any:
    """Parse, taking `field=value` words from anywhere after a verb that has them."""
    arguments, rest = parser.parse_known_args(argv)
    loose = [word for word in rest if "=" in word and not word.startswith("-")]
    if len(loose) < len(rest) or (loose and not hasattr(arguments, "overrides")):
        parser.error(f"unrecognized arguments: {' '.join(word for word in rest if word not in loose) or loose[0]}")
    if loose:
        arguments.overrides = [*arguments.overrides, *loose]
    return arguments


if __name__ == "__main__":
    sys.exit(main())

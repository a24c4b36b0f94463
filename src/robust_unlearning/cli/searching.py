"""Search beyond grids: search."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

from robust_unlearning.cli import AddVerb, overrides
from robust_unlearning.errors import UserError


def add(verb: AddVerb) -> None:
    """Register the verbs."""
    search = verb("search", _search, "let Optuna search a recipe's fields: fewest forget answers, retain kept")
    search.add_argument("recipe", help="a shipped recipe or a YAML file")
    overrides(search, "field=low..high, field=low..high:log, field=a,b,c; field=value is the same in all trials")
    search.add_argument("--tasks", required=True, help="the suite that decides, 'planted-validation' or a YAML file")
    search.add_argument("--trials", type=int, required=True, help="how many the study has in the end")
    search.add_argument("--out", type=Path, help="folder of the study and its runs (default: searches/RECIPE)")
    search.add_argument("--search", choices=["tpe", "random"], default="tpe", help="how values are proposed")
    search.add_argument("--seed", type=int, help="of the proposals; searches that run together need unlike ones")
    search.add_argument("--storage", help="database URL of the study (default: study.sqlite in --out)")
    search.add_argument("--forget", default="forget*", help="pattern of the tasks to forget")
    search.add_argument("--retain", help="patterns of the tasks to keep, with commas (default: all others)")
    search.add_argument("--may-lose", type=float, default=0.03, help="accuracy that each retain task may lose")
    search.add_argument(
        "--prune-at", help="steps, with commas, at which trials are compared early (default: a quarter and half); none"
    )
    search.add_argument("--subset", type=int, default=32, help="questions of each set that are asked then")


def _search(arguments: argparse.Namespace) -> None:
    try:
        import optuna  # noqa: F401
    except ImportError as error:
        raise UserError("unlearn search needs Optuna: pip install 'robust-unlearning[search]'") from error
    from robust_unlearning.experiments.ranges import parse_space
    from robust_unlearning.experiments.search import Aim, Search, describe, run_search, write_results
    from robust_unlearning.parallel.launch import world_size

    if world_size() > 1:
        raise UserError("unlearn search is not launched in several processes; start it several times instead.")
    for name in ("trials", "subset"):
        if getattr(arguments, name) < 1:
            raise UserError(f"--{name} {getattr(arguments, name)}: at least 1.")
    axes, fixed = parse_space(arguments.overrides)
    search = Search(
        recipe=arguments.recipe,
        axes=axes,
        fixed=fixed,
        suite=arguments.tasks,
        out=arguments.out or Path("searches") / Path(arguments.recipe).stem,
        aim=Aim(arguments.forget, tuple(filter(None, (arguments.retain or "").split(","))), arguments.may_lose),
        rungs=_steps(arguments.prune_at),
        subset=arguments.subset,
    )
    study = run_search(
        search, arguments.trials, sampler=arguments.search, seed=arguments.seed, storage=arguments.storage
    )
    best = write_results(
        search.out, study, {"recipe": search.recipe, "fixed": fixed, "suite": search.suite, "rule": asdict(search.aim)}
    )
    states = [trial.state.name.lower() for trial in study.get_trials(deepcopy=False)]
    counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    print(f"{len(states)} trials ({counts}): {search.out / 'search.json'}")
    if best is None:
        print(f"none keeps every retain task within {search.aim.may_lose:.1%} of the base; widen the space")
        return
    print(f"best is {describe(best)}")
    print(f"next: unlearn eval {search.out / 'runs' / best.user_attrs['run']} --tasks SUITE, one that chose nothing")


def _steps(text: str | None) -> tuple[int, ...] | None:
    if text is None or text == "none":
        return None if text is None else ()
    try:
        return tuple(sorted({int(each) for each in text.split(",")}))
    except ValueError as error:
        raise UserError(f"--prune-at {text}: steps with commas, like 50,100, or none.") from error

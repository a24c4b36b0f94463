"""What a run would cost: plan."""

from __future__ import annotations

import argparse
from pathlib import Path

from robust_unlearning.cli import AddVerb, overrides
from robust_unlearning.errors import UserError


def add(verb: AddVerb) -> None:
    """Register the verbs."""
    plan = verb("plan", _plan, "what a run would read, hold, compute and write, told before anything is loaded")
    plan.add_argument("recipe", help="a shipped recipe or a YAML file")
    overrides(plan)
    plan.add_argument("--config", type=Path, help="a config.json, or a folder with one, in place of the recipe's model")
    plan.add_argument("--points", type=int, default=1, help="candidates side by side over one trunk (default 1)")
    plan.add_argument("--flops", type=float, help="sustained FLOP/s, for seconds: 400e12")
    plan.add_argument("--bytes-per-second", type=float, default=1e9, help="of reading the weights (default 1e9)")
    plan.add_argument("--memory", help="say whether it fits, and what would make it fit: 80GiB, 24GB")
    plan.add_argument("--json", action="store_true", help="print JSON")


def _plan(arguments: argparse.Namespace) -> None:
    from robust_unlearning.recipe import load_recipe

    given = (arguments.points, arguments.bytes_per_second, 1 if arguments.flops is None else arguments.flops)
    if min(given) <= 0:
        raise UserError("--points, --flops and --bytes-per-second must be above 0.")
    recipe = load_recipe(arguments.recipe, arguments.overrides)

    import json

    from robust_unlearning.plan.plan import changes, make_plan
    from robust_unlearning.plan.text import format_fit, format_plan, parse_bytes

    memory = parse_bytes(arguments.memory) if arguments.memory else None
    plan = make_plan(recipe, config=arguments.config, points=arguments.points)
    ways = changes(recipe, plan, config=arguments.config) if memory is not None and plan.peak > memory else []
    if arguments.json:
        found = plan.as_dict() | {"seconds": plan.seconds(arguments.flops or float("inf"), arguments.bytes_per_second)}
        if arguments.flops is None:
            found["seconds"] = {"reading": found["seconds"]["reading"]}
        if memory is not None:
            found["fits"] = plan.peak <= memory
            found["changes"] = {way.text: way.peak for way in ways}
        print(json.dumps(found, indent=2, ensure_ascii=False, allow_nan=False))
        return
    print(format_plan(plan, arguments.flops, arguments.bytes_per_second))
    if memory is not None:
        print("\n" + format_fit(plan, memory, ways))

"""The paper, reproduced: reproduce."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from robust_unlearning.cli import AddVerb, overrides

if TYPE_CHECKING:
    from robust_unlearning.reproduce.run import Results


def add(verb: AddVerb) -> None:
    """Register the verb."""
    reproduce = verb("reproduce", _reproduce, "the paper's figures, tables and claims on one model, with a report")
    reproduce.add_argument("target", help="tiny, smollm2, zephyr-7b, or a YAML file")
    overrides(reproduce, "change a field of the target: seeds=[0] limit=20 set.steps=50 stages.main.seeds=1")
    reproduce.add_argument("--out", type=Path, help="folder (default: reproductions/TARGET; continued if it is there)")
    reproduce.add_argument("--only", nargs="+", default=[], metavar="STAGE", help="run only these stages")
    reproduce.add_argument(
        "--plan", action="store_true", help="print the plan and an estimate from a few measured steps; run no stage"
    )


def _reproduce(arguments: argparse.Namespace) -> None:
    from robust_unlearning.reproduce.target import chosen_stages, load_target, target_names

    words = [each for each in arguments.only if "=" in each]  # taken by --only, which reads on to the next option
    changes = [*arguments.overrides, *words]
    target = load_target(arguments.target, changes)
    stages = chosen_stages(target, [each for each in arguments.only if "=" not in each])
    out = arguments.out or Path("reproductions") / Path(arguments.target).stem

    from robust_unlearning import files
    from robust_unlearning.errors import UserError

    if out.is_file():
        raise UserError(f"{str(out)!r} is a file; --out takes a folder, a new one or that of a reproduction.")
    from robust_unlearning.reproduce.compose import write_report
    from robust_unlearning.reproduce.estimate import make_plan, plan_json, plan_text, units_of
    from robust_unlearning.reproduce.missing import missing
    from robust_unlearning.reproduce.run import run

    lacking = missing(target, stages)
    if lacking and not arguments.plan:
        others = ", ".join(each for each in target_names() if each != arguments.target)
        head = f"{arguments.target}: {len(lacking)} thing(s) are missing; bring them, or reproduce another ({others}):"
        raise UserError("\n  - ".join([head, *lacking]))
    rows = make_plan(target, stages, out, None)
    units = None
    if any(each.status != "finished" for each in rows):
        print("reckoning the cost …" if lacking else "measuring unit costs …", file=sys.stderr, flush=True)
        units = units_of(target, stages, out, here=not lacking)
        rows = make_plan(target, stages, out, units)
    print(plan_text(target, rows, units, lacking), flush=True)
    if arguments.plan:
        return
    files.write_json(out / "plan.json", plan_json(rows, units))
    name = Path(arguments.target).stem

    def report(results: Results) -> None:
        write_report(name, target, results, out, changes)

    print(f"\n-> {out}", flush=True)
    results = run(target, stages, out, lambda text: print(text, flush=True), report)
    page = write_report(name, target, results, out, changes)
    failed = {key: state["error"] for key, state in results.states.items() if state["status"] == "failed"}
    print(f"\nwritten: {page}, {out / 'reproduce.json'}; figures as PNG, SVG and CSV in {out / 'figures'}")
    if failed:
        raise UserError(
            "\n  - ".join([f"{len(failed)} stage(s) failed; run the same command again to try them again:"]
                          + [f"{key}: {why}" for key, why in failed.items()])
        )  # fmt: skip

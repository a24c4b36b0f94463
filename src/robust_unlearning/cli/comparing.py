"""Models against each other: compare."""

from __future__ import annotations

import argparse
from pathlib import Path

from robust_unlearning.cli import AddVerb
from robust_unlearning.errors import UserError, unknown


def add(verb: AddVerb) -> None:
    """Register the verbs."""
    comparing = verb("compare", _compare, "compare evaluated models question by question: differences, tests, rates")
    comparing.add_argument(
        "models",
        nargs="+",
        metavar="MODEL",
        help="folder that `unlearn eval` wrote records to; NAME=FOLDER names it, NAME=FOLDER,FOLDER are its seeds",
    )
    comparing.add_argument("--tasks", default="*", help="patterns of tasks, with commas: 'near/*,far/*' (default: all)")
    comparing.add_argument(
        "--group",
        action="append",
        default=[],
        metavar="NAME=PATTERNS",
        help="pool the questions of tasks; may be repeated (default: lm-eval's groups with an average; tasks that "
        "differ in subject alone)",
    )
    comparing.add_argument("--subjects", action="store_true", help="list every subject of a group as well")
    comparing.add_argument("--base", metavar="NAME", help="the reference (default: the first model)")
    comparing.add_argument(
        "--unlearned",
        metavar="NAME",
        help="whose loss the recovery is a share of (default: the second of three or more)",
    )
    comparing.add_argument(
        "--forget",
        metavar="PATTERNS",
        help="tasks where fewer right answers are better (default: '*forget*,*wmdp*' and a run's topics; '': none)",
    )
    comparing.add_argument("--level", type=float, default=0.95, help="of the intervals (default: 0.95)")
    comparing.add_argument(
        "--flips", type=int, default=0, metavar="N", help="list N questions a model: answered by the reference only"
    )
    comparing.add_argument("--out", action="append", default=[], help="write FILE.json, .md or .html; may be repeated")


def _compare(arguments: argparse.Namespace) -> None:
    from robust_unlearning import files
    from robust_unlearning.report.comparison import as_markdown, as_page, as_text
    from robust_unlearning.results.compare import compare
    from robust_unlearning.results.records import read_models
    from robust_unlearning.results.task_groups import parse_groups

    outs = [Path(each) for each in arguments.out]
    kinds = [".json", ".md", ".html"]
    for path in outs:
        if path.suffix not in kinds:
            raise UserError(unknown("kind of file", path.suffix or path.name, kinds, f"Given: --out {path}."))
    if arguments.flips < 0:
        raise UserError(f"--flips {arguments.flips}: give how many questions to list, 0 for none.")
    groups = parse_groups(arguments.group)
    result = compare(
        read_models(arguments.models),
        base=arguments.base,
        unlearned=arguments.unlearned,
        tasks=arguments.tasks.split(","),
        groups=groups,
        forget=None if arguments.forget is None else list(filter(None, arguments.forget.split(","))),
        level=arguments.level,
        flips=arguments.flips,
    )
    print(as_text(result, arguments.subjects))
    for path in outs:
        if path.suffix == ".json":
            files.write_json(path, result.as_dict())
        else:
            files.write_text(path, as_markdown(result) if path.suffix == ".md" else as_page(result))
        print(f"written to {path}")

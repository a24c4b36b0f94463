"""The verbs of the `unlearn` command, a module for each group of them.

A module's `add` registers its verbs. Nothing heavy is imported before a verb runs.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol


class AddVerb(Protocol):
    """Adds a verb: its name, what runs it, one sentence of help. Returns its parser, for its arguments."""

    def __call__(
        self, name: str, function: Callable[[argparse.Namespace], None], text: str
    ) -> argparse.ArgumentParser: ...


def overrides(to: argparse.ArgumentParser, text: str = "change a field of the recipe") -> None:
    """`field=value` words, as many as one likes."""
    to.add_argument("overrides", nargs="*", default=[], metavar="field=value", help=text)


def processes_option(to: argparse.ArgumentParser) -> None:
    """`--processes N`; a verb that takes it begins its work with `in_processes`."""
    to.add_argument("--processes", type=int, default=1, metavar="N", help="divide the work among N processes")


def in_processes(arguments: argparse.Namespace) -> bool:
    """Whether the command has now been run in the processes it was to run in, and nothing is left to do here.

    Raises:
        UserError: `--processes` makes no sense.
        SystemExit: one of the processes failed; it has said why.
    """
    from robust_unlearning.parallel.launch import launch, needed

    if not needed(arguments.processes):
        return False
    status = launch([sys.executable, "-m", "robust_unlearning", *arguments.argv], arguments.processes)
    if status:
        raise SystemExit(status)
    return True


def unsafe_options(to: argparse.ArgumentParser) -> None:
    """The two options that let a checkpoint run code."""
    to.add_argument("--allow-pickle", action="store_true", help="load pickled weights (they can run code)")
    to.add_argument("--trust-remote-code", action="store_true", help="run a model's own Python code")


def positive(text: str) -> int:
    """The type of an option that is a whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 1")
    return int(text)


def task_options(to: argparse.ArgumentParser) -> None:
    """How much is asked, and where data and definitions of lm-evaluation-harness's tasks lie: see `task_settings`."""
    to.add_argument(
        "--limit", type=positive, metavar="N", help="only the first N questions of each task or set: partial scores"
    )
    to.add_argument("--data-root", type=Path, metavar="DIR", help="local copies of data sets, DIR/ORG/NAME or DIR/NAME")
    to.add_argument(
        "--include-path", type=Path, action="append", default=[], metavar="DIR", help="folder of further task YAMLs"
    )


def task_settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """What `harness.load_task_sets` takes besides names."""
    return {
        "limit": arguments.limit,
        "data_root": arguments.data_root,
        "include_paths": tuple(arguments.include_path),
    }

"""The `unlearn` command: its parser, and what an error or an interruption prints. The verbs are in its neighbours."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from robust_unlearning.errors import UserError, unknown
from robust_unlearning.parallel.launch import followers_silent

EPILOG = """examples:
  unlearn demo                                   see the effect on a small real model
  unlearn list                                   recipes, methods and bundled models
  unlearn show smollm2/rmu noise_std=1           the whole recipe, with your changes
  unlearn plan smollm2/rmu --memory 8GiB         what a run would cost, before anything loads
  unlearn run smollm2/rmu noise_std=1 --out runs/rna
  unlearn eval runs/rna --tasks demo
  unlearn perturb mmlu/ --keyword SARS-CoV-2 --to data/mmlu-sars-cov-2
  unlearn sweep tiny/rmu noise_std=0,3,10 --tasks planted
  unlearn apply runs/rna --to models/unlearned   a folder that from_pretrained opens
"""


class Parser(argparse.ArgumentParser):
    """argparse, with mistakes as `UserError`s that name the nearest word and what is allowed."""

    def error(self, message: str) -> NoReturn:
        """What argparse found wrong, in one sentence; `--help` tells the rest."""
        raise UserError(f"{message}. {self.hint}")

    @property
    def hint(self) -> str:
        """What to do after a wrong word."""
        return f"Run `{self.prog} --help`."

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            kind = "/".join(action.option_strings) or ("verb" if action.metavar == "VERB" else "word")
            raise UserError(unknown(kind, str(value), map(str, action.choices), self.hint))

    @property
    def verbs(self) -> dict[str, Parser]:
        """The verbs that may follow, by name; none where the rest is options and arguments."""
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                return dict(action.choices)
        return {}

    def check_options(self, words: Sequence[str]) -> None:
        """Refuse words that look like options and are none, before argparse misses what they stand for."""
        options = [name for name in self._option_string_actions if name.startswith("--")]
        takes_fields = any(action.dest == "overrides" for action in self._actions)
        for word in words:
            name, equals, _ = word.partition("=")
            if word == "--" or not name.startswith("--") or any(each.startswith(name) for each in options):
                continue
            if takes_fields and equals:
                raise UserError(f"{name!r} is no option. Fields of a recipe have no dashes: {word.lstrip('-')}")
            raise UserError(unknown("option", name, options, self.hint))


def _parser() -> Parser:
    from robust_unlearning import __version__
    from robust_unlearning.cli import (
        analyzing,
        comparing,
        evaluation,
        ngrams,
        perturbing,
        planning,
        planted,
        reproducing,
        searching,
        sweeping,
        training,
    )

    parser = Parser(
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

    for module in (
        training,
        planning,
        evaluation,
        analyzing,
        searching,
        sweeping,
        comparing,
        perturbing,
        ngrams,
        planted,
        reproducing,
    ):
        module.add(verb)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; 0 when well, 2 for a user's error, 130 when interrupted."""
    argv = sys.argv[1:] if argv is None else list(argv)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        arguments = _parse(_parser(), argv)
        arguments.argv = argv
        with followers_silent():
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


def _parse(parser: Parser, argv: Sequence[str]) -> Any:
    """Parse, taking `field=value` words from anywhere after a verb that has them.

    Raises:
        UserError: a verb, an option or a value that is not known, or something missing.
    """
    leaf = parser
    for word in argv:
        leaf = leaf.verbs.get(word, leaf)
    if not leaf.verbs:
        leaf.check_options(argv)
    arguments, rest = parser.parse_known_args(argv)
    # options may stand before, between and after field=value
    loose = [word for word in rest if "=" in word and not word.startswith("-")]
    if len(loose) < len(rest) or (loose and not hasattr(arguments, "overrides")):
        words = [word for word in rest if word not in loose] or loose
        raise UserError(f"{leaf.prog} takes no {', '.join(map(repr, words))}. {leaf.hint}")
    if loose:
        arguments.overrides = [*arguments.overrides, *loose]
    return arguments


if __name__ == "__main__":
    sys.exit(main())

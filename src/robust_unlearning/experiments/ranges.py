"""Values and ranges of a recipe's fields, as they are typed: lists for a sweep, axes for a search.

noise_std=0,0.01,0.02          three values
noise_std=0:0.1:0.01           first:last:step, both ends in
noise_layers=[1],[2],[0,1,2]   commas inside brackets do not part values
retain_weight=1..1000          any number between; with :log, evenly in its logarithm (a search only)
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import TYPE_CHECKING, Any

import yaml

from robust_unlearning.errors import UserError
from robust_unlearning.recipe import Recipe

if TYPE_CHECKING:
    import optuna

_NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
_STEPS = re.compile(rf"({_NUMBER}):({_NUMBER}):({_NUMBER})")
_SPAN = re.compile(rf"(?P<low>{_NUMBER})\.\.(?P<high>{_NUMBER})(?P<log>:log)?")


@dataclass(frozen=True)
class Range:
    """A field that takes any value from `low` to `high`: whole numbers or not, uniformly or in its logarithm."""

    field: str
    low: float
    high: float
    log: bool
    whole: bool

    def suggest(self, trial: optuna.Trial) -> str:
        """The override that a trial gets."""
        if self.whole:
            return f"{self.field}={trial.suggest_int(self.field, int(self.low), int(self.high), log=self.log)}"
        return f"{self.field}={trial.suggest_float(self.field, self.low, self.high, log=self.log)!r}"

    def ends(self) -> list[str]:
        """Overrides at both ends."""
        return [f"{self.field}={int(end) if self.whole else end}" for end in (self.low, self.high)]


@dataclass(frozen=True)
class Choices:
    """A field that takes one of some values, written as JSON."""

    field: str
    values: tuple[str, ...]

    def suggest(self, trial: optuna.Trial) -> str:
        """The override that a trial gets."""
        return f"{self.field}={trial.suggest_categorical(self.field, self.values)}"

    def ends(self) -> list[str]:
        """Overrides with every value."""
        return [f"{self.field}={value}" for value in self.values]


Axis = Range | Choices


def parse_values(text: str) -> list[Any]:
    """The values that `text` names: parted by commas outside brackets, each a YAML value or first:last:step.

    >>> parse_values("0,0.5:1.5:0.5,[0,1]")
    [0, 0.5, 1.0, 1.5, [0, 1]]

    Raises:
        UserError: steps that never reach the end, brackets that do not close, or a value that is not YAML.
    """
    values: list[Any] = []
    for part in _parts(text):
        if steps := _STEPS.fullmatch(part):
            values += _steps(part, *map(Decimal, steps.groups()))
            continue
        try:
            values.append(yaml.safe_load(part) if part else None)
        except yaml.YAMLError as error:
            raise UserError(f"the value {part!r} is not YAML ({str(error).splitlines()[0]}).") from error
    return values


def _parts(text: str) -> list[str]:
    parts, depth = [""], 0
    for letter in text:
        depth += (letter in "[{") - (letter in "]}")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    if depth:
        raise UserError(f"the brackets of {text!r} do not close.")
    return [part.strip() for part in parts]


def _steps(text: str, first: Decimal, last: Decimal, step: Decimal) -> list[int | float]:
    """Decimal, so that 0:0.1:0.01 holds 0.03 and not 0.030000000000000002."""
    if step == 0 or (last - first) / step < 0:
        raise UserError(f"the range {text!r} is first:last:step, and this step never comes from first to last.")
    count = int((last - first) / step) + 1
    whole = all(number == number.to_integral_value() for number in (first, last, step))
    return [int(value) if whole else float(value) for value in (first + step * index for index in range(count))]


def parse_space(words: Sequence[str]) -> tuple[tuple[Axis, ...], tuple[str, ...]]:
    """Axes and fixed overrides from `field=low..high`, `field=low..high:log`, `field=a,b,c` and `field=value`.

    Raises:
        UserError: a word without `=`, a range that holds nothing, or nothing to search.
    """
    axes: list[Axis] = []
    fixed: list[str] = []
    for word in words:
        name, sign, text = word.partition("=")
        if not sign:
            raise UserError(f"{word!r}: write field=low..high, field=low..high:log, field=a,b,c or field=value.")
        if span := _SPAN.fullmatch(text):
            axes.append(_range(name, span, word))
        elif len(values := parse_values(text)) > 1:
            axes.append(Choices(name, tuple(dict.fromkeys(map(json.dumps, values)))))
        else:
            fixed.append(word)
    if not axes:
        raise UserError("nothing to search: give a field a range (retain_weight=1..1000:log) or values (layer=2,3,4).")
    names = [axis.field for axis in axes]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UserError(f"{', '.join(twice)}: searched twice; give a field one range or list of values.")
    return tuple(axes), tuple(fixed)


def _range(name: str, span: re.Match[str], word: str) -> Range:
    known = Recipe.model_fields.get(name.rsplit(".", 1)[-1])  # a topic's fields are the recipe's
    whole = known is not None and known.annotation in (int, int | None)
    low, high, log = float(span["low"]), float(span["high"]), bool(span["log"])
    if not low < high or (log and low <= 0):
        raise UserError(f"{word!r}: a range begins below its end{', and above 0 on a log scale' if log else ''}.")
    if whole and not (low.is_integer() and high.is_integer()):
        raise UserError(f"{word!r}: {name} takes whole numbers.")
    return Range(name, low, high, log, whole)

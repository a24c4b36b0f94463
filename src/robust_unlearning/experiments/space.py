"""Which fields are searched, and over what: ranges, whole or logarithmic, and lists of values."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import yaml

from robust_unlearning.errors import UserError
from robust_unlearning.recipe import Recipe

if TYPE_CHECKING:
    import optuna

_RANGE = re.compile(r"(?P<low>[-+.\de]+?)\.\.(?P<high>[-+.\de]+)(?P<log>:log)?")


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
        return [f"{self.field}={int(each) if self.whole else each}" for each in (self.low, self.high)]


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
        found = _RANGE.fullmatch(text)
        if found:
            axes.append(_range(name, found, word))
            continue
        try:
            values = yaml.safe_load(f"[{text}]")
        except yaml.YAMLError:
            values = [text]
        if len(values) > 1:
            axes.append(Choices(name, tuple(dict.fromkeys(json.dumps(each) for each in values))))
        else:
            fixed.append(word)
    if not axes:
        raise UserError("nothing to search: give a field a range (retain_weight=1..1000:log) or values (layer=2,3,4).")
    names = [axis.field for axis in axes]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UserError(f"{', '.join(twice)}: searched twice; give a field one range or list of values.")
    return tuple(axes), tuple(fixed)


def _range(name: str, found: re.Match[str], word: str) -> Range:
    known = Recipe.model_fields.get(name.rsplit(".", 1)[-1])  # a topic's fields are the recipe's
    whole = known is not None and known.annotation in (int, int | None)
    try:
        low, high = float(found["low"]), float(found["high"])
    except ValueError as error:
        raise UserError(f"{word!r}: a range goes from a number to a number, like 0.1..10.") from error
    log = bool(found["log"])
    if not low < high or (log and low <= 0):
        raise UserError(f"{word!r}: a range begins below its end{', and above 0 on a log scale' if log else ''}.")
    if whole and not (low.is_integer() and high.is_integer()):
        raise UserError(f"{word!r}: {name} takes whole numbers.")
    return Range(name, low, high, log, whole)

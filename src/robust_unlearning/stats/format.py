"""How an estimate is written: one rule for tables, figures, reports and the terminal.

52.1 [48, 56]      +0.132 [+0.101, +0.160]      undefined      97.0 (no bound)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from robust_unlearning.stats.estimates import Estimate


@dataclass(frozen=True)
class NumberForm:
    """How a kind of number is written.

    Attributes:
        number: format of the value.
        ends: format of the interval's ends; as `number` where there is none.
        scale: what both are multiplied by first: 100 for a share in %.
    """

    number: str = ".4g"
    ends: str = ".3g"
    scale: float = 1.0


GENERAL = NumberForm()
PERCENT = NumberForm(".1f", ".0f", 100.0)
POINTS = NumberForm("+.1f", "+.1f", 100.0)
NATS = NumberForm("+.3f", "+.3f")


def shown(value: Any, form: NumberForm = GENERAL) -> str:
    """A table's cell: an estimate with its interval, a number, or text; None is empty.

    An estimate without a value is `undefined`; one that has a value and no interval says `(no bound)`, unless it
    rests on no questions (`n` is 0), as a bare number does.
    """
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{form.scale * value:{form.number}}"
    if not isinstance(value, Estimate):
        return str(value)
    if value.value is None:
        return "undefined"
    text = f"{form.scale * value.value:{form.number}}"
    if value.low is None or value.high is None:
        return f"{text} (no bound)" if value.n else text
    return f"{text} {interval(value.low, value.high, form)}"


def interval(low: float | None, high: float | None, form: NumberForm = GENERAL) -> str:
    """`[low, high]`; empty where there is none."""
    if low is None or high is None:
        return ""
    return f"[{form.scale * low:{form.ends}}, {form.scale * high:{form.ends}}]"


def sizes(estimate: Estimate) -> str:
    """What an estimate rests on: `3 seeds, n=96`; empty where it says neither."""
    parts = [f"{estimate.seeds} seed{'s' * (estimate.seeds > 1)}"] if estimate.seeds else []
    return ", ".join([*parts, f"n={estimate.n}"] if estimate.n else parts)

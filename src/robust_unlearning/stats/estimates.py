"""A number with its interval, and what it rests on; accuracies, and the paper's two rates of bare accuracies.

Means over questions and seeds are in `means`, how their intervals are reckoned in `factors`, models on the same
questions in `paired`. A rate that has no meaning (nothing was lost, so nothing can be recovered) is reported as
undefined with the reason, never as a number.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import optimize, special

from robust_unlearning.errors import UserError

Array = NDArray[np.float64]
NOTHING_TO_LOSE = "the base model answers nothing correctly, so there is nothing to lose"
NOTHING_TO_RECOVER = "unlearning lost nothing, so there is nothing to recover"
SMALLEST_P = 1e-12
"""Smaller p-values are told as this one."""


@dataclass(frozen=True)
class VariancePart:
    """A factor's part of the variance of a mean.

    Attributes:
        factor: `seeds`, `clusters` or `words`.
        variance: what it adds.
        df: its degrees of freedom: groups that it was reckoned from, less 1.
    """

    factor: str
    variance: float
    df: int


def critical(parts: Sequence[VariancePart], level: float) -> float:
    """t' = Σ V_k t(d_k) / Σ V_k, two-sided (Cochran and Cox); where all V_k are 0, t of the most groups."""
    quantiles = [float(special.stdtrit(part.df, 0.5 + level / 2)) for part in parts]
    total = sum(part.variance for part in parts)
    if not total:
        return min(quantiles)
    return sum(part.variance * quantile for part, quantile in zip(parts, quantiles, strict=True)) / total


@dataclass(frozen=True)
class Estimate:
    """A number with its interval; `value` is None where it is undefined and `note` then says why.

    `low` and `high` are None where no interval can be given; `stderr` is the standard error; `n` counts the
    questions or documents (0: computed from bare numbers), `seeds` training seeds (None: not over seeds), `clusters`
    the entities that the questions are about (None: each question stands for itself), `words` the words that were put
    into them (None: none). `parts` are those of the squared standard error; empty where it is not a sum of such.
    `slack` is how far the value may be off for another reason than the sample, such as a curve between two points; the
    interval is as much wider on both sides.
    """

    value: float | None
    low: float | None = None
    high: float | None = None
    stderr: float | None = None
    n: int = 0
    seeds: int | None = None
    clusters: int | None = None
    words: int | None = None
    note: str = ""
    slack: float = 0.0
    parts: tuple[VariancePart, ...] = ()

    def __str__(self) -> str:
        text = "undefined" if self.value is None else f"{self.value:.4g}"
        if self.low is not None and self.high is not None:
            text += f" [{self.low:.4g}, {self.high:.4g}]"
        sizes = [f"S={self.seeds}"] if self.seeds else []
        sizes += [f"n={self.n}"] if self.n else []
        details = "; ".join(each for each in (", ".join(sizes), self.note) if each)
        return f"{text} ({details})" if details else text

    def as_dict(self) -> dict[str, Any]:
        """value, low, high, stderr, n for JSON (None where there is none); what else there is only where given."""
        always = ("value", "low", "high", "stderr", "n")
        given = {each.name: getattr(self, each.name) for each in fields(self) if each.name != "parts"}
        return {key: item for key, item in given.items() if key in always or item}

    def interval(self, level: float) -> tuple[float, float]:
        """(low, high) of a mean at another level, value ± (t' · stderr + slack); it must have `parts` and a value."""
        assert self.value is not None
        assert self.parts
        half = critical(self.parts, checked_level(level)) * self.spread + self.slack
        return self.value - half, self.value + half

    def at(self, level: float) -> Estimate:
        """The same with the interval of a level and the standard error that follow from `parts`; as it is without."""
        if self.value is None or not self.parts:
            return self
        low, high = self.interval(level)
        return replace(self, low=low, high=high, stderr=self.spread)

    def p(self, bound: float = 0.0) -> float:
        """The two-sided p-value of a mean being `bound`: 1 less the level whose interval just reaches it."""
        assert self.value is not None
        assert self.parts
        distance = max(0.0, abs(self.value - bound) - self.slack)
        if not self.spread:
            return SMALLEST_P if distance else 1.0
        ratio, highest = distance / self.spread, 1 - SMALLEST_P
        if critical(self.parts, highest) <= ratio:
            return SMALLEST_P
        return 1 - float(optimize.brentq(lambda level: critical(self.parts, level) - ratio, 0.0, highest, xtol=1e-9))

    @property
    def spread(self) -> float:
        """The square root of the sum of the parts."""
        return math.sqrt(sum(part.variance for part in self.parts))


def accuracy(correct: ArrayLike, level: float = 0.95) -> Estimate:
    """Share of right answers with its sample standard error and the Wilson interval.

    `stderr` = sqrt(acc (1 - acc) / (n - 1)), None for one question.

    Raises:
        UserError: no values, or values other than 0 and 1.
    """
    (values,) = columns(correct=correct)
    if not np.isin(values, (0.0, 1.0)).all():
        raise UserError("correct must hold only 0 and 1 (or False and True), one per question.")
    n, p = len(values), float(values.mean())
    stderr = (p * (1 - p) / (n - 1)) ** 0.5 if n > 1 else None
    low, high = wilson(p, n, NormalDist().inv_cdf(0.5 + checked_level(level) / 2))
    return Estimate(p, low, high, stderr, n)


def wilson(share: float, n: float, quantile: float) -> tuple[float, float]:
    """Wilson's interval of a share of n, n an effective number where answers are not independent.

    (p + z²/2n ± z sqrt(p(1-p)/n + z²/4n²)) / (1 + z²/n), z the quantile. Source: Wilson (1927), JASA 22.
    """
    square = quantile * quantile / n
    centre = (share + square / 2) / (1 + square)
    half = (square * share * (1 - share) + square * square / 4) ** 0.5 / (1 + square)
    return max(0.0, min(share, centre - half)), min(1.0, max(share, centre + half))


def reduction_rate(base: float, unlearned: float) -> Estimate:
    """(base - unlearned) / base: the share of the base's accuracy that unlearning cost (paper, App. A.3).

    Accuracies in any one unit; the rate is a fraction (0.5 is 50 %), below 0 where unlearning helped.
    Undefined for base = 0.

    >>> print(reduction_rate(60, 30))
    0.5
    """
    return _rate(NOTHING_TO_LOSE, base - unlearned, base, base, unlearned)


def recovery_rate(base: float, unlearned: float, rna: float) -> Estimate:
    """(rna - unlearned) / (base - unlearned): the share of the loss that noise won back (paper, App. A.3).

    A fraction (0.5 is 50 %), above 1 where RNA beats the base. Undefined where unlearning lost nothing.

    >>> print(recovery_rate(60, 30, 50))
    0.6667
    >>> print(recovery_rate(60, 60, 50))
    undefined (unlearning lost nothing, so there is nothing to recover)
    """
    return _rate(NOTHING_TO_RECOVER, rna - unlearned, base - unlearned, base, unlearned, rna)


def _rate(undefined: str, part: float, whole: float, *accuracies: float) -> Estimate:
    if not np.isfinite(accuracies).all():
        raise UserError(f"accuracies must be finite numbers; given {', '.join(map(str, accuracies))}.")
    return Estimate(part / whole) if whole > 0 else Estimate(None, note=undefined)


def columns(**named: ArrayLike) -> list[Array]:
    """Arrays of float [n], checked: one-dimensional, not empty, equally long, finite.

    Raises:
        UserError: they are not; the message names the array.
    """
    arrays = {name: np.asarray(values, dtype=float) for name, values in named.items()}
    for name, values in arrays.items():
        if values.ndim != 1 or not values.size:
            raise UserError(f"{name} must be a list of numbers, one per question; shape {values.shape}.")
        if not np.isfinite(values).all():
            index = int(np.flatnonzero(~np.isfinite(values))[0])
            raise UserError(f"{name} holds values that are not finite, the first at index {index}.")
    if len({len(values) for values in arrays.values()}) > 1:
        lengths = ", ".join(f"{name}: {len(values)}" for name, values in arrays.items())
        raise UserError(f"lengths differ ({lengths}). Give the same questions in the same order.")
    return list(arrays.values())


def checked_level(level: float) -> float:
    """The level, if it is one.

    Raises:
        UserError: it does not lie between 0 and 1.
    """
    if not 0 < level < 1:
        raise UserError(f"level = {level} is no confidence level; give one between 0 and 1, such as 0.95.")
    return level

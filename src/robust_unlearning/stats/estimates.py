"""Accuracies and log-probabilities -> rates with intervals. NumPy only.

Intervals are percentile bootstraps over questions (or documents). Where several models answered the same
questions, each resample draws the same questions for all of them. A rate that has no meaning (nothing was
lost, so nothing can be recovered) is reported as undefined with the reason, never as a number.

Shapes: n questions or documents, S seeds, R resamples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from robust_unlearning.errors import UserError

Array = NDArray[np.float64]
Statistic = Callable[[Array], Array]
"""Sums of K columns over drawn questions [R, K] -> [R], nan where it is undefined."""
RESAMPLES = 10_000
CHUNK = 2**21  # numbers drawn at a time, so that memory stays at some tens of MB for any n
MOST_UNDEFINED = 0.05  # the share of resamples that may be undefined before an interval is refused
NOTHING_TO_LOSE = "the base model answers nothing correctly, so there is nothing to lose"
NOTHING_TO_RECOVER = "unlearning lost nothing, so there is nothing to recover"


@dataclass(frozen=True)
class Estimate:
    """A number with its interval; `value` is None where it is undefined and `note` then says why.

    `low` and `high` are None where no interval can be given; `stderr` is the standard error; `n` counts the
    questions or documents (0: computed from bare numbers), `seeds` training seeds (None: not over seeds).
    """

    value: float | None
    low: float | None = None
    high: float | None = None
    stderr: float | None = None
    n: int = 0
    seeds: int | None = None
    note: str = ""

    def __str__(self) -> str:
        text = "undefined" if self.value is None else f"{self.value:.4g}"
        if self.low is not None and self.high is not None:
            text += f" [{self.low:.4g}, {self.high:.4g}]"
        sizes = [f"S={self.seeds}"] if self.seeds else []
        sizes += [f"n={self.n}"] if self.n else []
        details = "; ".join(each for each in (", ".join(sizes), self.note) if each)
        return f"{text} ({details})" if details else text

    def as_dict(self) -> dict[str, Any]:
        """value, low, high, stderr, n for JSON (None where there is none); seeds, note only where given."""
        return {key: item for key, item in asdict(self).items() if item or key not in ("seeds", "note")}


def accuracy(correct: ArrayLike, level: float = 0.95) -> Estimate:
    """Share of right answers with its sample standard error and the Wilson interval.

    `stderr` = sqrt(acc (1 - acc) / (n - 1)), None for one question.

    Raises:
        UserError: no values, or values other than 0 and 1.
    """
    (values,) = _columns(correct=correct)
    if not np.isin(values, (0.0, 1.0)).all():
        raise UserError("correct must hold only 0 and 1 (or False and True), one per question.")
    n, p, z = len(values), float(values.mean()), NormalDist().inv_cdf(0.5 + _checked(level) / 2)
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
    stderr = (p * (1 - p) / (n - 1)) ** 0.5 if n > 1 else None
    low, high = max(0.0, min(p, centre - half)), min(1.0, max(p, centre + half))
    return Estimate(p, low, high, stderr, n)


def mean_interval(values: ArrayLike, seed: int = 0, resamples: int = RESAMPLES, level: float = 0.95) -> Estimate:
    """Mean of `values` [n], sample standard error, and the percentile bootstrap interval.

    Raises:
        UserError: no values, or values that are not finite.
    """
    (data,) = _columns(values=values)
    stderr = float(data.std(ddof=1) / len(data) ** 0.5) if len(data) > 1 else None
    return bootstrap(data[:, None], lambda sums: sums[:, 0] / len(data), seed, resamples, level, stderr=stderr)


def paired_difference(a: ArrayLike, b: ArrayLike, level: float = 0.95) -> Estimate:
    """Mean of a - b over the same n questions, with interval: `a` and `b` are [n] in the same order.

    Raises:
        UserError: no values, unequal lengths, or values that are not finite.
    """
    first, second = _columns(a=a, b=b)
    return mean_interval(first - second, level=level)


def nats_per_token(nats: ArrayLike, tokens: ArrayLike, seed: int = 0) -> Estimate:
    """Negative log-likelihood per token over n documents: sum of `nats` [n] / sum of `tokens` [n].

    The interval resamples documents, as tokens of one document are not independent. exp of it is the
    perplexity. Documents without predicted tokens are left out of n.

    Raises:
        UserError: no document with tokens, unequal lengths, or values that are not finite.
    """
    total, count = _columns(nats=nats, tokens=tokens)
    total, count = total[count > 0], count[count > 0]
    if not len(count):
        raise UserError("no document has a token to predict: each is shorter than two tokens.")
    rows = np.stack([total, count], axis=1)
    return bootstrap(rows, lambda sums: sums[:, 0] / sums[:, 1], seed)


def reduction_rate(base: float, unlearned: float) -> Estimate:
    """(base - unlearned) / base: the share of the base's accuracy that unlearning cost (paper, App. A.3).

    Accuracies in any one unit; the rate is a fraction (0.5 is 50 %), below 0 where unlearning helped.
    Undefined for base = 0.

    >>> print(reduction_rate(60, 30))
    0.5
    """
    return _rate(reductions, NOTHING_TO_LOSE, base, unlearned)


def recovery_rate(base: float, unlearned: float, rna: float) -> Estimate:
    """(rna - unlearned) / (base - unlearned): the share of the loss that noise won back (paper, App. A.3).

    A fraction (0.5 is 50 %), above 1 where RNA beats the base. Undefined where unlearning lost nothing.

    >>> print(recovery_rate(60, 30, 50))
    0.6667
    >>> print(recovery_rate(60, 60, 50))
    undefined (unlearning lost nothing, so there is nothing to recover)
    """
    return _rate(recoveries, NOTHING_TO_RECOVER, base, unlearned, rna)


def _rate(statistic: Statistic, undefined: str, *accuracies: float) -> Estimate:
    if not np.isfinite(accuracies).all():
        raise UserError(f"accuracies must be finite numbers; given {', '.join(map(str, accuracies))}.")
    rate = float(statistic(np.array([accuracies], dtype=float))[0])
    return Estimate(None, note=undefined) if np.isnan(rate) else Estimate(rate)


def over_seeds(per_seed_values: ArrayLike, level: float = 0.95) -> Estimate:
    """Mean of values [S, n] over S training seeds and n questions, with a two-level bootstrap.

    Each resample draws S seeds, then n questions, the same questions for every drawn seed, because all seeds
    answered the same ones. With few seeds the spread between seeds is underestimated (by about (S - 1) / S in
    variance); with one seed the interval is over questions only and the note says so.

    Raises:
        UserError: not a table of S rows of n values, or values that are not finite.
    """
    table = np.asarray(per_seed_values, dtype=float)
    if table.ndim != 2 or not table.size or not np.isfinite(table).all():
        raise UserError(f"per_seed_values must be finite numbers [seeds, questions]; shape {table.shape}.")
    seeds, n = table.shape
    rng = np.random.default_rng(0)
    means = []
    for size in _chunks(RESAMPLES, n):
        drawn_seeds = rng.multinomial(seeds, np.full(seeds, 1 / seeds), size=size) / seeds
        questions = rng.integers(n, size=(size, n))
        means.append(np.take_along_axis(drawn_seeds @ table, questions, axis=1).mean(axis=1))
    note = "one seed: the interval is over questions only" if seeds == 1 else ""
    return _summarise(float(table.mean()), np.concatenate(means), n, level, seeds=seeds, note=note)


def share_over_seeds(per_seed_correct: ArrayLike) -> Estimate:
    """`over_seeds` of right (1) and wrong (0), with Wilson's interval over the questions where all values are alike.

    There a bootstrap has nothing to draw on, and would give an interval without width for any n.
    """
    table = np.asarray(per_seed_correct, dtype=float)
    share = over_seeds(table)
    if table.min() == table.max() and table.min() in (0, 1):
        wilson = accuracy(table[0])
        return replace(share, low=wilson.low, high=wilson.high)
    return share


def reductions(sums: Array) -> Array:
    """Rows of (base, unlearned), any common scale -> rate, nan where undefined."""
    base, unlearned = sums.T
    return _quotient(base - unlearned, base)


def recoveries(sums: Array) -> Array:
    """Rows of (base, unlearned, rna), any common scale -> rate, nan where undefined."""
    base, unlearned, rna = sums.T
    return _quotient(rna - unlearned, base - unlearned)


def _quotient(part: Array, whole: Array) -> Array:
    rate: Array = np.divide(part, whole, out=np.full(len(whole), np.nan), where=whole > 0)
    return rate


def bootstrap(
    rows: Array,
    statistic: Statistic,
    seed: int = 0,
    resamples: int = RESAMPLES,
    level: float = 0.95,
    *,
    value: float | None = None,
    stderr: float | None = None,
    seeds: int | None = None,
    undefined: str = "",
) -> Estimate:
    """A statistic of the sums over n questions and its percentile interval: each resample draws n questions.

    Args:
        rows: [n, columns]; the same questions are drawn for all columns.
        value: the statistic of the questions as they are; left out: of their sums.
        stderr: the standard error; left out: the spread of the resamples.
        seeds: how many training seeds there are; for the estimate only.
        undefined: why there is no value where the statistic is undefined on the questions as they are.

    Raises:
        UserError: fewer than 100 resamples, or a level that is none.
    """
    value = float(statistic(rows.sum(axis=0, keepdims=True))[0]) if value is None else value
    if np.isnan(value):
        return Estimate(None, n=len(rows), seeds=seeds, note=undefined)
    sums = np.concatenate(list(_resampled_sums(rows, seed, resamples)))
    return _summarise(value, statistic(sums), len(rows), level, stderr, seeds)


def _resampled_sums(rows: Array, seed: int, resamples: int) -> Iterator[Array]:
    """Sums over n rows drawn with replacement: chunks of [R, columns]. The same rows for all columns."""
    rng = np.random.default_rng(seed)
    distinct, counts = np.unique(rows, axis=0, return_counts=True)
    few = len(distinct) <= 64  # as with right and wrong answers: draw how often each kind of row occurs
    for size in _chunks(resamples, len(distinct) if few else len(rows)):
        if few:
            yield rng.multinomial(len(rows), counts / len(rows), size=size) @ distinct
        else:
            picked = rng.integers(len(rows), size=(size, len(rows)))
            yield np.stack([column[picked].sum(axis=1) for column in rows.T], axis=1)


def _chunks(resamples: int, width: int) -> Iterator[int]:
    if resamples < 100:
        raise UserError(f"resamples = {resamples} is too few for an interval; give at least 100.")
    step = max(1, CHUNK // width)
    for start in range(0, resamples, step):
        yield min(step, resamples - start)


def _summarise(
    value: float,
    draws: Array,
    n: int,
    level: float,
    stderr: float | None = None,
    seeds: int | None = None,
    note: str = "",
) -> Estimate:
    """Percentile interval of the defined draws, or none where one question or undefined draws forbid it."""
    tail = (1 - _checked(level)) / 2
    if n < 2:
        return Estimate(value, n=n, seeds=seeds, note="one value: no interval")
    undefined = int(np.isnan(draws).sum())
    if undefined > MOST_UNDEFINED * len(draws):
        note = f"interval unbounded: undefined in {undefined} of {len(draws)} resamples"
        return Estimate(value, n=n, seeds=seeds, note=note)
    if undefined:
        note = f"undefined in {undefined} of {len(draws)} resamples"
    draws = draws[~np.isnan(draws)]
    low, high = (float(each) for each in np.quantile(draws, [tail, 1 - tail]))
    return Estimate(value, low, high, float(draws.std()) if stderr is None else stderr, n, seeds, note)


def _columns(**named: ArrayLike) -> list[Array]:
    """Arrays of float [n], checked: one-dimensional, not empty, equally long, finite."""
    columns = {name: np.asarray(values, dtype=float) for name, values in named.items()}
    for name, values in columns.items():
        if values.ndim != 1 or not values.size:
            raise UserError(f"{name} must be a list of numbers, one per question; shape {values.shape}.")
        if not np.isfinite(values).all():
            index = int(np.flatnonzero(~np.isfinite(values))[0])
            raise UserError(f"{name} holds values that are not finite, the first at index {index}.")
    if len({len(values) for values in columns.values()}) > 1:
        lengths = ", ".join(f"{name}: {len(values)}" for name, values in columns.items())
        raise UserError(f"lengths differ ({lengths}). Give the same questions in the same order.")
    return list(columns.values())


def _checked(level: float) -> float:
    if not 0 < level < 1:
        raise UserError(f"level = {level} is no confidence level; give one between 0 and 1, such as 0.95.")
    return level

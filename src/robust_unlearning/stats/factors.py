"""Means over seeds, questions and words, with intervals that know how few of each there are.

A mean over S training seeds and n questions varies for several reasons: with other seeds it would be another, and
with other questions, and, where words were put into the questions, with other words. Each reason is a *factor*.
Its part of the mean's variance is reckoned from as many groups as the factor has, and has one degree of freedom less:

| factor | groups | part of the variance |
|---|---|---|
| seeds | S rows | sample variance of the row means / S |
| words | W words | W/(W-1) · Σ_w (Σ_{i with w} r_i)² / n² |
| clusters | C clusters (each question one, where none are named) | the same, less that of single questions |

r_i is question i's mean over seeds less the mean. Where there are words, they cross clusters, and what single questions
(pairs of cluster and word) add to both is taken off once, 0 being the least (two-way clustering: Cameron, Gelbach and
Miller 2011, J. Bus. Econ. Stat. 29). It is taken off the clusters, of which there are mostly more: few words must not
borrow their degrees of freedom.

The interval is value ± t' · sqrt(Σ V_k) with t' = Σ V_k t(d_k) / Σ V_k (Cochran and Cox 1957, Experimental Designs,
section 4.14): a factor with few groups widens the interval by as much as it matters. `benchmarks/verdicts.py`
simulates how often that errs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import optimize

from robust_unlearning.errors import UserError
from robust_unlearning.stats.estimates import Array, Estimate, VariancePart

FEWEST_SEEDS = 3
"""With fewer seeds an interval is over questions alone, and says nothing of models trained with other seeds."""
SINGLE = "single questions"
"""What pairs of cluster and word add; it stands in the parts of both, and is taken off those of clusters."""
NO_INTERVAL = "one observation only: no interval"
"""What is said where there is nothing that varies: one question, or all questions about one thing."""
ONE_WORD = "one word: nothing is said of others"
Labels = Sequence[object] | NDArray[np.generic]


@dataclass(frozen=True)
class Groups:
    """How n questions hang together: labels [n]; None where each stands for itself, or where no words were put in.

    Attributes:
        clusters: what a question is about; those about one entity are answered alike, and count as one.
        words: the word that was put into it.
    """

    clusters: Labels | None = None
    words: Labels | None = None


@dataclass(frozen=True)
class Means:
    """Means of K tables over shared questions, and their covariance by factor.

    Attributes:
        values: [K].
        factors: (factor, covariance [K, K], degrees of freedom).
        n, clusters, words, seeds: questions, clusters, words (0: none) and seeds that they rest on.
    """

    values: Array
    factors: tuple[tuple[str, Array, int], ...]
    n: int
    clusters: int
    words: int
    seeds: int

    def weighted(self, weights: ArrayLike, level: float = 0.95) -> Estimate:
        """The sum of weights [K] times means, with its interval."""
        w = np.asarray(weights, dtype=float)
        value, parts = float(w @ self.values), self._parts(w)
        if not parts:
            return replace(self._sized(value), note=NO_INTERVAL)
        return replace(self._sized(value), parts=parts).at(level)

    def ratio(self, over: ArrayLike, under: ArrayLike, level: float = 0.95, undefined: str = "") -> Estimate:
        """The ratio of two weighted sums with Fieller's interval: all ratios ρ for which over − ρ under may be 0.

        The ends, where the interval of over − ρ under just reaches 0, are found by Brent's method. There is no bound
        where the denominator may be 0. Source: Fieller (1954), J. R. Stat. Soc. B 16.

        Args:
            undefined: why there is no ratio where the denominator is not above 0.
        """
        a, b = np.asarray(over, dtype=float), np.asarray(under, dtype=float)
        top, bottom = float(a @ self.values), float(b @ self.values)
        if bottom <= 0:
            return replace(self._sized(None), note=undefined)
        value = top / bottom
        at = self.weighted(a - value * b, level)
        if not at.parts:
            return replace(self._sized(value), note=NO_INTERVAL)
        if not at.spread:
            return replace(self._sized(value), note="no bound: all answers are alike, so nothing says how it may vary")

        def beyond(ratio: float) -> float:
            """How far 0 lies outside the interval of over − ρ under; below 0 the ratio is allowed."""
            found = self.weighted(a - ratio * b, level)
            assert found.low is not None
            assert found.high is not None
            return max(found.low, -found.high)

        ends = [_end(beyond, value, sign * max(at.spread / bottom, 1e-9)) for sign in (-1, 1)]
        if None in ends or (self.weighted(b, level).low or 0.0) <= 0:
            return replace(self._sized(value), note="no bound: what it is a share of may be 0")
        return replace(self._sized(value), low=ends[0], high=ends[1], stderr=at.spread / bottom)

    def _parts(self, weights: Array) -> tuple[VariancePart, ...]:
        """The parts of the variance of a weighted sum; of clusters what they add beyond single questions."""
        quadratic = [(factor, float(weights @ covariance @ weights), df) for factor, covariance, df in self.factors]
        single = sum(variance for factor, variance, _ in quadratic if factor == SINGLE)
        return tuple(
            VariancePart(factor, max(0.0, variance - (single if factor == "clusters" else 0.0)), df)
            for factor, variance, df in quadratic
            if factor != SINGLE
        )

    def _sized(self, value: float | None) -> Estimate:
        fewer = self.clusters if self.clusters < self.n else None
        note = ONE_WORD if self.words == 1 else ""
        return Estimate(value, n=self.n, seeds=self.seeds, clusters=fewer, words=self.words or None, note=note)


def _end(beyond: Callable[[float], float], start: float, step: float) -> float | None:
    """Where a function that is below 0 at `start` first reaches 0 in the direction of `step`; None far away."""
    inside = start
    for _ in range(60):
        outside = inside + step
        if beyond(outside) > 0:
            return float(optimize.brentq(beyond, inside, outside)) if beyond(inside) < 0 else inside
        inside, step = outside, 1.5 * step
    return None


def means_of(tables: Sequence[ArrayLike], groups: Groups | None = None, *, pair_seeds: bool = False) -> Means:
    """Means of K tables [seeds, n] of the same n questions.

    Args:
        groups: how the questions hang together.
        pair_seeds: row k of every table with as many rows was trained with one seed. Else seeds are independent
            between tables. A table of one row is one given model, and a table of fewer than `FEWEST_SEEDS` rows is so
            many given models: neither adds to the variance.

    Raises:
        UserError: not tables of finite numbers with the same questions, or other than n labels.
    """
    checked = tables_of(tables)
    n, groups = checked[0].shape[1], groups or Groups()
    means = np.stack([table.mean(axis=0) for table in checked])
    rest = means - means.mean(axis=1, keepdims=True)
    factors = _seed_factors(checked, pair_seeds)
    clusters = _codes(groups.clusters, n) if groups.clusters is not None else np.arange(n)
    words = _codes(groups.words, n) if groups.words is not None else np.zeros(0, dtype=int)
    counts = [int(codes.max()) + 1 if codes.size else 0 for codes in (clusters, words)]
    if counts[0] > 1:
        factors.append(("clusters", _clustered(rest, clusters), counts[0] - 1))
    if counts[1] > 1:
        factors.append(("words", _clustered(rest, words), counts[1] - 1))
        pairs = np.unique(np.stack([clusters, words]), axis=1, return_inverse=True)[1].reshape(-1)
        factors.append((SINGLE, _clustered(rest, pairs), n - 1))
    return Means(means.mean(axis=1), tuple(factors), n, counts[0], counts[1], max(map(len, checked)))


def _seed_factors(tables: Sequence[Array], pair_seeds: bool) -> list[tuple[str, Array, int]]:
    """Covariances of the K means from seed to seed: of tables paired by seed together, of others one by one."""
    together: dict[int, list[int]] = {}
    for index, table in enumerate(tables):
        if len(table) >= FEWEST_SEEDS:
            together.setdefault(len(table) if pair_seeds else -index, []).append(index)
    factors = []
    for indices in together.values():
        rows = np.stack([tables[index].mean(axis=1) for index in indices])
        seeds = rows.shape[1]
        covariance = np.zeros((len(tables), len(tables)))
        covariance[np.ix_(indices, indices)] = np.atleast_2d(np.cov(rows, ddof=1)) / seeds
        factors.append(("seeds", covariance, seeds - 1))
    return factors


def _clustered(rest: Array, codes: NDArray[np.int64]) -> Array:
    """C/(C-1) Σ_c s_c s_cᵀ / n², with s_c the sums of `rest` [K, n] over cluster c."""
    count = int(codes.max()) + 1
    sums = np.stack([np.bincount(codes, row, count) for row in rest])
    covariance: Array = sums @ sums.T * (count / (count - 1) / rest.shape[1] ** 2)
    return covariance


def _codes(labels: Labels, n: int) -> NDArray[np.int64]:
    """Labels [n] as numbers from 0."""
    if len(labels) != n:
        raise UserError(f"{len(labels)} labels for {n} questions: give one for each.")
    numbers = labels if isinstance(labels, np.ndarray) and labels.dtype.kind in "if" else [str(each) for each in labels]
    return np.unique(np.asarray(numbers), return_inverse=True)[1].reshape(-1)


def tables_of(tables: Sequence[ArrayLike]) -> list[Array]:
    """Float tables [seeds, n], checked: two-dimensional, not empty, finite, as many questions each.

    Raises:
        UserError: they are not.
    """
    checked = [np.asarray(each, dtype=float) for each in tables]
    if any(each.ndim != 2 or not each.size or not np.isfinite(each).all() for each in checked):
        shapes = ", ".join(str(each.shape) for each in checked)
        raise UserError(f"tables must be finite numbers [seeds, questions]; shapes {shapes}.")
    if len({each.shape[1] for each in checked}) > 1:
        counts = ", ".join(str(each.shape[1]) for each in checked)
        raise UserError(f"numbers of questions differ ({counts}). Give the same questions in the same order.")
    return checked

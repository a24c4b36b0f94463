"""The intervals' formulas once more, written with loops and root-finding instead of matrices, for the tests."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from scipy import optimize, stats

Parts = list[tuple[float, int]]
"""(variance, degrees of freedom) of each factor."""


def clustered(values: Sequence[float], labels: Sequence[object]) -> float:
    """Variance of the mean of n values that are alike within a label: C/(C-1) Σ_c (Σ_{i in c} r_i)² / n²."""
    n, mean, total = len(values), sum(values) / len(values), 0.0
    for i in range(n):
        for j in range(n):
            if labels[i] == labels[j]:
                total += (values[i] - mean) * (values[j] - mean)
    count = len(set(labels))
    return count / (count - 1) * total / n**2


def parts_of(
    table: Sequence[Sequence[float]], clusters: Sequence[object] | None = None, words: Sequence[object] | None = None
) -> Parts:
    """Parts of the variance of the mean of one table [seeds, n]."""
    seeds, n = len(table), len(table[0])
    means = [sum(row[i] for row in table) / seeds for i in range(n)]
    about = list(range(n)) if clusters is None else list(clusters)
    parts: Parts = []
    if seeds >= 3:
        rows = [sum(row) / n for row in table]
        middle = sum(rows) / seeds
        parts.append((sum((row - middle) ** 2 for row in rows) / (seeds - 1) / seeds, seeds - 1))
    single = 0.0 if words is None else clustered(means, list(zip(about, words, strict=True)))
    if len(set(about)) > 1:
        parts.append((max(0.0, clustered(means, about) - single), len(set(about)) - 1))
    if words is not None:
        parts.append((clustered(means, words), len(set(words)) - 1))
    return parts


def quantile(parts: Parts, level: float = 0.95) -> float:
    """t' = Σ V t / Σ V."""
    above = sum(variance * stats.t.ppf((1 + level) / 2, df) for variance, df in parts)
    return float(above / sum(variance for variance, _ in parts))


def interval(value: float, parts: Parts, level: float = 0.95) -> tuple[float, float]:
    """value ± t' sqrt(Σ V)."""
    half = quantile(parts, level) * sum(variance for variance, _ in parts) ** 0.5
    return value - half, value + half


def fieller(top: np.ndarray, bottom: np.ndarray, parts: Callable[..., Parts], level: float = 0.95) -> list[float]:
    """Ends of the ratio's interval by its definition: the first ratios, on a dense grid to either side, at which
    top − ρ bottom is farther from 0 than t' allows, t' and the variance being those at that ratio; then between the
    last two by root-finding.

    `parts` gives those of the variance of a table's mean.
    """
    ratio = top.mean() / bottom.mean()

    def beyond(rho: float) -> float:
        rest = top - rho * bottom
        found = parts(rest)
        return float(abs(rest.mean()) - quantile(found, level) * sum(variance for variance, _ in found) ** 0.5)

    ends = []
    for side in (-1, 1):
        grid = [ratio + side * 0.02 * index for index in range(200)]
        out = next(index for index, rho in enumerate(grid) if beyond(rho) > 0)
        ends.append(float(optimize.brentq(beyond, grid[out - 1], grid[out], xtol=1e-12)))
    return ends

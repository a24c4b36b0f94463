"""Tests of many dimensions at once: normality, a mean of zero, and the correction for asking so often. NumPy only.

Shapes: n samples, d dimensions.
"""

from __future__ import annotations

import math

import numpy as np

from robust_unlearning.errors import UserError
from robust_unlearning.stats.estimates import Array

LEAST = 20
"""Samples below which the approximations of the normality test do not hold."""


def normality(samples: Array) -> Array:
    """p-values [d] of D'Agostino and Pearson's K² for each column of `samples` [n, d].

    K² = Z(skewness)² + Z(kurtosis)² is χ² with two degrees of freedom where the column is normal, so p is
    exp(-K²/2). Z of the skewness: D'Agostino (1970), "Transformation to normality of the null distribution of g1",
    Biometrika 57; of the kurtosis: Anscombe and Glynn (1983), "Distribution of the kurtosis statistic b2 for
    normal samples", Biometrika 70; K²: D'Agostino and Pearson (1973), Biometrika 60.

    Raises:
        UserError: fewer than 20 samples.
    """
    n = len(samples)
    if n < LEAST:
        raise UserError(f"{n} samples are too few for a test of normality; give at least {LEAST}.")
    centred = samples - samples.mean(axis=0)
    second = np.mean(centred**2, axis=0)
    skewness = np.mean(centred**3, axis=0) / second**1.5
    kurtosis = np.mean(centred**4, axis=0) / second**2
    return np.exp(-(_z_skewness(skewness, n) ** 2 + _z_kurtosis(kurtosis, n) ** 2) / 2)


def _z_skewness(skewness: Array, n: int) -> Array:
    scaled = skewness * math.sqrt((n + 1) * (n + 3) / (6 * (n - 2)))
    beta = 3 * (n * n + 27 * n - 70) * (n + 1) * (n + 3) / ((n - 2) * (n + 5) * (n + 7) * (n + 9))
    w = math.sqrt(2 * (beta - 1)) - 1  # W²
    return np.arcsinh(scaled / math.sqrt(2 / (w - 1))) / math.sqrt(0.5 * math.log(w))


def _z_kurtosis(kurtosis: Array, n: int) -> Array:
    mean = 3 * (n - 1) / (n + 1)
    variance = 24 * n * (n - 2) * (n - 3) / ((n + 1) ** 2 * (n + 3) * (n + 5))
    x = (kurtosis - mean) / math.sqrt(variance)
    skew = 6 * (n * n - 5 * n + 2) / ((n + 7) * (n + 9)) * math.sqrt(6 * (n + 3) * (n + 5) / (n * (n - 2) * (n - 3)))
    a = 6 + 8 / skew * (2 / skew + math.sqrt(1 + 4 / skew**2))
    ratio = (1 - 2 / a) / (1 + x * math.sqrt(2 / (a - 4)))
    return (1 - 2 / (9 * a) - np.cbrt(ratio)) / math.sqrt(2 / (9 * a))


def zero_mean(samples: Array) -> Array:
    """Two-sided p-values [d] of "the mean is 0" for each column of `samples` [n, d]: Student's t.

    Its tail is read from the normal's by Wallace's transformation (Wallace 1959, "Bounds on normal approximations
    to Student's and the chi-square distributions", Ann. Math. Statist. 30), good to a few percent of p.
    """
    n = len(samples)
    t = samples.mean(axis=0) / (samples.std(axis=0, ddof=1) / math.sqrt(n))
    freedom = n - 1
    z = np.sqrt(freedom * np.log1p(t**2 / freedom)) * (8 * freedom + 1) / (8 * freedom + 3)
    return np.array([math.erfc(each / math.sqrt(2)) for each in z])


def holm(p: Array, level: float = 0.05) -> Array:
    """Which of m hypotheses are rejected when at most `level` is risked for all together (Holm 1979). [m] of bool."""
    order = np.argsort(p)
    steps = p[order] <= level / (len(p) - np.arange(len(p)))
    count = len(p) if steps.all() else int(np.argmin(steps))
    rejected = np.zeros(len(p), dtype=bool)
    rejected[order[:count]] = True
    return rejected

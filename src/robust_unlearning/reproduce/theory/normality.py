"""Tests of many dimensions at once, by SciPy: normality, and a mean of zero.

Shapes: n samples, d dimensions.
"""

from __future__ import annotations

import numpy as np
from scipy import stats

from robust_unlearning.errors import UserError
from robust_unlearning.stats.estimates import Array
from robust_unlearning.stats.paired import holm

LEAST = 20
"""Samples below which the approximations of the normality test do not hold."""
LEVEL = 0.05
"""Risk of rejecting what is so."""


def normality(samples: Array) -> Array:
    """p-values [d, ...] of D'Agostino and Pearson's K² (1973, Biometrika 60) for each column of `samples` [n, d, ...].

    K² = Z(skewness)² + Z(kurtosis)² is χ² with two degrees of freedom where the column is normal. A column whose
    samples are all the same says nothing: its p is 1.

    Raises:
        UserError: fewer than 20 samples.
    """
    if len(samples) < LEAST:
        raise UserError(f"{len(samples)} samples are too few for a test of normality; give at least {LEAST}.")
    return np.nan_to_num(stats.normaltest(samples, axis=0).pvalue, nan=1.0)


def zero_mean(samples: Array) -> Array:
    """Two-sided p-values [d] of "the mean is 0" for each column of `samples` [n, d]: Student's t; 1 if all are 0."""
    return np.nan_to_num(stats.ttest_1samp(samples, 0).pvalue, nan=1.0)


def share_rejected(p: Array) -> float:
    """Share of hypotheses rejected when at most `LEVEL` is risked for all together, by Holm."""
    return float(np.mean(np.array(holm(p.tolist())) < LEVEL))

"""The ratio of two costs from pairs of measurements, with Student's interval on the log scale."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from robust_unlearning.errors import UserError
from robust_unlearning.stats.estimates import Estimate


def mean_excess(log_ratios: ArrayLike, level: float = 0.95) -> Estimate:
    """The geometric mean of ratios less 1, exp(x̄) − 1 for log ratios x [n], with its interval.

    The interval is exp(x̄ ± t s/√n) − 1, t the quantile of Student's distribution with n − 1 degrees of freedom and
    s the sample standard deviation; it is exact where the x are normal, for any n from 2. `stderr` is that of the
    ratio to first order, exp(x̄) s/√n. One pair has no interval.

    Raises:
        UserError: no values, or values that are not finite.
    """
    values = np.asarray(log_ratios, dtype=float)
    if values.ndim != 1 or not values.size or not np.isfinite(values).all():
        raise UserError(f"log_ratios must be a list of finite numbers, one a pair; given {log_ratios!r}.")
    n, mean = len(values), float(values.mean())
    if n < 2:
        return Estimate(math.expm1(mean), n=n, note="one pair: no interval")
    error = float(values.std(ddof=1)) / math.sqrt(n)
    half = float(stats.t.ppf(0.5 + level / 2, n - 1)) * error
    return Estimate(math.expm1(mean), math.expm1(mean - half), math.expm1(mean + half), math.exp(mean) * error, n)

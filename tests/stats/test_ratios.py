"""A mean ratio from pairs, against numbers worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from robust_unlearning.errors import UserError
from robust_unlearning.stats.ratios import mean_excess


def test_the_interval_is_students_on_the_log_scale() -> None:
    logs = np.log([1.0, 1.1, 1.2, 1.3])
    found = mean_excess(logs)
    half = 3.182446305 * math.sqrt(sum((x - logs.mean()) ** 2 for x in logs) / 3 / 4)  # t of 3 degrees, 97.5 %
    assert found.value == pytest.approx((1.0 * 1.1 * 1.2 * 1.3) ** 0.25 - 1)
    assert (found.low, found.high) == pytest.approx(
        (math.exp(logs.mean() - half) - 1, math.exp(logs.mean() + half) - 1)
    )
    assert found.n == 4


def test_one_pair_has_no_interval_and_none_is_an_error() -> None:
    alone = mean_excess([math.log(2)])
    assert (alone.value, alone.low, alone.high, alone.n) == (pytest.approx(1.0), None, None, 1)
    assert mean_excess([0.0, 0.0]).low == mean_excess([0.0, 0.0]).high == 0
    for wrong in ([], [0.0, math.inf], [[0.0]]):
        with pytest.raises(UserError, match="finite numbers"):
            mean_excess(wrong)


def test_the_interval_covers_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    found = [mean_excess(rng.normal(0.02, 0.05, size=8)) for _ in range(2000)]
    covered = np.mean([each.low < math.expm1(0.02) < each.high for each in found])
    assert 0.935 < covered < 0.965  # three standard errors about 95 %

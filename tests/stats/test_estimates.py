"""Estimates, accuracies, rates of bare numbers, and p-values and intervals that follow from the parts of a variance."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from scipy import stats

from robust_unlearning.errors import UserError
from robust_unlearning.stats import estimates
from robust_unlearning.stats.estimates import SMALLEST_P, Estimate, VariancePart, critical


def test_paper_example() -> None:
    assert estimates.reduction_rate(60, 30).value == 0.5
    assert estimates.recovery_rate(60, 30, 50).value == pytest.approx(0.6667, abs=5e-5)
    assert estimates.reduction_rate(0.5, 0.6).value == pytest.approx(-0.2)


@pytest.mark.parametrize("unlearned", [60, 61])
def test_rates_are_undefined_rather_than_numbers(unlearned: float) -> None:
    recovery = estimates.recovery_rate(60, unlearned, 50)
    assert recovery.value is None
    assert str(recovery).startswith("undefined (unlearning lost nothing")
    assert estimates.reduction_rate(0, 0).value is None
    with pytest.raises(UserError, match="finite"):
        estimates.reduction_rate(float("nan"), 1)


def test_accuracy_is_wilson() -> None:
    row = estimates.accuracy([True] * 8 + [False] * 2)
    assert (row.value, row.n) == (0.8, 10)
    assert row.stderr == pytest.approx(np.std([1] * 8 + [0] * 2, ddof=1) / 10**0.5)
    assert (row.low, row.high) == pytest.approx((0.4901625, 0.9433178), abs=1e-6)  # a textbook value
    for right, n, level in ((8, 10, 0.9), (0, 7, 0.95), (7, 7, 0.95), (31, 200, 0.99)):
        own = estimates.accuracy([1] * right + [0] * (n - right), level)
        theirs = stats.binomtest(right, n).proportion_ci(level, method="wilson")
        assert (own.low, own.high) == pytest.approx((theirs.low, theirs.high), abs=1e-12)
    assert estimates.accuracy([0]).stderr is None
    with pytest.raises(UserError, match="only 0 and 1"):
        estimates.accuracy([0.5])


def test_quantile_of_cochran_and_cox_by_hand() -> None:
    """t(0.975) is 4.3027 for 2 degrees of freedom and 1.9842 for 99."""
    parts = [VariancePart("seeds", 3.0, 2), VariancePart("clusters", 1.0, 99)]
    assert critical(parts, 0.95) == pytest.approx((3 * 4.302653 + 1.984217) / 4, abs=1e-6)
    assert critical(parts[:1], 0.95) == pytest.approx(4.302653, abs=1e-6)
    assert critical([VariancePart("seeds", 0.0, 2), VariancePart("clusters", 0.0, 99)], 0.95) == pytest.approx(
        1.984217, abs=1e-6
    )
    assert critical([VariancePart("seeds", 0.0, 2), VariancePart("clusters", 1.0, 99)], 0.95) == pytest.approx(
        1.984217, abs=1e-6
    )


def test_interval_and_p_are_two_sides_of_one_thing() -> None:
    parts = (VariancePart("seeds", 0.02, 3), VariancePart("clusters", 0.01, 40), VariancePart("words", 0.005, 7))
    found = Estimate(0.8, parts=parts).at(0.9)
    assert found.stderr == pytest.approx(0.035**0.5)
    assert (found.low, found.high) == found.interval(0.9)
    for level in (0.5, 0.9, 0.99):
        low, high = found.interval(level)
        assert high - 0.8 == pytest.approx(critical(parts, level) * 0.035**0.5)
        assert found.p(low) == pytest.approx(1 - level, abs=1e-6)
        assert found.p(high) == pytest.approx(1 - level, abs=1e-6)
    assert found.p(0.8) == pytest.approx(1)
    assert found.p(0.0) > found.p(-1.0)


def test_p_of_one_factor_is_the_t_test() -> None:
    values = np.random.default_rng(0).normal(0.3, 1, size=25)
    found = Estimate(values.mean(), parts=(VariancePart("clusters", values.var(ddof=1) / 25, 24),))
    for bound in (0.0, 0.2, 1.0):
        assert found.p(bound) == pytest.approx(stats.ttest_1samp(values, bound).pvalue, abs=1e-7)


def test_p_at_the_ends() -> None:
    still = Estimate(0.5, parts=(VariancePart("clusters", 0.0, 9),))
    assert (still.p(0.5), still.p(0.0)) == (1.0, SMALLEST_P)
    assert Estimate(1.0, parts=(VariancePart("clusters", 1e-12, 99),)).p() == SMALLEST_P


def test_slack_widens_the_interval_and_raises_p() -> None:
    parts = (VariancePart("clusters", 0.01, 30),)
    exact, slack = Estimate(0.5, parts=parts).at(0.95), Estimate(0.5, parts=parts, slack=0.2).at(0.95)
    assert slack.low == pytest.approx((exact.low or 0) - 0.2)
    assert slack.high == pytest.approx((exact.high or 0) + 0.2)
    assert slack.p() == pytest.approx(exact.p(0.2))
    assert slack.p(0.6) == 1.0  # as near as it may be off


def test_without_parts_an_estimate_stays_as_it_is() -> None:
    for each in (Estimate(0.5, 0.1, 0.9), Estimate(None, note="why")):
        assert each.at(0.5) == each


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: estimates.accuracy([]), "correct must be a list"),
        (lambda: estimates.accuracy([[1.0]]), "correct must be a list"),
        (lambda: estimates.columns(values=[0.0, np.nan]), "the first at index 1"),
        (lambda: estimates.columns(a=[1, 0], b=[1]), r"lengths differ \(a: 2, b: 1\)"),
        (lambda: estimates.accuracy([1, 0], 95), "0.95"),
        (lambda: Estimate(1.0, parts=(VariancePart("seeds", 1.0, 2),)).interval(0), "between 0 and 1"),
    ],
)
def test_errors(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        call()


def test_estimates_print_and_go_to_json() -> None:
    estimate = Estimate(0.51234, 0.4, 0.6, 0.05, 30)
    assert str(estimate) == "0.5123 [0.4, 0.6] (n=30)"
    plain = {"value": 0.51234, "low": 0.4, "high": 0.6, "stderr": 0.05, "n": 30}
    assert json.loads(json.dumps(estimate.as_dict())) == plain
    assert Estimate(None, note="why").as_dict()["note"] == "why"
    full = Estimate(1.0, n=30, seeds=3, clusters=7, words=2, parts=(VariancePart("seeds", math.pi, 2),))
    assert "S=3, n=30" in str(full)
    rest = {key: full.as_dict()[key] for key in ("seeds", "clusters", "words")}
    assert rest == {"seeds": 3, "clusters": 7, "words": 2}
    assert "parts" not in full.as_dict()

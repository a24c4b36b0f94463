"""Verdicts: the rule of a row, the rule of a whole claim, and what of it stands after Holm's correction."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from robust_unlearning.report.tables import Column
from robust_unlearning.reproduce.verdicts import (
    CLAIMS,
    Criterion,
    Outcome,
    complete,
    headline,
    holm_findings,
    judge,
    p_of,
    whole,
)
from robust_unlearning.stats.effects import Effect
from robust_unlearning.stats.estimates import Estimate, VariancePart
from robust_unlearning.stats.factors import Groups
from robust_unlearning.stats.format import POINTS

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    ("rule", "low", "high", "finding"),
    [
        (Criterion("above"), 0.1, 0.3, "holds"),
        (Criterion("above"), -0.1, 0.3, "inconclusive"),
        (Criterion("above"), -0.3, -0.1, "does not hold"),
        (Criterion("above"), 0.0, 0.0, "inconclusive"),
        (Criterion("below"), -0.3, -0.1, "holds"),
        (Criterion("below"), 0.1, 0.3, "does not hold"),
        (Criterion("below", 0.1), 0.02, 0.05, "holds"),
        (Criterion("below", 0.1), 0.02, 0.15, "inconclusive"),
        (Criterion("within", 0.05), -0.04, 0.04, "holds"),
        (Criterion("within", 0.05), -0.04, 0.06, "inconclusive"),
        (Criterion("within", 0.05), 0.06, 0.09, "does not hold"),
        (Criterion("within", 0.05), -0.09, -0.06, "does not hold"),
        (Criterion("zero"), -0.1, 0.1, "inconclusive"),
        (Criterion("zero"), 0.1, 0.2, "does not hold"),
    ],
)
def test_a_verdict_rests_on_the_interval(rule: Criterion, low: float, high: float, finding: str) -> None:
    estimate = Estimate((low + high) / 2, low, high)
    assert judge(rule, estimate) == finding
    decided = finding != "inconclusive" and high > low
    assert (p_of(rule, estimate) < 0.05) == decided  # the p-value says the same as the interval


def test_a_point_decides_nothing() -> None:
    assert judge(Criterion("above"), Estimate(5.0)) == "inconclusive"
    assert judge(Criterion("above"), None) == "not run"
    assert p_of(Criterion("above"), Estimate(5.0)) == 1


def _t(value: float, error: float, df: int) -> Estimate:
    return Estimate(value, n=df + 1, parts=(VariancePart("clusters", error**2, df),)).at(0.95)


def test_p_values_are_those_of_a_t_test() -> None:
    for rule, estimate, bound in (
        (Criterion("above"), _t(0.3, 0.1, 7), 0.0),
        (Criterion("below", 0.1), _t(0.3, 0.1, 7), 0.1),
        (Criterion("within", 0.05), _t(0.3, 0.1, 7), 0.05),
        (Criterion("within", 0.5), _t(0.3, 0.1, 7), 0.5),
    ):
        t = abs((estimate.value or 0) - bound) / 0.1
        assert p_of(rule, estimate) == pytest.approx(2 * stats.t.sf(t, 7), rel=1e-6)


def _rows(claim: str, *values: float, error: float = 0.02, seeds: int | None = 5) -> list[Outcome]:
    """Rows of a claim whose estimates are t intervals with 30 degrees of freedom."""
    parts = (VariancePart("clusters", error**2, 30),)
    return [Outcome(claim, str(value), Estimate(value, n=31, seeds=seeds, parts=parts).at(0.95)) for value in values]


def _whole(claim: str, *values: float, **about: float) -> str:
    rows = [each for each in complete(_rows(claim, *values, **about)) if each.claim == claim]  # type: ignore[arg-type]
    return whole(rows).finding


def test_a_claim_on_average_is_judged_by_the_mean_of_its_rows() -> None:
    assert _whole("recovers", 0.1, 0.1, 0.1) == "holds"
    assert _whole("recovers", 0.1, 0.0, 0.1) == "holds"  # one row that decides nothing
    assert _whole("recovers", -0.1, -0.1, 0.0) == "does not hold"
    assert _whole("recovers", 0.01, -0.01, 0.0) == "inconclusive"
    assert _whole("recovers", 0.3, 0.3, -0.2) == "mixed"
    assert _whole("recovers", 0.3, -0.05, 0.0, 0.0) == "holds"  # one fails by its own interval, but not after Holm
    assert judge(Criterion("above"), _rows("recovers", -0.05)[0].estimate) == "does not hold"
    assert _whole("keeps-forgetting", 0.3, -0.3, error=0.001) == "does not hold"  # unlike, though 0 on average
    assert whole([Outcome("fragile")]).finding == "not run"


def test_a_claim_on_every_case_fails_by_one_row() -> None:
    assert CLAIMS["rejection"].every
    assert _whole("rejection", 0.0, 0.01, 0.0) == "holds"
    assert _whole("rejection", 0.0, 0.4, 0.0) == "does not hold"
    assert _whole("rejection", 0.0, 0.09, 0.0) == "inconclusive"
    assert _whole("closed-form", 0.0, 0.0) == "inconclusive"
    assert _whole("closed-form", 0.0, 0.2) == "does not hold"


def test_holm_leaves_what_stands() -> None:
    rows = _rows("recovers", 0.2, 0.045, -0.2, 0.0)
    assert [each.finding for each in rows] == ["holds", "holds", "does not hold", "inconclusive"]
    assert holm_findings(rows) == ["holds", "inconclusive", "does not hold", "inconclusive"]


def test_rows_on_the_same_questions_are_pooled_question_by_question() -> None:
    rng = np.random.default_rng(0)
    tables = rng.normal(0.1, 0.2, (2, 4, 30))
    clusters = np.repeat(np.arange(10), 3)
    rows = [Outcome("recovers", str(index), Effect(dict(enumerate(table)), Groups(clusters)))
            for index, table in enumerate(tables)]  # fmt: skip
    pooled, *_ = (each for each in complete(rows) if each.claim == "recovers")
    assert pooled.whole
    assert pooled.estimate == Effect(dict(enumerate(tables.mean(axis=0))), Groups(clusters)).estimate()


def test_rows_of_unknown_dependence_are_pooled_by_the_mean_of_their_ends() -> None:
    pooled, *_ = (each for each in complete(_rows("recovers", 0.1, 0.3)) if each.claim == "recovers")
    half = stats.t.ppf(0.975, 30) * 0.02
    assert pooled.estimate is not None
    assert (pooled.estimate.low, pooled.estimate.high) == pytest.approx((0.2 - half, 0.2 + half))


def _undecided(count: int) -> list[Outcome]:
    estimate = Estimate(-9.0, -9.1, -8.9)
    return [Outcome("recovers", f"x{index}", estimate, undecided="no forgetting") for index in range(count)]


def test_undecided_rows_are_left_out_of_the_mean() -> None:
    rows = [*_rows("recovers", 0.1, 0.1), *_undecided(1)]
    pooled, *_ = (each for each in complete(rows) if each.claim == "recovers")
    assert pooled.of == "mean of 2 of 3 rows"
    assert pooled.estimate is not None
    assert pooled.estimate.value == pytest.approx(0.1)
    assert (pooled.finding, pooled.undecided) == ("holds", "")
    of_claim = [each for each in complete(rows) if each.claim == "recovers"]
    assert whole(of_claim).note.startswith("mean of 2 of 3 rows: +10.0 [")


@pytest.mark.parametrize(
    ("decided", "undecided", "finding"), [(1, 1, "holds"), (2, 2, "holds"), (1, 2, "inconclusive")]
)
def test_where_fewer_than_half_of_the_rows_decide_so_does_not_their_mean(
    decided: int, undecided: int, finding: str
) -> None:
    rows = [*_rows("recovers", *[0.1] * decided), *_undecided(undecided)]
    of_claim = [each for each in complete(rows) if each.claim == "recovers"]
    pooled, total = of_claim[0], decided + undecided
    assert (pooled.whole, pooled.of, pooled.finding) == (True, f"mean of {decided} of {total} rows", finding)
    assert ("fewer than half of the" in pooled.undecided) == (finding == "inconclusive")
    assert whole(of_claim).finding == finding


def test_rows_without_an_interval_are_left_out_of_the_mean() -> None:
    points = [Outcome("recovers", "one question", Estimate(0.4, n=1, seeds=5))]
    pooled, *_ = (each for each in complete([*_rows("recovers", 0.1, 0.1), *points]) if each.claim == "recovers")
    assert (pooled.of, pooled.finding) == ("mean of 2 of 3 rows", "holds")
    assert pooled.estimate is not None
    assert pooled.estimate.value == pytest.approx(0.1)
    assert not any(each.whole for each in complete(points * 2))


def test_with_few_seeds_a_verdict_is_of_these_models() -> None:
    few = whole([each for each in complete(_rows("recovers", 0.1, 0.1, seeds=2)) if each.claim == "recovers"])
    assert (few.finding, few.label) == ("holds", "holds, of these models")
    many = whole([each for each in complete(_rows("recovers", 0.1, 0.1, seeds=3)) if each.claim == "recovers"])
    assert many.label == "holds"
    unsure = whole([each for each in complete(_rows("recovers", 0.0, 0.0, seeds=1)) if each.claim == "recovers"])
    assert unsure.label == "inconclusive"
    one = [*_rows("recovers", 0.1, 0.1, seeds=3), *_rows("recovers", 0.1, seeds=2)]  # one row makes it so
    assert whole([each for each in complete(one) if each.claim == "recovers"]).label == "holds, of these models"


def test_the_headline_counts_apart_what_is_said_of_these_models() -> None:
    rows = [
        *_rows("recovers", 0.1, 0.1, seeds=2),
        *_rows("fragile", -0.1),
        *_rows("related", -0.1, seeds=1),
        *_rows("coefficient", -0.3, 0.3),
        *_rows("ngrams", 0.0),
    ]
    text = headline(complete(rows))
    assert "1 hold and 1 more of these models, 0 do not hold and 1 more of these models" in text
    assert "1 are mixed, 1 are inconclusive" in text
    assert f"{len(CLAIMS) - 5} were not run" in text


def test_a_cell_says_what_it_rests_on() -> None:
    column = Column("here", POINTS, sized=True)
    assert column.cell(Estimate(0.5, 0.25, 0.75, n=8, seeds=2)) == "+50.0 [+25.0, +75.0] (2 seeds, n=8)"

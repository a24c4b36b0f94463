"""Means and shares over questions, documents and seeds, against SciPy, root-finding and Wilson's formula."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import references
from scipy import stats

from robust_unlearning.errors import UserError
from robust_unlearning.stats.estimates import accuracy
from robust_unlearning.stats.factors import NO_INTERVAL, Groups
from robust_unlearning.stats.means import (
    OF_THESE,
    mean_interval,
    nats_per_token,
    of_answers,
    over_seeds,
    paired_difference,
    share_over_seeds,
)

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("values", [RNG.normal(size=200), RNG.integers(0, 2, size=200).astype(float)])
def test_mean_interval(values: Any) -> None:
    for level in (0.5, 0.95):
        found = mean_interval(values, level=level)
        theirs = stats.ttest_1samp(values, 0).confidence_interval(level)
        assert (found.low, found.high) == pytest.approx((theirs.low, theirs.high))
    assert (found.value, found.stderr) == (pytest.approx(values.mean()), pytest.approx(stats.sem(values)))
    assert (found.n, found.seeds, found.note) == (200, None, "")


def test_mean_interval_over_clusters() -> None:
    values, labels = RNG.normal(size=30), [index // 3 for index in range(30)]
    found = mean_interval(values, Groups(labels))
    assert (found.low, found.high) == pytest.approx(
        references.interval(values.mean(), [(references.clustered(values.tolist(), labels), 9)])
    )
    means = values.reshape(10, 3).mean(axis=1)  # clusters of one size: the t interval of their means
    theirs = stats.ttest_1samp(means, 0).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((theirs.low, theirs.high))


def test_paired_difference() -> None:
    base = RNG.random(300) < 0.5
    same = paired_difference(base, base)
    assert (same.low, same.high) == (0, 0)
    other = RNG.permutation(base)
    theirs = stats.ttest_rel(base.astype(float), other.astype(float)).confidence_interval(0.95)
    found = paired_difference(base, other)
    assert (found.low, found.high) == pytest.approx((theirs.low, theirs.high))


def test_nats_per_token_weights_documents_by_tokens() -> None:
    tokens = RNG.integers(5, 200, size=40)
    nats = tokens * RNG.normal(3, 0.4, size=40)
    found = nats_per_token([*nats, 0.0], [*tokens, 0])  # a document without tokens plays no part
    assert found.value == pytest.approx(nats.sum() / tokens.sum())
    assert (found.n, found.seeds) == (40, None)
    ends = references.fieller(nats[None], tokens[None].astype(float), lambda rest: references.parts_of(rest.tolist()))
    assert [found.low, found.high] == pytest.approx(ends, abs=1e-9)
    residual = nats - found.value * tokens
    assert found.stderr == pytest.approx((40 / 39 * (residual**2).sum()) ** 0.5 / tokens.sum())
    with pytest.raises(UserError, match="no document has a token"):
        nats_per_token([0.0], [0])


def test_over_seeds() -> None:
    table = RNG.normal(0, 1, size=(4, 1)) + RNG.normal(0, 1, size=(1, 50)) + RNG.normal(0, 0.1, (4, 50))
    found = over_seeds(table)
    assert found.value == pytest.approx(table.mean())
    assert "S=4, n=50" in str(found)
    seeds, questions = table.mean(axis=1).var(ddof=1) / 4, table.mean(axis=0).var(ddof=1) / 50
    assert found.stderr == pytest.approx((seeds + questions) ** 0.5)
    assert (found.low, found.high) == pytest.approx(references.interval(table.mean(), [(seeds, 3), (questions, 49)]))
    assert found.note == ""


@pytest.mark.parametrize("seeds", [1, 2])
def test_fewer_seeds_than_three_are_these_models(seeds: int) -> None:
    table = RNG.normal(size=(seeds, 50)) + RNG.normal(0, 9, size=(seeds, 1))
    found = over_seeds(table)
    theirs = stats.ttest_1samp(table.mean(axis=0), 0).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((theirs.low, theirs.high))
    assert (found.note, found.seeds) == (OF_THESE, seeds)


def test_one_value_has_no_interval() -> None:
    found = mean_interval([0.5])
    assert (found.value, found.low, found.stderr, found.note) == (0.5, None, None, NO_INTERVAL)
    assert share_over_seeds([[1.0], [1.0]]).low is None


def test_a_share_of_one_row_is_its_accuracy() -> None:
    right = (RNG.random(60) < 0.8).astype(float)
    found, plain = share_over_seeds([right], level=0.9), accuracy(right, 0.9)
    assert (found.low, found.high, found.stderr, found.seeds) == (plain.low, plain.high, plain.stderr, 1)
    assert share_over_seeds([[0.0] * 4]).high == accuracy([0] * 4).high


def test_a_share_over_seeds_is_wilsons_of_as_many_answers_as_the_variance_is_worth() -> None:
    table = (RNG.random((4, 30)) < 0.7).astype(float)
    labels = [index // 2 for index in range(30)]
    found = share_over_seeds(table, Groups(labels))
    parts = references.parts_of(table.tolist(), labels)
    share, t = table.mean(), references.quantile(parts)
    n = share * (1 - share) / sum(variance for variance, _ in parts)
    for end in (found.low, found.high):  # Wilson's ends solve (p - x)² = t² x (1 - x) / n
        assert end is not None
        assert (share - end) ** 2 == pytest.approx(t**2 * end * (1 - end) / n)
    assert found.low is not None
    assert found.low < share < (found.high or 0)


def test_a_share_at_the_ceiling_counts_clusters() -> None:
    labels = [index // 3 for index in range(12)]
    found = share_over_seeds([[1.0] * 12] * 2, Groups(labels))
    t = stats.t.ppf(0.975, 3)
    assert (found.value, found.high) == (1.0, 1.0)
    assert found.low == pytest.approx(4 / (4 + t**2))
    plain = share_over_seeds([[1.0] * 12] * 2)
    assert plain.low == pytest.approx(12 / (12 + stats.t.ppf(0.975, 11) ** 2))


def test_a_share_of_what_is_neither_right_nor_wrong_is_a_mean_over_questions() -> None:
    """Answers to a question that was asked several times are averaged; one row of such is no list of answers."""
    values = np.array([0.5, 1.0, 0.0, 0.5, 1.0, 1.0])
    found, t = share_over_seeds([values]), stats.t.ppf(0.975, 5)
    p, n = values.mean(), values.mean() * (1 - values.mean()) / (values.var(ddof=1) / 6)
    for end in (found.low, found.high):
        assert end is not None
        assert (p - end) ** 2 == pytest.approx(t**2 * end * (1 - end) / n)
    assert (found.seeds, found.note) == (1, OF_THESE)


def level_that_reaches(difference: Any, bound: float) -> float:
    """1 less the level at which the interval of an estimate's parts just reaches `bound`, by bisection."""
    below, above = 0.0, 1.0
    for _ in range(60):
        level = (below + above) / 2
        half = references.quantile([(part.variance, part.df) for part in difference.parts], level)
        half *= sum(part.variance for part in difference.parts) ** 0.5
        below, above = (level, above) if half < abs(difference.value - bound) else (below, level)
    return 1 - below


@pytest.mark.parametrize("lost", [1, 3, 5, 12])
@pytest.mark.parametrize("clusters", [False, True])
def test_of_few_changed_answers_half_an_answer_more_in_each_cell_is_counted(lost: int, clusters: bool) -> None:
    """2/(m+2)² is added to the variance of the part with most degrees of freedom; p and interval say the same."""
    change = np.zeros((3, 40))
    change[:, :lost] = -1
    change[1:, lost] = -1  # one seed still knows it
    labels = [index // 2 for index in range(40)] if clusters else None
    count = 20 if clusters else 40
    plain = over_seeds(change, Groups(labels))
    found = of_answers(plain, change.mean(axis=0))
    seeds, questions = references.parts_of(change.tolist(), labels)
    worth = np.clip(change.mean(axis=0).var(ddof=1) / questions[0], count, 40)
    parts = [seeds, (questions[0] + 2 / (worth + 2) ** 2, questions[1])]
    assert [(part.variance, part.df) for part in found.parts] == [(pytest.approx(v), df) for v, df in parts]
    assert (found.low, found.high) == pytest.approx(references.interval(change.mean(), parts))
    assert found.stderr == pytest.approx(sum(variance for variance, _ in parts) ** 0.5)
    assert found.p() == pytest.approx(level_that_reaches(found, 0.0), abs=1e-6)
    assert (found.p() < 0.05) == ((found.high or 0) < 0)
    assert found.p() > plain.p()


def test_answers_that_vary_by_clusters_are_worth_as_many_as_these() -> None:
    """Whole clusters lost: m is their number, and not that of the questions."""
    change = -np.repeat([1.0, 1, 0, 0, 0, 0, 0, 0, 0, 0], 4)
    plain = mean_interval(change, Groups(np.repeat(np.arange(10), 4)))
    found = of_answers(plain, change)
    assert found.spread**2 - plain.spread**2 == pytest.approx(
        2 / (np.clip(change.var(ddof=1) / plain.spread**2, 10, 40) + 2) ** 2
    )
    assert change.var(ddof=1) / plain.spread**2 < 11


@pytest.mark.parametrize("alike", [0.0, -1.0, 1.0])
@pytest.mark.parametrize("level", [0.8, 0.95])
def test_where_all_answers_changed_alike_the_interval_is_wilsons(alike: float, level: float) -> None:
    found = of_answers(over_seeds(np.full((3, 24), alike), level=level), np.full(24, alike), level)
    t = stats.t.ppf((1 + level) / 2, 23)
    most = t**2 / (24 + t**2)
    assert (found.low, found.high) == pytest.approx((max(-1, alike - most), min(1, alike + most)))
    assert found.stderr == pytest.approx(most / t)
    assert found.p() == (1 if not alike else pytest.approx(2 * stats.t.sf(t / most, 23), abs=1e-8))
    assert found.p(alike + most) == pytest.approx(1 - level)  # the interval ends where p says


def test_what_has_no_interval_stays_as_it_is() -> None:
    alone = mean_interval([1.0])
    assert of_answers(alone, [1.0]) == alone


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: mean_interval([]), "values must be a list"),
        (lambda: mean_interval([[1.0]]), "values must be a list"),
        (lambda: mean_interval([0.0, np.nan]), "the first at index 1"),
        (lambda: paired_difference([1, 0], [1]), r"lengths differ \(a: 2, b: 1\)"),
        (lambda: mean_interval([1, 2], level=95), "0.95"),
        (lambda: mean_interval([1, 2], Groups(["a"])), "1 labels for 2 questions"),
        (lambda: over_seeds([1.0, 2.0]), "shape"),
    ],
)
def test_errors(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        call()

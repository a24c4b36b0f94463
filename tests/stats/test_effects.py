"""Effects question by question and seed by seed, their mean, and the mean of what hangs together in an unknown way."""

from __future__ import annotations

import numpy as np
import pytest
import references
from scipy import stats

from robust_unlearning.stats.effects import Effect, mean_effect, mean_of_ends
from robust_unlearning.stats.estimates import Estimate
from robust_unlearning.stats.factors import Groups
from robust_unlearning.stats.means import OF_THESE, over_seeds

RNG = np.random.default_rng(0)
ROWS = {seed: RNG.normal(0.2, 1, size=24) for seed in (4, 1, 7)}
LABELS = [index // 2 for index in range(24)]


def test_an_effect_is_its_mean_over_seeds() -> None:
    effect = Effect(ROWS, Groups(LABELS))
    assert effect.estimate() == over_seeds(list(ROWS.values()), Groups(LABELS))
    assert effect.estimate().seeds == 3
    assert OF_THESE in Effect({1: ROWS[1]}).estimate().note


def test_a_place_adds_its_variance_and_slack_its_width() -> None:
    place = RNG.normal(size=15)
    place -= place.mean()
    about = [index // 3 for index in range(15)]
    found = Effect(ROWS, Groups(LABELS), place, Groups(about), slack=0.05).estimate()
    table = [row.tolist() for row in ROWS.values()]
    parts = [*references.parts_of(table, LABELS), (references.clustered(place.tolist(), about), 4)]
    low, high = references.interval(np.mean(table), parts)
    assert (found.low, found.high) == pytest.approx((low - 0.05, high + 0.05))
    assert found.stderr == pytest.approx(sum(variance for variance, _ in parts) ** 0.5)
    assert (found.n, found.value) == (24, pytest.approx(np.mean(table)))


def test_the_mean_of_effects_is_over_those_that_have_a_seed() -> None:
    place = np.array([1.0, -1.0])
    one, two = (
        Effect({1: ROWS[1], 4: ROWS[4]}, Groups(LABELS), place, slack=0.1),
        Effect({4: ROWS[7]}, Groups(LABELS), slack=0.3),
    )
    mean = mean_effect([one, two])
    assert mean is not None
    assert list(mean.by_seed) == [1, 4]
    assert mean.by_seed[1] == pytest.approx(ROWS[1])
    assert mean.by_seed[4] == pytest.approx((ROWS[4] + ROWS[7]) / 2)
    assert (mean.groups, mean.slack) == (Groups(LABELS), pytest.approx(0.2))
    assert mean.place == pytest.approx(place)
    assert mean_effect([one, Effect({1: ROWS[1]})]) is None  # the same number of questions, and others
    assert mean_effect([one, Effect({1: ROWS[1][:5]})]) is None
    assert mean_effect([]) is None


def test_answers_without_a_difference_may_differ_elsewhere() -> None:
    """Wilson's upper end of 0 of 24: t² / (24 + t²)."""
    none = {seed: np.zeros(24) for seed in (1, 2, 3)}
    t = stats.t.ppf(0.975, 23)
    found = Effect(none, answers=True).estimate()
    assert (found.low, found.high) == (pytest.approx(-(t**2) / (24 + t**2)), pytest.approx(t**2 / (24 + t**2)))
    assert Effect(none).estimate().high == 0
    both = mean_effect([Effect(none, answers=True), Effect(none)])
    assert both is not None
    assert not both.answers


def test_mean_of_ends() -> None:
    estimates = [Estimate(1.0, 0.0, 3.0, n=40, seeds=3), Estimate(2.0, 1.0, 4.0, n=20, seeds=5)]
    found = mean_of_ends(estimates)
    assert found is not None
    assert (found.value, found.low, found.high, found.n, found.seeds) == (1.5, 0.5, 3.5, 20, 3)
    assert mean_of_ends([*estimates, Estimate(1.0)]) is None
    assert mean_of_ends([]) is None

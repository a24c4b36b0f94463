"""Effects question by question and seed by seed, their mean, and the mean of what hangs together in an unknown way."""

from __future__ import annotations

import numpy as np
import pytest
import references
from scipy import stats

from robust_unlearning.stats.effects import Effect, mean_effect, mean_of_ends
from robust_unlearning.stats.estimates import Estimate
from robust_unlearning.stats.factors import Groups
from robust_unlearning.stats.means import OF_THESE, of_answers, over_seeds

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


def test_with_few_seeds_in_common_each_effect_stands_for_itself_and_the_whole_for_one_seed() -> None:
    """Methods are no seeds: what one method's models say at a seed must not count as another seed of the mean."""
    place = np.array([1.0, -1.0])
    one, two = (
        Effect({1: ROWS[1], 4: ROWS[4]}, Groups(LABELS), place, slack=0.1),
        Effect({4: ROWS[7]}, Groups(LABELS), slack=0.3),
    )
    mean = mean_effect([one, two])
    assert mean is not None
    (row,) = mean.by_seed.values()
    assert row == pytest.approx(((ROWS[1] + ROWS[4]) / 2 + ROWS[7]) / 2)
    assert (mean.groups, mean.slack) == (Groups(LABELS), pytest.approx(0.2))
    assert mean.place == pytest.approx(place)
    assert (mean.estimate().seeds, OF_THESE in mean.estimate().note) == (1, True)
    apart = mean_effect([Effect({seed: ROWS[seed]}) for seed in (1, 4, 7)])  # three methods, of one seed each
    assert apart is not None
    assert apart.estimate().seeds == 1
    assert apart.estimate().value == pytest.approx(np.mean([ROWS[seed] for seed in (1, 4, 7)]))
    assert mean_effect([one, Effect({1: ROWS[1]})]) is None  # the same number of questions, and others
    assert mean_effect([one, Effect({1: ROWS[1][:5]})]) is None
    assert mean_effect([]) is None


def test_with_three_seeds_in_common_the_mean_is_over_those() -> None:
    more = {seed: 2 * row for seed, row in ROWS.items()} | {9: RNG.normal(size=24)}
    mean = mean_effect([Effect(ROWS, Groups(LABELS)), Effect(more, Groups(LABELS))])
    assert mean is not None
    assert sorted(mean.by_seed) == [1, 4, 7]
    for seed, row in ROWS.items():
        assert mean.by_seed[seed] == pytest.approx(1.5 * row)
    assert mean.estimate().seeds == 3
    assert OF_THESE not in mean.estimate().note


def test_answers_without_a_difference_may_differ_elsewhere() -> None:
    """Wilson's upper end of 0 of 24: t² / (24 + t²)."""
    none = {seed: np.zeros(24) for seed in (1, 2, 3)}
    t = stats.t.ppf(0.975, 23)
    found = Effect(none, answers=True).estimate()
    assert (found.low, found.high) == (pytest.approx(-(t**2) / (24 + t**2)), pytest.approx(t**2 / (24 + t**2)))
    assert Effect(none).estimate().high == 0
    few = {seed: row.copy() for seed, row in none.items()}
    few[2][0] = 1.0
    assert Effect(few, answers=True).estimate() == of_answers(
        over_seeds(list(few.values())), np.mean(list(few.values()), axis=0)
    )
    assert (Effect(few, answers=True).estimate().low or 0) < (Effect(few).estimate().low or 0)
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


def test_slack_widens_the_interval_without_a_place_too() -> None:
    plain, wider = Effect(ROWS, Groups(LABELS)).estimate(), Effect(ROWS, Groups(LABELS), slack=0.05).estimate()
    assert plain.low is not None
    assert plain.high is not None
    assert (wider.low, wider.high) == pytest.approx((plain.low - 0.05, plain.high + 0.05))
    assert wider.p() >= plain.p()

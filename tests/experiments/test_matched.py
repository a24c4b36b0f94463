"""Like forgetting: which models are matched, what the curve gives, and that one curve for both gives nothing."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from scipy.interpolate import PchipInterpolator

from robust_unlearning.experiments.matched import compare_lines, effect_of, match, rising
from robust_unlearning.results.measures import Asked, Measured, Perturbed, excess, forgetting
from robust_unlearning.stats.estimates import Array
from robust_unlearning.stats.factors import Groups

pytestmark = pytest.mark.unit
FORGET, HARM = 96, 192


def _line(forgotten: list[float], harms: list[float], of: tuple[Array, Array]) -> list[tuple[Array, Array]]:
    """Models whose means are given; questions differ by factors, the same in every model."""
    return [(value * of[0], harm * of[1]) for value, harm in zip(forgotten, harms, strict=True)]


def _questions(seed: int) -> tuple[Array, Array]:
    rng = np.random.default_rng(seed)
    factors = [rng.uniform(0.5, 1.5, size) for size in (FORGET, HARM)]
    forget, harm = (each / each.mean() for each in factors)
    return forget, harm


def test_only_those_count_that_have_forgotten_more_than_all_before() -> None:
    assert rising([0.0, 0.2, 0.1, 0.5, 0.5, 0.9]) == [0, 1, 3, 5]


def test_a_match_is_the_monotone_curve_at_the_models_own_forgetting() -> None:
    x, y, of = [0.0, 0.3, 0.7, 1.0], [0.0, -0.1, -0.6, -0.7], _questions(0)
    found = match((np.full(FORGET, 0.5), np.full(HARM, -0.2)), _line(x, y, of))
    assert found is not None
    height = float(PchipInterpolator(x, y)(0.5))
    assert found.at == pytest.approx(0.5)
    assert found.difference.mean() == pytest.approx(-0.2 - height, abs=1e-7)
    assert found.slack == pytest.approx(max(abs(height - y[1]), abs(height - y[2])), abs=1e-7)
    assert found.place.mean() == pytest.approx(0, abs=1e-12)
    # other questions: the curve through their means, to first order
    drawn = np.random.default_rng(1).integers(HARM, size=HARM)
    means = [float(harm[drawn].mean()) for _, harm in _line(x, y, of)]
    moved = float(PchipInterpolator(x, means)(0.5))
    assert found.difference[drawn].mean() == pytest.approx(-0.2 - moved, abs=1e-6)


@pytest.mark.parametrize("last", [-0.3, -0.6, -0.6000001, -0.62, -0.9])
@pytest.mark.parametrize("at", [0.35, 0.55, 0.8, 0.95])
def test_the_curve_is_pchip_also_where_it_lies_flat_or_turns(last: float, at: float) -> None:
    """In height; question by question it is a mean of the two neighbours, whose weights lie between 0 and 1."""
    x, y, of = [0.0, 0.3, 0.7, 1.0], [0.0, -0.1, -0.6, last], _questions(0)
    harms = np.array(y)[:, None] + np.random.default_rng(2).normal(size=(4, 12))
    harms += np.array(y)[:, None] - harms.mean(axis=1, keepdims=True)
    found = match((np.full(FORGET, at), np.zeros(12)), list(zip(np.outer(x, of[0]), harms, strict=True)))
    assert found is not None
    height = float(PchipInterpolator(x, y)(at))
    assert found.difference.mean() == pytest.approx(-height)
    before, behind = harms[np.searchsorted(x, at) - 1], harms[np.searchsorted(x, at)]
    weight = np.polyfit(behind - before, -found.difference - before, 1)
    assert weight[1] == pytest.approx(0, abs=1e-9)
    assert -1e-9 <= weight[0] <= 1 + 1e-9
    assert found.slack == pytest.approx(max(abs(height - before.mean()), abs(height - behind.mean())))


@pytest.mark.parametrize(
    ("wanted", "there"),
    [(0.29, False), (0.31, True), (0.9, True), (0.99, True), (1.01, False), (1.3, False)],
)
def test_there_is_no_match_without_neighbours_on_both_sides(wanted: float, there: bool) -> None:
    line = _line([0.0, 0.5, 1.0, 1.9], [0.0, -0.1, -0.2, -0.4], _questions(0))
    found = match((np.full(FORGET, wanted), np.zeros(HARM)), line)
    assert (found is not None) == there  # above 1.0 the next snapshot lies 0.9 nats away


CURVES: dict[str, Callable[[Array], Array]] = {
    "-f²": lambda f: -(f**2),
    "-√f": lambda f: -np.sqrt(f),
    "straight": lambda f: -0.6 * f,
    "sigmoid": lambda f: -1 / (1 + np.exp(-6 * (f - 1))),
    "kinked": lambda f: -np.maximum(0.0, f - 0.8),
    "steep": lambda f: -1 / (1 + np.exp(-12 * (f - 0.7))),
}
SNAPSHOTS = {
    "dense": np.arange(30, 101, 10),
    "a gap": np.array([30, 40, 50, 60, 70, 80, 100]),
    "few": np.array([50, 70, 85, 100]),
}


@pytest.mark.parametrize("curve", CURVES)
@pytest.mark.parametrize("seeds", [1, 3, 5])
@pytest.mark.parametrize("speed", [0.7, 0.9])
@pytest.mark.parametrize("snapshots", SNAPSHOTS)
def test_one_curve_for_both_gives_nothing(curve: str, seeds: int, speed: float, snapshots: str) -> None:
    """With noise that only slows: the same harm at the same forgetting, in whatever way harm follows from it."""
    found, steps, widest = {}, SNAPSHOTS[snapshots], 0.0
    for seed in range(seeds):
        of, rng = _questions(seed), np.random.default_rng([seed, 1])
        plain, rna = (
            np.sort(2.2 / (1 + np.exp(-(steps * slower * rng.normal(1, 0.02, len(steps)) - 55) / 8)))
            for slower in (1.0, speed)
        )
        x = np.concatenate([[0.0], plain])
        harms = CURVES[curve](x)
        line = _line(list(x), list(harms), of)
        models = _line(list(rna), list(CURVES[curve](rna)), of)
        found[seed] = [each for model in models if (each := match(model, line))]
        for each in found[seed]:  # a monotone curve lies between the neighbours' harms, so this is the bound
            after = int(np.searchsorted(x, each.at))
            between = float(abs(harms[after] - harms[after - 1]))
            assert abs(each.difference.mean()) <= each.slack + 1e-9
            assert between / 2 - 1e-6 <= each.slack <= between + 1e-6
            widest = max(widest, between)
    effect = effect_of(found, Groups(np.repeat(np.arange(64), 3)), Groups(np.repeat(np.arange(32), 3)))
    assert effect is not None
    estimate = effect.estimate()
    assert estimate.low is not None
    assert estimate.high is not None
    assert estimate.low <= 0 <= estimate.high
    assert abs(estimate.value or 0.0) <= widest


@pytest.mark.parametrize(("apart", "is_found"), [(0.05, True), (0.3, False)])
def test_an_effect_compare_lines_is_found_between_near_snapshots(apart: float, is_found: bool) -> None:
    """Where harm changes by more than the effect from one snapshot to the next, it may be none."""
    found = {}
    for seed in range(3):
        of, x = _questions(seed), list(np.arange(0.0, 1.51, apart))
        line = _line(x, [-(each**2) for each in x], of)
        rna = [(each * of[0], -(each**2) * of[1] + 0.2) for each in (0.51, 1.01)]
        found[seed] = [each for model in rna if (each := match(model, line))]
        assert len(found[seed]) == 2
    effect = effect_of(found, Groups(), Groups())
    assert effect is not None
    assert effect.estimate().value == pytest.approx(0.2, abs=0.01)
    assert ((effect.estimate().low or 0.0) > 0.1) == is_found
    assert effect.estimate().slack == pytest.approx(np.mean([each.slack for each in found[0]]))
    assert effect_of({0: []}, Groups(), Groups()) is None


def test_forgetting_is_counted_from_the_base() -> None:
    """A base that never knew the answers has forgotten nothing, and neither has what was made of it."""

    def model(logp: float, harm: float) -> Measured:
        ones = np.ones(6)
        alone = np.arange(6.0)
        asked = Asked(alone, alone, alone, alone, alone, np.zeros(0), alone, np.zeros(0))
        places = {"option": Perturbed(ones, ones, harm * ones)}
        return Measured(ones, logp * ones, ones, ones, ones, places, np.zeros(0), asked)

    base = model(-1.23, 0.0)
    plain = [model(-1.43, -0.1), model(-1.73, -0.2), model(-2.0, -0.3)]
    assert compare_lines({0: [([model(-1.5, 0.0)], plain)]}, base, excess) == (
        None,
        [],
    )  # 0.27, though −log p is 1.5
    effect, at = compare_lines({0: [([model(-1.83, 0.0)], plain)]}, base, excess)
    assert effect is not None
    assert at == [pytest.approx(0.6)]
    assert forgetting.over([plain[0]], base).value == pytest.approx(0.2)

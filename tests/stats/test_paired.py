"""Paired tests, Holm's correction and bootstraps over seeds against counting by hand, plain NumPy and simulation."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from itertools import product
from typing import Any

import numpy as np
import pytest

from robust_unlearning.errors import UserError
from robust_unlearning.stats import estimates, paired


def answers(both: int, lost: int, won: int, neither: int = 0) -> tuple[Any, Any]:
    """Right and wrong answers of a reference and a model with these counts."""
    counts = [both, lost, won, neither]
    return np.repeat([1, 1, 0, 0], counts), np.repeat([1, 0, 1, 0], counts)


@pytest.mark.parametrize(
    ("lost", "won", "p"),
    [
        (5, 1, 14 / 64),  # 2 (1 + 6) / 2^6
        (1, 5, 14 / 64),
        (10, 0, 2 / 1024),
        (3, 0, 1 / 4),
        (8, 2, 112 / 1024),  # 2 (1 + 10 + 45) / 2^10
        (4, 4, 1),
        (0, 0, 1),
        (0, 1, 1),
    ],
)
def test_mcnemar_by_hand(lost: int, won: int, p: float) -> None:
    test = paired.mcnemar(*answers(20, lost, won, 7))
    assert (test.lost, test.won, test.name) == (lost, won, paired.MCNEMAR)
    assert test.p == pytest.approx(p, rel=1e-12)


def test_mcnemar_is_exact_where_powers_of_two_are_beyond_floats() -> None:
    for lost, won in ((640, 560), (1100, 100)):
        tail = sum(math.comb(lost + won, k) for k in range(min(lost, won) + 1))
        exact = float(Fraction(2 * tail, 2 ** (lost + won)))
        assert paired.mcnemar(*answers(1000, lost, won)).p == pytest.approx(exact, rel=1e-9)


def test_mcnemar_keeps_its_level() -> None:
    rng = np.random.default_rng(0)
    found = [paired.mcnemar(*rng.integers(0, 2, size=(2, 60))).p for _ in range(1000)]
    for level in (0.01, 0.05, 0.2):
        assert np.mean(np.array(found) <= level) <= level + 3 * (level / 1000) ** 0.5


def test_sign_flips_by_trying_every_flip() -> None:
    rng = np.random.default_rng(1)
    for seeds_reference, seeds_model in ((1, 3), (3, 3), (2, 3), (4, 2)):
        reference = rng.integers(0, 2, size=(seeds_reference, 9))
        model = rng.random((seeds_model, 9)) < 0.7
        differences = model.mean(axis=0) - reference.mean(axis=0)
        sums = [abs(np.dot(signs, differences)) for signs in product([-1, 1], repeat=9)]
        test = paired.paired_test(reference, model)
        assert test.p == pytest.approx(np.mean(np.array(sums) >= abs(differences.sum()) - 1e-9))
        assert test.name == paired.SIGN_FLIP
        assert (test.lost, test.won) == ((differences < -1e-9).sum(), (differences > 1e-9).sum())


def test_seeds_that_agree_count_once() -> None:
    reference, model = answers(30, 9, 3, 4)
    one = paired.mcnemar(reference, model)
    many = paired.paired_test([reference, reference], [model] * 3)
    assert many.p == pytest.approx(one.p)
    assert (many.lost, many.won) == (9, 3)
    assert paired.paired_test([model] * 3, [reference] * 2).p == pytest.approx(one.p)


def test_holm_worked_example() -> None:
    assert paired.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert paired.holm([0.6, 0.9]) == [1, 1]
    assert paired.holm([0.02]) == [0.02]
    assert paired.holm([]) == []
    with pytest.raises(UserError, match="between 0 and 1"):
        paired.holm([0.1, math.nan])


def test_holm_lies_between_the_raw_values_and_bonferroni() -> None:
    for seed in range(50):
        raw = np.random.default_rng(seed).random(8) ** 3
        adjusted = np.array(paired.holm(raw.tolist()))
        assert (adjusted >= raw).all()
        assert (adjusted <= np.minimum(1, 8 * raw)).all()
        assert (np.diff(adjusted[np.argsort(raw)]) >= 0).all()
        order = np.random.default_rng(seed + 100).permutation(8)
        assert paired.holm(raw[order].tolist()) == adjusted[order].tolist()


def test_holm_bounds_the_chance_of_any_false_finding() -> None:
    rng = np.random.default_rng(2)
    found = [min(paired.holm(rng.random(10).tolist())) <= 0.05 for _ in range(2000)]
    assert np.mean(found) <= 0.05 + 3 * (0.05 / 2000) ** 0.5


def test_paper_example() -> None:
    base, unlearned, rna = ([np.arange(100) < right] for right in (60, 30, 50))
    assert paired.reduction(base, unlearned).value == 0.5
    recovery = paired.recovery(base, unlearned, rna)
    assert recovery.value == pytest.approx(2 / 3)
    assert recovery.low is not None
    assert recovery.high is not None
    assert recovery.low < 2 / 3 < recovery.high


def test_undefined_is_said_and_never_divided() -> None:
    base, worse = [np.arange(100) < 60], [np.arange(100) < 50]
    for unlearned in (base, [np.arange(100) < 61], base * 3):
        recovery = paired.recovery(base, unlearned, worse)
        assert (recovery.value, recovery.low, recovery.high) == (None, None, None)
        assert recovery.note == estimates.NOTHING_TO_RECOVER
    reduction = paired.reduction([np.zeros(10)], [np.ones(10)])
    assert (reduction.value, reduction.note) == (None, estimates.NOTHING_TO_LOSE)
    nearly = paired.recovery([np.ones(100)], [np.arange(100) > 0], worse)
    assert nearly.value is not None
    assert nearly.low is None
    assert "unbounded" in nearly.note


def test_one_seed_is_the_plain_paired_bootstrap() -> None:
    rng = np.random.default_rng(3)
    base = rng.random(200) < 0.8
    unlearned, rna = base & (rng.random(200) < 0.6), base & (rng.random(200) < 0.8)
    for own, plain in (
        (
            paired.reduction([base], [unlearned], 0.9),
            estimates.bootstrap(np.stack([base, unlearned], axis=1).astype(float), estimates.reductions, level=0.9),
        ),
        (
            paired.recovery([base], [unlearned], [rna]),
            estimates.bootstrap(np.stack([base, unlearned, rna], axis=1).astype(float), estimates.recoveries),
        ),
    ):
        assert (own.value, own.low, own.high) == pytest.approx((plain.value, plain.low, plain.high))
    for a, b in ((base, rna), tuple(rng.normal(size=(2, 200)))):
        own, plain = paired.difference([a], [b]), estimates.paired_difference(b, a)
        assert plain.low is not None
        assert plain.high is not None
        width = plain.high - plain.low
        assert own.value == pytest.approx(plain.value)
        assert (own.low, own.high) == pytest.approx((plain.low, plain.high), abs=0.05 * width)


def test_equal_answers_differ_by_nothing() -> None:
    same = [np.arange(30) % 3 == 0]
    found = paired.difference(same, same)
    assert (found.value, found.low, found.high) == (0, 0, 0)


def test_seeds_widen_the_interval() -> None:
    rng = np.random.default_rng(4)
    reference = rng.normal(size=(1, 150))
    shifts = rng.normal(0, 1, size=(4, 1))
    model = reference + shifts + rng.normal(0, 0.5, size=(4, 150))
    found = paired.difference(reference, model)
    change = model - reference
    assert found.value == pytest.approx(change.mean())
    assert found.seeds == 4
    expected = change.mean(axis=1).var() / 4 + change.mean(axis=0).var() / 150
    assert found.stderr == pytest.approx(expected**0.5, rel=0.05)
    over = estimates.over_seeds(change)
    assert over.low is not None
    assert over.high is not None
    assert (found.low, found.high) == pytest.approx((over.low, over.high), abs=0.08 * (over.high - over.low))


def test_seeds_of_two_models_are_drawn_apart() -> None:
    shifts = np.array([[-1.0], [0.0], [1.0]])
    table = np.zeros((3, 50)) + shifts
    found = paired.difference(table, table)  # were seeds paired, there would be no spread
    assert found.value == 0
    assert found.stderr == pytest.approx((2 * shifts.var() / 3) ** 0.5, rel=0.05)


def test_paired_seeds_share_what_a_seed_did() -> None:
    rng = np.random.default_rng(7)
    shifts = rng.normal(0, 1, size=(4, 1))
    reference, model = shifts + rng.normal(0, 0.1, size=(4, 60)), shifts + rng.normal(0, 0.1, size=(4, 60))
    together, apart = (paired.difference(reference, model, pair_seeds=each) for each in (True, False))
    change = model - reference
    assert together.value == apart.value == pytest.approx(change.mean())
    assert together.stderr == pytest.approx(estimates.over_seeds(change).stderr, rel=0.05)
    assert (apart.stderr or 0) > 5 * (together.stderr or 0)
    errors = paired.standard_errors(model, reference, pair_seeds=True)
    assert errors.by_seed == pytest.approx(change.mean(axis=1).std(ddof=1) / 2)
    one = paired.difference(reference[:1], model, pair_seeds=True)  # nothing to pair with
    assert one == paired.difference(reference[:1], model)


def test_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(5)
    hits = 0
    for trial in range(200):
        base = rng.random(120) < 0.8
        model = np.where(rng.random(120) < 0.3, rng.random(120) < 0.5, base)  # the truth: 0.3 × (0.5 − 0.8) = −0.09
        found = paired.paired_bootstrap(
            lambda means: means[:, 1] - means[:, 0], [[base], [model]], seed=trial, resamples=400
        )
        assert found.low is not None
        assert found.high is not None
        hits += found.low <= -0.09 <= found.high
    assert 0.87 <= hits / 200 <= 0.99


def test_standard_errors() -> None:
    rng = np.random.default_rng(6)
    model, reference = rng.random((3, 40)), rng.random((2, 40))
    alone = paired.standard_errors(model)
    assert alone.by_question == pytest.approx(np.std(model.mean(axis=0), ddof=1) / 40**0.5)
    assert alone.by_seed == pytest.approx(np.std(model.mean(axis=1), ddof=1) / 3**0.5)
    together = paired.standard_errors(model, reference)
    means = model.mean(axis=0) - reference.mean(axis=0)
    assert together.by_question == pytest.approx(np.std(means, ddof=1) / 40**0.5)
    of_reference = np.std(reference.mean(axis=1), ddof=1) / 2**0.5
    assert together.by_seed == pytest.approx(math.hypot(alone.by_seed or 0, of_reference))
    assert paired.standard_errors(model, reference[:1]).by_seed == alone.by_seed
    assert paired.standard_errors(model[:1]).by_seed is None
    assert paired.standard_errors([[1.0]]).by_question is None


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: paired.mcnemar([1, 0], [1]), r"numbers of questions differ \(2, 1\)"),
        (lambda: paired.mcnemar([1, 0.5], [1, 0]), "must be 0 and 1"),
        (lambda: paired.mcnemar([], []), "finite numbers"),
        (lambda: paired.difference([1, 0], [1, 1]), r"\[seeds, questions\]"),
        (lambda: paired.difference([[1, math.nan]], [[1, 1]]), "finite numbers"),
        (lambda: paired.difference([[1, 0]], [[1, 1]], level=95), "0.95"),
    ],
)
def test_errors(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        call()

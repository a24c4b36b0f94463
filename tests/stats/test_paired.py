"""Paired tests, Holm's correction, differences and rates against counting by hand, SciPy, loops and root-finding."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from itertools import product
from typing import Any

import numpy as np
import pytest
import references
from scipy import stats

from robust_unlearning.errors import UserError
from robust_unlearning.stats import estimates, paired
from robust_unlearning.stats.factors import Groups


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


def test_paper_example() -> None:
    base, unlearned, rna = ([np.arange(100) < right] for right in (60, 30, 50))
    assert paired.reduction(base, unlearned).value == 0.5
    recovery = paired.recovery(base, unlearned, rna)
    assert recovery.value == pytest.approx(2 / 3)
    assert recovery.low is not None
    assert recovery.high is not None
    assert recovery.low < 2 / 3 < recovery.high


def three_models(seeds: int, n: int = 60) -> tuple[Any, Any, Any, list[int]]:
    """Right and wrong of a base [1, n], an unlearned model and its RNA twin [seeds, n]; and clusters of the n."""
    rng = np.random.default_rng(seeds)
    base = (rng.random((1, n)) < 0.85).astype(float)
    unlearned = base * (rng.random((seeds, n)) < 0.5)
    rna = np.maximum(unlearned, base * (rng.random((seeds, n)) < 0.4))
    return base, unlearned, rna, [index % 17 for index in range(n)]


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
    assert "no bound" in nearly.note


@pytest.mark.parametrize("seeds", [1, 3])
@pytest.mark.parametrize("level", [0.8, 0.95])
@pytest.mark.parametrize("clustered", [False, True])
def test_rates_are_fiellers_by_its_definition(seeds: int, level: float, clustered: bool) -> None:
    """Seeds are in the same order in both models, and the base is one given model."""
    base, unlearned, rna, about = three_models(seeds)
    groups = Groups(about) if clustered else None

    def parts(rest: Any) -> references.Parts:
        return references.parts_of(rest.tolist(), about if clustered else None)

    for found, top, bottom in (
        (paired.reduction(base, unlearned, level, groups=groups), base - unlearned, np.repeat(base, seeds, axis=0)),
        (paired.recovery(base, unlearned, rna, level, True, groups), rna - unlearned, base - unlearned),
    ):
        assert found.value == pytest.approx(top.mean() / bottom.mean())
        ends = references.fieller(top, bottom, parts, level)
        assert [found.low, found.high] == pytest.approx(ends, abs=1e-9)
        assert (found.seeds, found.n, found.clusters) == (seeds, 60, 17 if clustered else None)


def test_a_difference_of_one_seed_is_the_paired_t() -> None:
    before, after = np.random.default_rng(3).normal(size=(2, 1, 60))
    found = paired.difference(before, after, 0.9)
    theirs = stats.ttest_rel(after[0], before[0])
    ends = theirs.confidence_interval(0.9)
    assert found.value == pytest.approx((after - before).mean())
    assert (found.low, found.high) == pytest.approx((ends.low, ends.high))
    assert found.p() == pytest.approx(theirs.pvalue, abs=1e-7)


@pytest.mark.parametrize("clustered", [False, True])
def test_a_difference_of_answers_counts_one_lost_and_one_won_more(clustered: bool) -> None:
    """2/(m+2)² is added, m the answers that alone would vary as much, and p goes with the interval."""
    base, unlearned, _, about = three_models(1)
    change, count = (unlearned - base)[0], 17 if clustered else 60
    found = paired.difference(base, unlearned, 0.9, groups=Groups(about) if clustered else None)
    variance = references.clustered(change.tolist(), about if clustered else range(60))
    worth = np.clip(change.var(ddof=1) / variance, count, 60)
    variance += 2 / (worth + 2) ** 2
    half = stats.t.ppf(0.95, count - 1) * variance**0.5
    assert (found.low, found.high) == pytest.approx((change.mean() - half, change.mean() + half))
    ratio = abs(change.mean()) / variance**0.5
    assert found.p() == pytest.approx(2 * stats.t.sf(ratio, count - 1), abs=1e-7)


def test_a_difference_over_seeds_and_words() -> None:
    rng = np.random.default_rng(4)
    reference = rng.normal(size=(1, 60))
    model = reference + rng.normal(0, 1, size=(4, 1)) + rng.normal(0, 0.5, size=(4, 60))
    words = [index % 6 for index in range(60)]
    found = paired.difference(reference, model, groups=Groups(words=words))
    change = model - reference
    parts = references.parts_of(change.tolist(), words=words)
    assert (found.low, found.high) == pytest.approx(references.interval(change.mean(), parts))
    assert (found.seeds, found.words) == (4, 6)


def test_paired_seeds_share_what_a_seed_did() -> None:
    rng = np.random.default_rng(7)
    shifts = rng.normal(0, 1, size=(4, 1))
    reference, model = shifts + rng.normal(0, 0.1, size=(4, 60)), shifts + rng.normal(0, 0.1, size=(4, 60))
    together, apart = (paired.difference(reference, model, pair_seeds=each) for each in (True, False))
    change = model - reference
    assert together.value == apart.value == pytest.approx(change.mean())
    parts = references.parts_of(change.tolist())
    assert (together.low, together.high) == pytest.approx(references.interval(change.mean(), parts))
    of_both = sum(each.mean(axis=1).var(ddof=1) / 4 for each in (reference, model))
    assert apart.stderr == pytest.approx((of_both + change.mean(axis=0).var(ddof=1) / 60) ** 0.5)
    errors = paired.standard_errors(model, reference, pair_seeds=True)
    assert errors.by_seed == pytest.approx(change.mean(axis=1).std(ddof=1) / 2)
    one = paired.difference(reference[:1], model, pair_seeds=True)  # nothing to pair with
    assert one == paired.difference(reference[:1], model)


def test_answers_that_are_all_alike_may_still_differ_elsewhere() -> None:
    """Wilson's upper end of 0 of m: t² / (m + t²), m questions or clusters."""
    same = [np.arange(30) % 3 == 0]
    found = paired.difference(same, same)
    most = stats.t.ppf(0.975, 29) ** 2 / (30 + stats.t.ppf(0.975, 29) ** 2)
    assert (found.value, found.low, found.high) == (0, pytest.approx(-most), pytest.approx(most))
    assert found.p() == 1
    narrower = stats.t.ppf(0.9, 29) ** 2
    assert paired.difference(same, same, 0.8).high == pytest.approx(narrower / (30 + narrower))
    clustered = paired.difference(same, same, groups=Groups([index // 5 for index in range(30)]))
    assert clustered.high == pytest.approx(stats.t.ppf(0.975, 5) ** 2 / (6 + stats.t.ppf(0.975, 5) ** 2))
    nats = paired.difference([[0.5] * 30], [[0.5] * 30])
    assert (nats.low, nats.high) == (0, 0)


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

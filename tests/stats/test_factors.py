"""Means over seeds, questions and words, and ratios of them, against loops, SciPy and root-finding."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import references
from scipy import stats

from robust_unlearning.errors import UserError
from robust_unlearning.stats.estimates import Estimate
from robust_unlearning.stats.factors import NO_INTERVAL, ONE_WORD, Groups, Means, means_of

N = 36
CLUSTERS = [f"thing {(3 * index) % 11}" for index in range(N)]
WORDS = [["virus", "gene", "toxin", "spore", "plague"][index % 5] for index in range(N)]


def table(seeds: int, number: int = 0) -> Any:
    """Numbers that vary from seed to seed, thing to thing and word to word."""
    rng = np.random.default_rng(number)
    of_things = dict(zip(sorted(set(CLUSTERS)), rng.normal(size=11), strict=True))
    of_words = dict(zip(sorted(set(WORDS)), rng.normal(size=5), strict=True))
    shared = np.array([of_things[c] + of_words[w] for c, w in zip(CLUSTERS, WORDS, strict=True)])
    return 2 + rng.normal(0, 0.3, size=(seeds, 1)) + shared + rng.normal(size=(seeds, N))


def variances(found: Estimate) -> list[tuple[float, int]]:
    return [(part.variance, part.df) for part in found.parts]


@pytest.mark.parametrize("level", [0.8, 0.95])
def test_one_table_of_single_questions_is_students_t(level: float) -> None:
    values = table(1)
    found = means_of([values]).weighted([1.0], level)
    theirs = stats.ttest_1samp(values[0], 0).confidence_interval(level)
    assert (found.low, found.high) == pytest.approx((theirs.low, theirs.high))
    assert found.stderr == pytest.approx(stats.sem(values[0]))
    assert (found.n, found.seeds, found.clusters, found.words) == (N, 1, None, None)


def test_a_difference_of_single_questions_is_the_paired_t() -> None:
    a, b = table(1, 1), table(1, 2)
    found = means_of([a, b]).weighted([1.0, -1.0])
    theirs = stats.ttest_rel(a[0], b[0])
    ends = theirs.confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((ends.low, ends.high))
    assert found.p() == pytest.approx(theirs.pvalue, abs=1e-7)


@pytest.mark.parametrize("seeds", [1, 2, 3, 5])
@pytest.mark.parametrize("clusters", [None, CLUSTERS])
@pytest.mark.parametrize("words", [None, WORDS])
def test_parts_against_loops(seeds: int, clusters: Any, words: Any) -> None:
    values = table(seeds, seeds)
    found = means_of([values], Groups(clusters, words)).weighted([1.0], 0.9)
    parts = references.parts_of(values.tolist(), clusters, words)
    assert found.value == pytest.approx(values.mean())
    assert variances(found) == [(pytest.approx(variance), df) for variance, df in parts]
    assert (found.low, found.high) == pytest.approx(references.interval(values.mean(), parts, 0.9))
    factors = ["seeds"] * (seeds > 2) + ["clusters"] + ["words"] * bool(words)
    assert [part.factor for part in found.parts] == factors
    assert (found.clusters, found.words) == (11 if clusters else None, 5 if words else None)


def test_a_factor_with_few_groups_widens_the_interval() -> None:
    values = table(3)
    parts = references.parts_of(values.tolist(), CLUSTERS, WORDS)
    found = means_of([values], Groups(CLUSTERS, WORDS)).weighted([1.0])
    assert found.low is not None
    half = (found.value or 0) - found.low
    assert half / (found.stderr or 1) == pytest.approx(references.quantile(parts))
    assert stats.t.ppf(0.975, 10) < half / (found.stderr or 1) < stats.t.ppf(0.975, 2)


def test_few_words_do_not_borrow_the_degrees_of_freedom_of_many_clusters() -> None:
    """Words keep all of their part; where the clusters' is less than single questions', nothing is left of it."""
    rng = np.random.default_rng(8)
    words = [index % 3 for index in range(N)]
    values = np.array([[-1.0, 0.0, 1.0]] * (N // 3)).reshape(1, N) + 0.01 * rng.normal(size=(1, N))
    about = [index // 3 for index in range(N)]  # each cluster has all three words, so its sum is always about the same
    found = means_of([values], Groups(about, words)).weighted([1.0])
    clusters, of_words = found.parts
    assert (clusters.variance, clusters.df) == (0, N // 3 - 1)
    assert references.clustered(values[0].tolist(), about) < references.clustered(values[0].tolist(), range(N))
    assert (of_words.variance, of_words.df) == (pytest.approx(references.clustered(values[0].tolist(), words)), 2)
    half = stats.t.ppf(0.975, 2) * of_words.variance**0.5
    assert (found.low, found.high) == pytest.approx((values.mean() - half, values.mean() + half))


def test_seeds_of_two_tables_are_paired_or_add_up() -> None:
    a, b = table(4, 1), table(4, 1) + 0.1 * table(4, 2)
    apart = means_of([a, b]).weighted([1.0, -1.0])
    together = means_of([a, b], pair_seeds=True).weighted([1.0, -1.0])
    of_seeds = [each.mean(axis=1).var(ddof=1) / 4 for each in (a, b)]
    assert variances(apart)[:2] == [(pytest.approx(each), 3) for each in of_seeds]
    assert variances(together)[0] == (pytest.approx((a - b).mean(axis=1).var(ddof=1) / 4), 3)
    assert [part.factor for part in together.parts] == ["seeds", "clusters"]
    assert variances(together)[1] == variances(apart)[2]
    other = means_of([a[:3], b], pair_seeds=True).weighted([1.0, -1.0])  # nothing to pair with
    assert [part.df for part in other.parts] == [2, 3, N - 1]
    given = means_of([a[:1], b]).weighted([1.0, -1.0])  # one given model
    assert [part.factor for part in given.parts] == ["seeds", "clusters"]


@pytest.mark.parametrize(
    ("seeds", "clusters", "words"),
    [
        (1, None, None),
        (1, CLUSTERS, None),
        (1, None, WORDS),
        (2, CLUSTERS, WORDS),
        (3, CLUSTERS, WORDS),
        (4, None, None),
        (4, CLUSTERS, None),
        (5, CLUSTERS, WORDS),
    ],
)
def test_a_ratio_is_fiellers_by_its_definition(seeds: int, clusters: Any, words: Any) -> None:
    top, bottom = table(seeds, 5), 4 + table(seeds, 6)
    found = means_of([top, bottom], Groups(clusters, words), pair_seeds=True).ratio([1, 0], [0, 1])
    parts = partial(references.parts_of, clusters=clusters, words=words)
    ends = references.fieller(top, bottom, lambda rest: parts(rest.tolist()))
    assert found.value == pytest.approx(top.mean() / bottom.mean())
    assert [found.low, found.high] == pytest.approx(ends, abs=1e-9)
    rest = parts((top - found.value * bottom).tolist())
    assert found.stderr == pytest.approx(sum(variance for variance, _ in rest) ** 0.5 / bottom.mean())


def test_a_ratio_without_a_bound_or_a_meaning() -> None:
    top, bottom = table(1, 5), table(1, 6)
    far = bottom - bottom.mean() + 0.01  # may be 0
    found = means_of([top, far]).ratio([1, 0], [0, 1])
    assert found.value == pytest.approx(top.mean() / 0.01)
    assert (found.low, found.high) == (None, None)
    assert "no bound" in found.note
    nothing = means_of([top, -abs(bottom)]).ratio([1, 0], [0, 1], undefined="nothing was lost")
    assert (nothing.value, nothing.note, nothing.n) == (None, "nothing was lost", N)
    assert means_of([[[1.0]], [[2.0]]]).ratio([1, 0], [0, 1]).note == NO_INTERVAL


def ends(means: Means) -> tuple[Any, ...]:
    both = means.weighted([1.0, -1.0]), means.ratio([1, 0], [0, 1])
    return tuple(getattr(each, key) for each in both for key in ("value", "low", "high", "stderr"))


def test_what_changes_nothing() -> None:
    a, b = table(3, 1), 3 + table(3, 2)
    groups = Groups(CLUSTERS, WORDS)
    found = ends(means_of([a, b], groups))
    relabelled = Groups([f"x{name[::-1]}" for name in CLUSTERS], [ord(word[0]) for word in WORDS])
    assert ends(means_of([a, b], relabelled)) == pytest.approx(found)
    order = np.random.default_rng(3).permutation(N)
    moved = Groups([CLUSTERS[i] for i in order], np.array(WORDS)[order])
    assert ends(means_of([a[:, order], b[:, order]], moved)) == pytest.approx(found)
    assert ends(means_of([a[::-1], b[[1, 2, 0]]], groups)) == pytest.approx(found)  # of independent seeds
    assert ends(means_of([a, b], Groups(range(N)))) == pytest.approx(ends(means_of([a, b])))


def test_scale() -> None:
    a, b = table(3, 1), 3 + table(3, 2)
    found, larger = (means_of([scale * a, scale * b], Groups(CLUSTERS, WORDS)) for scale in (1, 10))
    assert larger.weighted([1.0, 0.0]).high == pytest.approx(10 * (found.weighted([1.0, 0.0]).high or 0))
    assert larger.ratio([1, 0], [0, 1]).high == pytest.approx(found.ratio([1, 0], [0, 1]).high)


def test_asking_the_same_again_tells_nothing_new() -> None:
    """Each question twice, as one cluster: the interval is that of asking once."""
    values = table(1)
    once = means_of([values]).weighted([1.0])
    twice = means_of([np.concatenate([values, values], axis=1)], Groups([*range(N), *range(N)])).weighted([1.0])
    assert (twice.low, twice.high) == pytest.approx((once.low, once.high))


def test_one_word_and_one_cluster_have_no_part() -> None:
    found = means_of([table(1)], Groups(words=["virus"] * N)).weighted([1.0])
    assert [part.factor for part in found.parts] == ["clusters"]
    assert found.note == ONE_WORD
    alone = means_of([table(1)], Groups(["a"] * N)).weighted([1.0])
    assert (alone.low, alone.high, alone.note) == (None, None, NO_INTERVAL)
    neither = means_of([table(1)], Groups(["a"] * N, ["virus"] * N))
    assert neither.weighted([1.0]).note == neither.ratio([1.0], [1.0]).note == NO_INTERVAL


def test_one_cluster_with_several_words_leaves_the_part_of_the_words() -> None:
    values, bottom = table(1), 4 + table(1, 6)
    means = means_of([values, bottom], Groups(["a"] * N, WORDS))
    found = means.weighted([1.0, 0.0])
    variance = references.clustered(values[0].tolist(), WORDS)
    assert [(part.factor, part.variance, part.df) for part in found.parts] == [("words", pytest.approx(variance), 4)]
    half = stats.t.ppf(0.975, 4) * variance**0.5
    assert half > 0
    assert (found.low, found.high) == pytest.approx((values.mean() - half, values.mean() + half))
    assert (found.clusters, found.words, found.note) == (1, 5, "")
    ratio = means.ratio([1, 0], [0, 1])
    ends = references.fieller(
        values, bottom, lambda rest: references.parts_of(rest.tolist(), clusters=["a"] * N, words=WORDS)
    )
    assert [ratio.low, ratio.high] == pytest.approx(ends, abs=1e-9)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: means_of([[1.0, 2.0]]), r"\[seeds, questions\]; shapes \(2,\)"),
        (lambda: means_of([[[]]]), "finite numbers"),
        (lambda: means_of([[[1.0, np.inf]]]), "finite numbers"),
        (lambda: means_of([[[1.0, 2.0]], [[1.0]]]), r"numbers of questions differ \(2, 1\)"),
        (lambda: means_of([[[1.0, 2.0]]], Groups(["a"])), "1 labels for 2 questions"),
        (lambda: means_of([[[1.0, 2.0]]], Groups(words=["a"])), "1 labels for 2 questions"),
        (lambda: means_of([[[1.0, 2.0]]]).weighted([1.0], 95), "0.95"),
    ],
)
def test_errors(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        call()

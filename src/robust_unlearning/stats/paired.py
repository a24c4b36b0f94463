"""Paired statistics of models that answered the same questions: tests, Holm's correction, differences and rates.

Each model is a table [seeds, n] of numbers, one a question (right or wrong, or log p); one seed is [1, n]. Questions
are shared. Seeds are independent between models, unless `pair_seeds` says that row k of each was trained with one seed:
what a seed did to both is then no difference between them. Nothing here reads a file. Accuracies of one model are in
`estimates`, means and differences of plain lists in `means`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd

import numpy as np
from numpy.typing import ArrayLike

from robust_unlearning.errors import UserError
from robust_unlearning.stats.estimates import NOTHING_TO_LOSE, NOTHING_TO_RECOVER, Estimate
from robust_unlearning.stats.factors import Groups, means_of, tables_of
from robust_unlearning.stats.means import of_answers

ALPHA = 0.05
"""How often a table of verdicts, or a claim, may hold a false one: Holm's p below it is a finding."""
MCNEMAR, SIGN_FLIP = "McNemar, exact", "sign flips, exact"


@dataclass(frozen=True)
class PairedTest:
    """A two-sided test that two models answer the same questions equally well.

    Attributes:
        lost: questions the reference answers better (b of McNemar's table).
        won: questions the model answers better (c).
        p: the p-value.
        name: `MCNEMAR` or `SIGN_FLIP`.
    """

    lost: int
    won: int
    p: float
    name: str


@dataclass(frozen=True)
class StandardErrors:
    """Of a mean over seeds and questions: one counts questions as the sample, the other training seeds.

    Attributes:
        by_question: sd over questions of the mean over seeds / sqrt(n): these seeds, other questions.
        by_seed: sd over seeds of the mean over questions / sqrt(seeds): these questions, other seeds; None for
            one seed.
    """

    by_question: float | None
    by_seed: float | None


def mcnemar(reference: ArrayLike, model: ArrayLike) -> PairedTest:
    """McNemar's exact test on right and wrong answers [n] to the same questions.

    With b questions that only the reference answers and c that only the model answers, p = min(1, 2 P(X <=
    min(b, c))), X ~ Binomial(b + c, 1/2); 1 where b + c = 0. The exact conditional test keeps its level for any
    n; its mid-p form rejects more often, but may exceed the level a little, so it is not used here.

    Sources: McNemar (1947), Psychometrika 12; Fagerland, Lydersen and Laake (2013), BMC Med. Res. Methodol. 13:91.

    Raises:
        UserError: no answers, unequal lengths, or values other than 0 and 1.

    >>> round(mcnemar([1, 1, 1, 1, 1, 0], [0, 0, 0, 0, 0, 1]).p, 6)  # 2 (1 + 6) / 64
    0.21875
    """
    return paired_test(np.asarray(reference)[None], np.asarray(model)[None])


def paired_test(reference: ArrayLike, model: ArrayLike) -> PairedTest:
    """Whether two models' right and wrong answers, [seeds, n] each, differ by more than chance.

    With d the difference of the two means over seeds on a question, the test flips the sign of every d at random:
    p is the share of the 2^n flips whose sum is at least as far from 0 as the one found. It is computed exactly,
    as the d are multiples of one number. With one seed on each side it is McNemar's exact test.

    The seeds are taken as they are: p says nothing about a model trained with another seed. The interval of
    `difference` and its p do.

    Raises:
        UserError: no answers, unequal lengths, or values other than 0 and 1.
    """
    reference, model = tables_of([reference, model])
    if not np.isin(np.concatenate([reference, model]), (0.0, 1.0)).all():
        raise UserError("answers must be 0 and 1 (or False and True), one per seed and question.")
    counts = len(reference) * model.sum(axis=0) - len(model) * reference.sum(axis=0)
    name = MCNEMAR if len(reference) == len(model) == 1 else SIGN_FLIP
    p = _sign_flips([int(each) for each in counts if each])
    return PairedTest(int((counts < 0).sum()), int((counts > 0).sum()), p, name)


def _sign_flips(differences: Sequence[int]) -> float:
    """Two-sided p of the sum of whole numbers other than 0 under random signs.

    The sum of those that come out positive is, for each size, size × Binomial(how many, 1/2); the distributions
    are convolved.
    """
    shared = gcd(*differences)
    sizes, counts = np.unique(np.abs(differences) // max(1, shared), return_counts=True)
    chances = np.ones(1)
    for size, count in zip(sizes, counts, strict=True):
        of_size = np.zeros(size * count + 1)
        of_size[::size] = _fair_coins(int(count))
        chances = np.convolve(chances, of_size)
    positive = sum(each for each in differences if each > 0) // max(1, shared)
    smaller = min(positive, len(chances) - 1 - positive)
    return min(1.0, 2 * float(chances[: smaller + 1].sum()))


def _fair_coins(count: int) -> list[float]:
    """Binomial(count, 1/2): the chance of 0, 1, … heads, each exact but for the last rounding."""
    ways, chances = 1, []
    for heads in range(count + 1):
        chances.append(ways / (1 << count))
        ways = ways * (count - heads) // (heads + 1)
    return chances


def holm(pvalues: Sequence[float]) -> list[float]:
    """Holm's step-down adjusted p-values, in the order given: below α, the chance of one false finding is at most α.

    The i-th smallest of m becomes max over j <= i of min(1, (m - j + 1) p_(j)). The tests may depend on each other.
    Source: Holm (1979), Scand. J. Stat. 6.

    Raises:
        UserError: a value that is no probability.

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    if any(not 0 <= p <= 1 for p in pvalues):
        raise UserError(f"p-values lie between 0 and 1; given {', '.join(map(str, pvalues))}.")
    order, adjusted = np.argsort(pvalues, kind="stable"), np.zeros(len(pvalues))
    steps = np.arange(len(pvalues), 0, -1) * np.asarray(pvalues)[order]
    adjusted[order] = np.maximum.accumulate(np.minimum(1.0, steps))
    return [float(p) for p in adjusted]


def standard_errors(model: ArrayLike, reference: ArrayLike | None = None, pair_seeds: bool = False) -> StandardErrors:
    """Standard errors of the mean of `model` [seeds, n], or of its paired difference to `reference` [seeds, n].

    Independent seeds add their variances; a side with one seed adds none, as it is one given model. With
    `pair_seeds` and as many seeds on both sides, the variance is that of the differences seed by seed. Sample
    standard deviations (n - 1, seeds - 1).

    Raises:
        UserError: not tables of finite numbers with the same questions.
    """
    tables = tables_of([model] if reference is None else [model, reference])
    means = tables[0].mean(axis=0) - (tables[1].mean(axis=0) if len(tables) > 1 else 0)
    by_question = float(means.std(ddof=1) / len(means) ** 0.5) if len(means) > 1 else None
    if pair_seeds and len(tables) > 1 and len(tables[0]) == len(tables[1]):
        tables = [tables[0] - tables[1]]
    variances = [float(each.mean(axis=1).var(ddof=1)) / len(each) for each in tables if len(each) > 1]
    return StandardErrors(by_question, sum(variances) ** 0.5 if variances else None)


def difference(
    reference: ArrayLike,
    model: ArrayLike,
    level: float = 0.95,
    pair_seeds: bool = False,
    groups: Groups | None = None,
) -> Estimate:
    """Mean of model - reference over seeds and questions, [seeds, n] each; see `factors.means_of`.

    Of right and wrong answers see `means.of_answers`.
    """
    tables = tables_of([reference, model])
    found = means_of(tables, groups, pair_seeds=pair_seeds).weighted([-1.0, 1.0], level)
    answers = all(np.isin(table, (0.0, 1.0)).all() for table in tables)
    return of_answers(found, tables[1].mean(axis=0) - tables[0].mean(axis=0), level) if answers else found


def reduction(
    base: ArrayLike,
    unlearned: ArrayLike,
    level: float = 0.95,
    pair_seeds: bool = False,
    groups: Groups | None = None,
) -> Estimate:
    """`estimates.reduction_rate` of tables [seeds, n], with Fieller's interval (`factors.Means.ratio`)."""
    means = means_of([base, unlearned], groups, pair_seeds=pair_seeds)
    return means.ratio([1, -1], [1, 0], level, NOTHING_TO_LOSE)


def recovery(
    base: ArrayLike,
    unlearned: ArrayLike,
    rna: ArrayLike,
    level: float = 0.95,
    pair_seeds: bool = False,
    groups: Groups | None = None,
) -> Estimate:
    """`estimates.recovery_rate` of tables [seeds, n], with Fieller's interval (`factors.Means.ratio`).

    It has no bound where unlearning may have lost nothing.
    """
    means = means_of([base, unlearned, rna], groups, pair_seeds=pair_seeds)
    return means.ratio([0, -1, 1], [1, -1, 0], level, NOTHING_TO_RECOVER)

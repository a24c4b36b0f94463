"""Means and shares over questions, documents and training seeds, with intervals.

`factors` says how the intervals are reckoned. Shapes: n questions or documents, S seeds.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import ArrayLike

from robust_unlearning.errors import UserError
from robust_unlearning.stats.estimates import Estimate, accuracy, columns, critical, wilson
from robust_unlearning.stats.factors import FEWEST_SEEDS, Groups, means_of

OF_THESE = "of these models: no interval over training seeds"
"""What is said beside a mean over fewer than `FEWEST_SEEDS` seeds."""


def mean_interval(values: ArrayLike, groups: Groups | None = None, level: float = 0.95) -> Estimate:
    """Mean of `values` [n] with the t interval over questions, or over the clusters and words of `groups`.

    Raises:
        UserError: no values, or values that are not finite.
    """
    (data,) = columns(values=values)
    return replace(means_of([data[None]], groups).weighted([1.0], level), seeds=None)


def paired_difference(a: ArrayLike, b: ArrayLike, groups: Groups | None = None, level: float = 0.95) -> Estimate:
    """Mean of a - b over the same n questions, with interval: `a` and `b` are [n] in the same order.

    Raises:
        UserError: no values, unequal lengths, or values that are not finite.
    """
    first, second = columns(a=a, b=b)
    return mean_interval(first - second, groups, level)


def nats_per_token(nats: ArrayLike, tokens: ArrayLike) -> Estimate:
    """Negative log-likelihood per token over n documents: sum of `nats` [n] / sum of `tokens` [n].

    The interval is over documents, as tokens of one document are not independent. exp of it is the
    perplexity. Documents without predicted tokens are left out of n.

    Raises:
        UserError: no document with tokens, unequal lengths, or values that are not finite.
    """
    total, count = columns(nats=nats, tokens=tokens)
    total, count = total[count > 0], count[count > 0]
    if not len(count):
        raise UserError("no document has a token to predict: each is shorter than two tokens.")
    return replace(means_of([total[None], count[None]]).ratio([1, 0], [0, 1]), seeds=None)


def over_seeds(per_seed_values: ArrayLike, groups: Groups | None = None, level: float = 0.95) -> Estimate:
    """Mean of values [S, n] over S training seeds and n questions, all seeds on the same ones.

    With fewer than `FEWEST_SEEDS` seeds the interval is over questions only, and the note says so.

    Raises:
        UserError: not a table of S rows of n values, or values that are not finite.
    """
    means = means_of([per_seed_values], groups)
    found = means.weighted([1.0], level)
    return replace(found, note="; ".join(filter(None, [found.note, OF_THESE if means.seeds < FEWEST_SEEDS else ""])))


def share_over_seeds(per_seed_correct: ArrayLike, groups: Groups | None = None, level: float = 0.95) -> Estimate:
    """`over_seeds` of right (1) and wrong (0), with Wilson's interval of as many answers as the variance is worth.

    That number is p(1-p)/V, and t' stands for z; where all answers are alike, V says nothing, and it is the number
    of clusters. A single row of unclustered answers has the interval of `accuracy`.
    """
    table = np.asarray(per_seed_correct, dtype=float)
    binary = bool(np.isin(table, (0.0, 1.0)).all())
    if binary and len(table) == 1 and (groups is None or groups.clusters is groups.words is None):
        return replace(accuracy(table[0], level), seeds=1, note=OF_THESE)
    share = over_seeds(table, groups, level)
    if share.value is None or not share.parts:
        return share
    p, variance = share.value, share.spread**2
    worth = p * (1 - p) / variance if variance else float(share.clusters or share.n)
    low, high = wilson(p, worth, critical(share.parts, level))
    return replace(share, low=low, high=high)


def of_answers(difference: Estimate, changes: ArrayLike, level: float = 0.95) -> Estimate:
    """A mean difference of answers, right (1) or wrong (0), with a variance that few changed answers do not belie.

    2/(m + 2)² is added to the variance, as if of m + 2 answers one more had been lost and one won (after Agresti and
    Min 2005, Stat. Med. 24, who add half as much to each of four cells). m is how many answers alone would vary as much
    as these do, between the clusters and the questions. Where all were answered alike there is no variance to go by:
    it is then such that the interval is Wilson's for the share of clusters that may change, to both sides.

    Args:
        changes: the differences, mean over seeds, [n].
    """
    if not difference.parts or difference.value is None:
        return difference
    values, clusters = np.asarray(changes, dtype=float), max(difference.clusters or difference.n, difference.words or 0)
    most = max(difference.parts, key=lambda part: part.df)
    if found := sum(part.variance for part in difference.parts if part.factor != "seeds"):
        alone = float(values.var(ddof=1)) if len(values) > 1 else 0.0
        added = 2 * (min(max(alone / found, clusters), difference.n) + 2.0) ** -2
    else:
        t = critical(difference.parts, level)
        added = (wilson(0.0, clusters, t)[1] / t) ** 2
    parts = tuple(replace(part, variance=part.variance + added) if part is most else part for part in difference.parts)
    ends = replace(difference, parts=parts).at(level)
    assert ends.low is not None
    assert ends.high is not None
    return replace(ends, low=max(-1.0, ends.low), high=min(1.0, ends.high))

"""An effect: a difference for each question and training seed; and the mean of several on the same questions."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from robust_unlearning.stats.estimates import Array, Estimate
from robust_unlearning.stats.factors import FEWEST_SEEDS, Groups
from robust_unlearning.stats.means import mean_interval, of_answers, over_seeds


@dataclass(frozen=True)
class Effect:
    """Differences question by question, one row a seed.

    Attributes:
        by_seed: seed -> [n].
        groups: how the n questions hang together.
        place: errors with mean 0 that m other questions add, [m], such as of a place on a curve; None for none.
        place_groups: how those hang together.
        slack: see `Estimate.slack`.
        answers: the differences are of answers, right (1) or wrong (0), see `means.of_answers`.
    """

    by_seed: Mapping[int, Array]
    groups: Groups = field(default_factory=Groups)
    place: Array | None = None
    place_groups: Groups = field(default_factory=Groups)
    slack: float = 0.0
    answers: bool = False

    def estimate(self) -> Estimate:
        """The mean over seeds and questions with its 95 % interval, seeds as the unit (`means.over_seeds`)."""
        found = over_seeds(np.stack(list(self.by_seed.values())), self.groups)
        if self.answers:
            found = of_answers(found, _mean(self.by_seed.values()))
        if self.place is not None:
            placed = mean_interval(self.place, self.place_groups)
            found = replace(found, parts=(*found.parts, *placed.parts)).at(0.95)
        return replace(found, slack=self.slack).at(0.95) if self.slack else found


def mean_effect(effects: Sequence[Effect]) -> Effect | None:
    """The mean of effects on the same questions; None where questions differ, or how they hang together.

    It is over the seeds that all have. Where these are fewer than `FEWEST_SEEDS`, the mean of each effect over its own
    seeds stands for it, and the whole for one seed: methods are no seeds.
    """
    if (
        len({_questions(effect) for effect in effects}) != 1
        or len({_places(effect) for effect in effects} - {None}) > 1
    ):
        return None
    seeds = set.intersection(*(set(effect.by_seed) for effect in effects))
    if len(seeds) >= FEWEST_SEEDS:
        rows = {seed: _mean(effect.by_seed[seed] for effect in effects) for seed in sorted(seeds)}
    else:
        rows = {min(seeds, default=0): _mean(_mean(effect.by_seed.values()) for effect in effects)}
    places = [effect.place for effect in effects if effect.place is not None]
    slack = float(np.mean([effect.slack for effect in effects]))
    first = effects[0]
    place = _mean(places) if places else None
    return Effect(rows, first.groups, place, first.place_groups, slack, all(each.answers for each in effects))


def mean_of_sets(effects: Sequence[Effect]) -> Estimate | None:
    """The mean of effects on several sets of questions: those on one set by `mean_effect`, the sets by `mean_of_ends`.

    Each set counts as often as it has effects.
    """
    sets: dict[Hashable, list[Effect]] = {}
    for effect in effects:
        sets.setdefault((_questions(effect), _places(effect)), []).append(effect)
    means = [mean.estimate() for of_set in sets.values() if (mean := mean_effect(of_set)) for _ in of_set]
    return mean_of_ends(means)


def _questions(effect: Effect) -> Hashable:
    return tuple(sorted({len(row) for row in effect.by_seed.values()})), _labels(effect.groups)


def _places(effect: Effect) -> Hashable:
    return None if effect.place is None else (len(effect.place), _labels(effect.place_groups))


def _labels(groups: Groups) -> Hashable:
    return tuple(None if labels is None else tuple(map(str, labels)) for labels in (groups.clusters, groups.words))


def _mean(rows: Iterable[Array]) -> Array:
    mean: Array = np.mean(list(rows), axis=0)
    return mean


def mean_of_ends(estimates: Sequence[Estimate]) -> Estimate | None:
    """The mean of estimates that hang together in an unknown way: the mean of values, and of the ends of the intervals.

    A mean's standard error is no larger than the mean of the standard errors, however the estimates depend on each
    other; so the interval errs to the wide side. None where an estimate has no interval.
    """
    if not estimates or any(None in (each.value, each.low, each.high) for each in estimates):
        return None
    value, low, high = (float(np.mean([getattr(each, key) for each in estimates])) for key in ("value", "low", "high"))
    seeds = [each.seeds for each in estimates if each.seeds]
    return Estimate(value, low, high, n=min(each.n for each in estimates), seeds=min(seeds, default=None))

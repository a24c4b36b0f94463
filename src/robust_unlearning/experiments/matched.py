"""RNA against no noise where both have forgotten as much.

Noise that merely slows the forgetting looks like a cure at equal steps and is none at equal forgetting. So the harm of
a method without noise is drawn as a curve over its forgetting, one curve a seed, and a model with noise is set against
the curve at its own forgetting:

- *Forgetting* is what the base knew and the model does not: log p of the right option on forget questions, base less
  model, question by question.
- Of a line of snapshots only those count that have forgotten more than all before, on either side: a line that has
  come to rest goes to and fro, and its later models would be set against earlier ones.
- The curve is a monotone cubic one (PCHIP: Fritsch and Butland 1984, SIAM J. Sci. Stat. Comput. 5). There is a match
  only where snapshots lie on both sides within `WINDOW` nats.
- The curve's own uncertainty: a monotone curve lies between its neighbours' harms, so it is off by no more than the
  distance to the farther one. That is added to both sides of the interval. The uncertainty of the questions comes
  from the two neighbours, weighted so that their mean is the curve's height, and from the forget questions: with
  others, the place on the curve would be another.
- Seeds are the unit: several matches of one seed are averaged first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
from scipy.interpolate import PchipInterpolator

from robust_unlearning.report.tables import Table
from robust_unlearning.results.measures import Measured, QuestionMeasure, forgetting
from robust_unlearning.stats.effects import Effect
from robust_unlearning.stats.estimates import Array
from robust_unlearning.stats.factors import Groups

AnyModel = TypeVar("AnyModel")
LEAST = 0.3
"""Forgetting beyond the base (nats) that a model must have reached to be compared: before that nothing is to mend."""
WINDOW = 0.5
"""Nats of forgetting within which a snapshot must lie on either side of a match."""


@dataclass(frozen=True)
class Match:
    """A model with noise against the curve of those without, question by question.

    Attributes:
        at: the forgetting of both, nats.
        difference: harm (or another measure) of the model less the curve's, [n].
        place: what a forget question adds to the error of the place on the curve, in the measure's unit, [m]; mean 0.
        slack: how far the curve may be off, in the measure's unit.
    """

    at: float
    difference: Array
    place: Array
    slack: float


def rising(values: Sequence[float]) -> list[int]:
    """Indices of the values that are above all before them."""
    return [index for index, value in enumerate(values) if value > max(values[:index], default=-np.inf)]


def match(
    model: tuple[Array, Array], line: Sequence[tuple[Array, Array]], least: float = LEAST, window: float = WINDOW
) -> Match | None:
    """Set one model against a line of others.

    Args:
        model: its forgetting [m] and its measure [n], a number for each question.
        line: the same of models without noise, the base first, each having forgotten more than the one before.
        least: forgetting that the model must have reached.
        window: how near a neighbour must be.

    Returns:
        None where the model has forgotten too little, or has no neighbour on one side.
    """
    x = np.array([each.mean() for each, _ in line])
    wanted = float(model[0].mean())
    after = int(np.searchsorted(x, wanted))
    if wanted < least or not 0 < after < len(x) or max(x[after] - wanted, wanted - x[after - 1]) > window:
        return None
    before, behind = line[after - 1], line[after]
    means = np.array([values.mean() for _, values in line])
    curve = PchipInterpolator(x, means)
    height, slope = float(curve(wanted)), float(curve(wanted, 1))
    share = (wanted - x[after - 1]) / (x[after] - x[after - 1])
    rise = float(means[after] - means[after - 1])
    weight = (height - means[after - 1]) / rise if rise else share
    on_curve = (1 - weight) * before[1] + weight * behind[1]
    near = (1 - share) * before[0] + share * behind[0]
    slack = max(abs(height - means[after - 1]), abs(height - means[after]))
    return Match(wanted, model[1] - on_curve, slope * (model[0] - near), float(slack))


def matches(
    models: Sequence[AnyModel],
    line: Sequence[AnyModel],
    of: Callable[[AnyModel], tuple[Array, Array]],
    window: float = WINDOW,
) -> list[Match]:
    """The models with noise of one seed against a line without, both in the order of their steps.

    Args:
        line: the base first.
        of: a model's forgetting beyond the base [m] and its measure [n].
        window: see `match`.
    """

    def counted(every: Sequence[AnyModel]) -> list[tuple[Array, Array]]:
        pairs = list(map(of, every))
        return [pairs[index] for index in rising([float(forgotten.mean()) for forgotten, _ in pairs])]

    plain = counted(line)
    return [found for model in counted(models) if (found := match(model, plain, window=window))]


def compare_lines(
    lines: Mapping[int, Sequence[tuple[Sequence[Measured], Sequence[Measured]]]], base: Measured, of: QuestionMeasure
) -> tuple[Effect | None, list[float]]:
    """RNA less no noise in a measure, at like forgetting, and the forgetting that models were compared at.

    Args:
        lines: seed -> pairs of lines, with noise and without, models in the order of their steps.
    """

    def numbers(model: Measured) -> tuple[Array, Array]:
        return forgetting(model) - forgetting(base), of(model)

    found = {
        seed: [each for rna, plain in of_seed for each in matches(rna, [base, *plain], numbers)]
        for seed, of_seed in lines.items()
    }
    effect = effect_of(found, of.groups(base), forgetting.groups(base))
    at = [each.at for of_seed in found.values() for each in of_seed]
    return effect and replace(effect, answers=of.share), at


def effect_of(seeds: Mapping[int, Sequence[Match]], groups: Groups, forget_groups: Groups) -> Effect | None:
    """RNA less no noise at like forgetting; None where no seed has a match.

    Args:
        seeds: seed -> its matches, which are averaged.
        groups, forget_groups: how the measure's and the forget questions hang together.
    """
    there = {seed: of_seed for seed, of_seed in seeds.items() if of_seed}
    if not there:
        return None
    rows = {seed: np.mean([each.difference for each in of_seed], axis=0) for seed, of_seed in there.items()}
    place = np.mean([np.mean([each.place for each in of_seed], axis=0) for of_seed in there.values()], axis=0)
    slack = float(np.mean([np.mean([each.slack for each in of_seed]) for of_seed in there.values()]))
    return Effect(rows, groups, place, forget_groups, slack)


def for_machines(table: Table) -> list[dict[str, Any]]:
    """The rows of a comparison for JSON, without name and span: what people read of them stands there in numbers."""
    return [{key: value for key, value in row.items() if key not in ("name", "span")} for row in table.as_json()]

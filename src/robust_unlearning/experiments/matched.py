"""RNA against no noise where both have forgotten as much.

Noise that merely slows the forgetting looks like a cure at equal steps and is none at equal forgetting. So the line of
a method without noise, over its steps, is interpolated to the forgetting of a model with noise, question by question.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from robust_unlearning.report.tables import Table
from robust_unlearning.results.measures import Measured
from robust_unlearning.stats.estimates import Array

LEAST = 0.3
"""Forgetting (nats) that a model must have reached to be compared: before that there is nothing to mend."""


def forgetting(model: Measured) -> float:
    """How much is forgotten: mean -log p of the right option on forget questions, in nats (chance: log 4)."""
    return float(-model.forget_logp.mean())


@dataclass(frozen=True)
class Place:
    """A place on a line of models, one a step: `share` of the way from the one at `index` to the next."""

    index: int
    share: float

    def of(self, values: Sequence[Array]) -> Array:
        """The models' values interpolated to this place, question by question."""
        return (1 - self.share) * values[self.index] + self.share * values[self.index + 1]


def place_on(line: Sequence[float], wanted: float, *, rising: bool = False) -> Place | None:
    """Where on a line of forget strengths `wanted` lies first; None where the line does not get there.

    Args:
        rising: count only neighbours of which the later one has forgotten more.
    """
    for index, (low, high) in enumerate(itertools.pairwise(line)):
        if (low < high and low <= wanted <= high) or (low > high and not rising and high <= wanted <= low):
            return Place(index, (wanted - low) / (high - low))
    return None


def matched_difference(
    rna: Sequence[Measured], plain: Sequence[Measured], where: str, least: float = LEAST
) -> tuple[Array, Array, list[float]] | None:
    """RNA less no noise at like forgetting, question by question, averaged over the steps where both are comparable.

    For each model of `rna` that has forgotten at least `least`, `plain` is interpolated between its two first
    neighbours in step that enclose as much forgetting. None where no step is comparable.

    Returns:
        Differences [n] of excess and of right answers under a forget-token, and the forgetting compared at.
    """
    excess, right, at = [], [], []
    strengths = [forgetting(model) for model in plain]
    for model in rna:
        wanted = forgetting(model)
        place = place_on(strengths, wanted, rising=True)
        if wanted < least or place is None:
            continue
        excess.append(model.places[where].excess - place.of([step.places[where].excess for step in plain]))
        right.append(model.places[where].right - place.of([step.places[where].right for step in plain]))
        at.append(wanted)
    return (np.mean(excess, axis=0), np.mean(right, axis=0), at) if at else None


def for_machines(table: Table) -> list[dict[str, Any]]:
    """The rows of a comparison for JSON, without name and span: what people read of them stands there in numbers."""
    return [{key: value for key, value in row.items() if key not in ("name", "span")} for row in table.as_json()]

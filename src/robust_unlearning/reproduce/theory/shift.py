"""Assumption 4.1 measured: the shift that a forget-token causes in a question's representation.

The paper assumes ε = z_per − z ~ N(0, ηI): no mean, the same variance in every direction, normal. Here ε is taken
at the token that predicts the answer, where forms of unlike length can be compared, so that each question gives one
sample. Samples of one thing asked about, or of one word, are alike, so intervals cluster by both, and whether there is
a mean is told from products of samples that share neither. The same numbers for a control word say what any odd word
does.

Shapes: n questions, d width.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from robust_unlearning.reproduce.theory.normality import LEVEL, normality, share_rejected, zero_mean
from robust_unlearning.stats.estimates import Array, Estimate
from robust_unlearning.stats.factors import Groups
from robust_unlearning.stats.means import mean_interval


@dataclass(frozen=True)
class Shift:
    """What is known of n shifts ε [n, d].

    Attributes:
        eta: η, the variance per dimension.
        relative: ‖ε‖ / ‖z‖.
        mean_share: ‖E ε‖² / E ‖ε‖², without the share that chance gives; 0 under the assumption. Undefined where all
            questions are about one thing.
        mean_rejected: share of dimensions whose mean is not 0 (Student's t, 5 % for all together by Holm).
        not_normal: share of dimensions where normality is rejected at 5 % each; 0.05 under the assumption.
        not_normal_holm: the same at 5 % for all together.
        effective: (tr C)² / tr C², C the covariance of the sample: about how many directions share the variance.
        effective_isotropic: what that would be, for n samples of N(0, ηI).
        n: questions.
    """

    eta: Estimate
    relative: Estimate
    mean_share: Estimate
    mean_rejected: float
    not_normal: float
    not_normal_holm: float
    effective: float
    effective_isotropic: float
    n: int


def describe(shifts: Array, states: Array, groups: Groups | None = None) -> Shift:
    """Test Assumption 4.1 on `shifts` [n, d] of clean `states` [n, d].

    Args:
        groups: how the n questions hang together.

    Raises:
        UserError: fewer than 20 questions.
    """
    n, width = shifts.shape
    p = normality(shifts)
    centred = shifts - shifts.mean(axis=0)
    spectrum = np.linalg.svd(centred, compute_uv=False) ** 2
    norms = np.linalg.norm(shifts, axis=1) / np.linalg.norm(states, axis=1)
    return Shift(
        eta=mean_interval((centred**2).mean(axis=1) * n / (n - 1), groups),
        relative=mean_interval(norms, groups),
        mean_share=_mean_share(shifts, groups or Groups()),
        mean_rejected=share_rejected(zero_mean(shifts)),
        not_normal=float((p < LEVEL).mean()),
        not_normal_holm=share_rejected(p),
        effective=float(spectrum.sum() ** 2 / (spectrum**2).sum()),
        effective_isotropic=width / (1 + (width + 1) / (n - 1)),
        n=n,
    )


def _mean_share(shifts: Array, groups: Groups) -> Estimate:
    """‖E ε‖² / E ‖ε‖² from products of samples that share neither cluster nor word, so that chance alone gives 0.

    The interval is a jackknife's: with θ without question i, (n - 1)(θ - θ_i) is what i adds to the mean, and these
    are clustered as any other numbers are.
    """
    n = len(shifts)
    apart = ~np.eye(n, dtype=bool)
    for labels in (groups.clusters, groups.words):
        if labels is not None and len(set(map(str, labels))) > 1:
            names = np.array([str(label) for label in labels])
            apart &= names[:, None] != names
    products = shifts @ shifts.T
    counted, energy = np.where(apart, products, 0.0), np.trace(products)
    pairs, total = apart.sum(), counted.sum()
    if not pairs or (pairs - 2 * apart.sum(axis=1) <= 0).any():
        return Estimate(None, n=n, note="no two questions that share neither thing nor word")
    value = float(total / pairs / (energy / n))
    without = (total - 2 * counted.sum(axis=1)) / (pairs - 2 * apart.sum(axis=1))
    without = without / ((energy - np.diag(products)) / (n - 1))
    added = (n - 1) * (value - without)
    return mean_interval(value + added - added.mean(), groups)

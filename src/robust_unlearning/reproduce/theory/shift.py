"""Assumption 4.1 measured: the shift that a forget-token causes in a question's representation.

The paper assumes ε = z_per − z ~ N(0, ηI): no mean, the same variance in every direction, normal. Here ε is taken
at the token that predicts the answer, where forms of unlike length can be compared, so that each question gives one
independent sample. The same numbers for a control word say what any odd word does.

Shapes: n questions, d width.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from robust_unlearning.reproduce.theory.normality import LEVEL, normality, share_rejected, zero_mean
from robust_unlearning.stats.estimates import Array, Estimate
from robust_unlearning.stats.means import mean_interval


@dataclass(frozen=True)
class Shift:
    """What is known of n shifts ε [n, d].

    Attributes:
        eta: η, the variance per dimension.
        relative: ‖ε‖ / ‖z‖.
        mean_share: ‖E ε‖² / E ‖ε‖², without the share that chance gives; 0 under the assumption.
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


def describe(shifts: Array, states: Array) -> Shift:
    """Test Assumption 4.1 on `shifts` [n, d] of clean `states` [n, d].

    Raises:
        UserError: fewer than 20 questions.
    """
    n, width = shifts.shape
    p = normality(shifts)
    centred = shifts - shifts.mean(axis=0)
    spectrum = np.linalg.svd(centred, compute_uv=False) ** 2
    norms = np.linalg.norm(shifts, axis=1) / np.linalg.norm(states, axis=1)
    return Shift(
        eta=mean_interval((centred**2).mean(axis=1) * n / (n - 1)),
        relative=mean_interval(norms),
        mean_share=_mean_share(shifts),
        mean_rejected=share_rejected(zero_mean(shifts)),
        not_normal=float((p < LEVEL).mean()),
        not_normal_holm=share_rejected(p),
        effective=float(spectrum.sum() ** 2 / (spectrum**2).sum()),
        effective_isotropic=width / (1 + (width + 1) / (n - 1)),
        n=n,
    )


def _mean_share(shifts: Array) -> Estimate:
    """‖E ε‖² / E ‖ε‖² from products of different samples, so that noise alone gives 0; a jackknife interval."""
    n = len(shifts)
    total, energy = shifts.sum(axis=0), (shifts**2).sum(axis=1)

    def share(sums: Array, energies: Array, count: int) -> Array:
        return ((sums**2).sum(axis=-1) - energies) / (count - 1) / energies

    value = float(share(total, energy.sum(), n))
    without = share(total - shifts, energy.sum() - energy, n - 1)
    error = float(np.sqrt((n - 1) / n * ((without - without.mean()) ** 2).sum()))
    return Estimate(value, value - 1.96 * error, value + 1.96 * error, error, n)

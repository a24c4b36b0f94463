"""Theorem 4.2 measured: the change of a model's output when its hidden states at layer l are perturbed.

For ε ~ N(0, ηI) on every token of layer l, the theorem says Δ = f(z + ε) − f(z) ~ N(0, ηJᵀJ) (J in the paper's
layout, a column an output). That is exact where f is linear and a first-order statement elsewhere. Here f is what the
LM head reads at the last token [d], and Jε for the same draws of ε, a sample of N(0, ηJᵀJ) itself, stands in for the
matrix, which is never formed: sampling noise is then the same on both sides.

Shapes: b prompts, t tokens, d width, o outputs, N draws.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from robust_unlearning.analyze.derivatives import Function, gaussian, jvp
from robust_unlearning.reproduce.theory.normality import LEVEL, normality
from robust_unlearning.stats.estimates import Array


@dataclass(frozen=True)
class OutputChange:
    """Δ against Jε at one η, a number a prompt [b].

    Attributes:
        variance: tr Cov Δ / tr(ηJᵀJ), the trace by the same draws; 1 under the theorem.
        mean: ‖E Δ‖² / tr(ηJᵀJ), without what chance gives; 0 under the theorem.
        residual: E ‖Δ − Jε‖² / E ‖Jε‖²: the part of the change that the first order does not see.
        covariance: ‖Cov Δ − Cov Jε‖_F / ‖Cov Jε‖_F; 0 under the theorem.
        not_normal: share of outputs whose Δ is not normal at 5 % each; 0.05 under the theorem.
        spread: tr Cov Δ itself, of which the paper says that it grows with η.
    """

    variance: Array
    mean: Array
    residual: Array
    covariance: Array
    not_normal: Array
    spread: Array


def output_change(
    function: Function, at: Tensor, mask: Tensor, etas: Sequence[float], draws: int, generator: torch.Generator
) -> list[OutputChange]:
    """Compare Δ with Jε at each η, with the same unit draws for all.

    Args:
        function: [b, t, d] -> [b, o].
        at: z [b, t, d].
        mask: [b, t], 1 on tokens.
        draws: N, at least 20.

    Raises:
        UserError: fewer than 20 draws.
    """
    with torch.no_grad():
        still = function(at)
        linear, changes = [], []
        for _ in range(draws):
            noise = gaussian(at, mask, generator)
            linear.append(jvp(function, at, noise))
            changes.append(torch.stack([function(at + eta**0.5 * noise) - still for eta in etas]))
    first = torch.stack(linear).cpu().double().numpy()  # [N, b, o]
    change = torch.stack(changes).cpu().double().numpy()  # [N, etas, b, o]
    return [compare(change[:, index], eta**0.5 * first) for index, eta in enumerate(etas)]


def compare(change: Array, first: Array) -> OutputChange:
    """Δ and Jε, both [N, b, o], of the same draws."""
    draws = len(change)
    energy, linear = (change**2).sum(axis=-1).mean(axis=0), (first**2).sum(axis=-1).mean(axis=0)
    of_mean = ((change.sum(axis=0) ** 2).sum(axis=-1) - draws * energy) / (draws * (draws - 1))
    seen, expected = _covariance(change), _covariance(first)
    return OutputChange(
        variance=(energy - of_mean) / linear,
        mean=of_mean / linear,
        residual=((change - first) ** 2).sum(axis=-1).mean(axis=0) / linear,
        covariance=np.linalg.norm(seen - expected, axis=(1, 2)) / np.linalg.norm(expected, axis=(1, 2)),
        not_normal=(normality(change) < LEVEL).mean(axis=-1),
        spread=energy - of_mean,
    )


def _covariance(samples: Array) -> Array:
    """[N, b, o] -> [b, o, o]."""
    centred = samples - samples.mean(axis=0)
    return np.einsum("nbi,nbj->bij", centred, centred) / (len(samples) - 1)

"""Eq. 5 to 9 measured: does noise on the hidden states of forget text raise its loss, and by the trace alone?

The paper takes ℓ(y | z + v) for v ~ N(0, μI) to second order: E ℓ(z + v) ≈ ℓ(z) + μ/2 · Tr ∇²ℓ (Eq. 9), and assumes
that ∇²ℓ is positive definite. Here the trace is estimated (mean of vᵀ∇²ℓv over K probes v ~ N(0, I) on every token;
Hutchinson), with its sign, and the predicted change is set beside the one observed with the same v. Observed changes
are means over v and −v: the first-order term, whose mean is 0, then drops out draw by draw.

Shapes: b documents, t tokens, d width, K probes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from robust_unlearning.analyze.derivatives import Function, curvature, gaussian
from robust_unlearning.stats.estimates import Array


@dataclass(frozen=True)
class LossChange:
    """One number a document.

    Attributes:
        loss: ℓ [b].
        trace: estimated Tr ∇²ℓ [b].
        predicted: μ/2 · Tr ∇²ℓ [scales, b].
        observed: E ℓ(z + v) − ℓ(z) [scales, b].
    """

    loss: Array
    trace: Array
    predicted: Array
    observed: Array


def loss_change(
    losses: Function, at: Tensor, mask: Tensor, variances: Sequence[float], probes: int, generator: torch.Generator
) -> LossChange:
    """Predicted and observed change of each document's loss under latent noise.

    Args:
        losses: [b, t, d] -> [b], the loss of each document.
        at: z [b, t, d].
        mask: [b, t], 1 on tokens.
        variances: μ, several.
        probes: K.
    """
    directions = [gaussian(at, mask, generator) for _ in range(probes)]
    values, products = curvature(losses, at, directions)
    trace = products.mean(dim=0)
    observed = []
    with torch.no_grad():
        still = losses(at)
        for variance in variances:
            moved = [losses(at + sign * variance**0.5 * each) for each in directions for sign in (1, -1)]
            observed.append((torch.stack(moved) - still).mean(dim=0))
    predicted = torch.stack([variance / 2 * trace for variance in variances])
    return LossChange(*(each.cpu().double().numpy() for each in (values, trace, predicted, torch.stack(observed))))

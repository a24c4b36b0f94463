"""Jacobian-vector products and curvature of a model's parts, without ever forming a Jacobian or a Hessian.

The items of a batch do not see each other, so Jacobian and Hessian are block-diagonal: one product serves every
item of the batch.

Shapes: b items, t tokens, d width; K probes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

Function = Callable[[Tensor], Tensor]


@torch.no_grad()
def jvp(function: Function, at: Tensor, along: Tensor) -> Tensor:
    """J(at)·along by forward-mode differentiation; attention runs in its plain form, the only one that has it."""
    with sdpa_kernel(SDPBackend.MATH):
        return torch.func.jvp(function, (at,), (along,))[1]


def gradients(losses: Function, at: Tensor) -> tuple[Tensor, Tensor]:
    """Losses [b] and their gradients [b, t, d] at `at`."""
    with torch.enable_grad():
        point = at.detach().requires_grad_(True)
        values = losses(point)
        (gradient,) = torch.autograd.grad(values.sum(), point)
    return values.detach(), gradient


def curvature(losses: Function, at: Tensor, probes: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Losses [b] at `at` and vᵀHv [K, b] for each of K probes v [b, t, d], H the Hessian of an item's loss.

    The mean over probes with E vvᵀ = I estimates the trace of H (Hutchinson).
    """
    with sdpa_kernel(SDPBackend.MATH), torch.enable_grad():
        point = at.detach().requires_grad_(True)
        values = losses(point)
        (gradient,) = torch.autograd.grad(values.sum(), point, create_graph=True)
        products = []
        for probe in probes:
            (product,) = torch.autograd.grad(gradient, point, probe, retain_graph=True)
            products.append((product * probe).flatten(1).sum(dim=1))
    return values.detach(), torch.stack(products)


def gaussian(like: Tensor, mask: Tensor, generator: torch.Generator) -> Tensor:
    """N(0, I) noise [b, t, d] on unmasked tokens, 0 elsewhere; drawn on the CPU, so that a seed means the same
    everywhere.
    """
    noise = torch.randn(like.shape, generator=generator, dtype=torch.float32)
    return noise.to(like.device, like.dtype) * mask[..., None].to(like.device, like.dtype)


def squares(values: Tensor, mask: Tensor) -> Tensor:
    """Sum of squares [b] over unmasked tokens of [b, t, d]."""
    return (values.square().sum(dim=-1) * mask).sum(dim=1)

"""The LM head in chunks: losses over the vocabulary whose memory does not grow with tokens × vocabulary.

Every loss here is a function of one token's logits. So the head is applied to some rows at a time, their losses
and the gradients to their hidden states are taken at once, and the logits are forgotten before the next rows.
The head itself is frozen: no gradient is made for it.

Shapes: n tokens, d width, V size of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

CHUNK_BYTES = 64 * 1024**2
"""Logits held at a time, in float32."""

RowLoss = Callable[[Tensor, slice], Tensor]
"""Logits [rows, V] and which rows they are -> losses [rows]."""


def losses_by_row(hidden: Tensor, head: Callable[[Tensor], Tensor], loss: RowLoss, vocabulary: int) -> Tensor:
    """`loss(head(hidden), …)` [n], chunk by chunk, differentiable once with respect to `hidden` [n, d].

    Args:
        hidden: [n, d] what the head reads.
        head: hidden states -> logits [rows, V]; its weights get no gradient.
        loss: the loss of each row from its logits alone.
        vocabulary: V, which decides how many rows a chunk has.
    """
    rows = max(1, CHUNK_BYTES // (4 * vocabulary))
    return _ByRow.apply(hidden, head, loss, rows)


class _ByRow(torch.autograd.Function):
    """Forward takes the gradients too, while it has the logits; backward only scales them."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Any, loss: RowLoss, rows: int) -> Tensor:
        wanted = ctx.needs_input_grad[0]
        values, gradients = [], []
        for first in range(0, max(1, len(hidden)), rows):  # no rows, no losses
            chunk = slice(first, min(first + rows, len(hidden)))
            part = hidden[chunk].detach().requires_grad_(wanted)
            with torch.set_grad_enabled(wanted):
                own = loss(head(part), chunk)
                if wanted:
                    gradients.append(torch.autograd.grad(own.sum(), part)[0])
            values.append(own.detach())
        if wanted:
            ctx.save_for_backward(torch.cat(gradients))
        return torch.cat(values)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (gradients,) = ctx.saved_tensors
        return gradients * grad[:, None].to(gradients.dtype), None, None, None

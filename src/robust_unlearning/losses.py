"""Pure loss functions, one per formula: tensors in, scalar out.

Shapes: b sequences of a batch, t tokens of a sequence, d width of the hidden state.
Every mean is over all unmasked tokens of the batch together, in float32 whatever the inputs' type.
"""

from __future__ import annotations

import torch
from torch import Tensor


def hidden_mse(hidden: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    r"""Mean squared distance between hidden states and a target, over unmasked tokens and over d.

    .. math:: \frac{1}{d\,\sum m} \sum_{b,t} m_{b,t} \lVert z_{b,t} - y_{b,t} \rVert_2^2

    Both terms of Eq. 2 of the paper. The paper prints the squared norm, a sum over d; the mean over d is what
    its weights (retain weight 1200) and coefficients (c = 6.5) were tuned with.

    Args:
        hidden: [b, t, d] hidden states.
        target: [b, t, d], or anything that broadcasts to it ([d] for one steering vector).
        mask: [b, t], 1 for a token and 0 for padding.

    Returns:
        A scalar in squared units of the hidden state.

    Raises:
        ValueError: the mask has no token, or its shape is not that of the hidden states.
    """
    if mask.shape != hidden.shape[:-1]:
        raise ValueError(f"mask has shape {tuple(mask.shape)}, hidden states {tuple(hidden.shape)}")
    weight = mask.to(torch.float32)
    tokens = weight.sum()
    if tokens == 0:
        raise ValueError("the mask leaves no token to average over")
    squared = (hidden.float() - target.float()).square().mean(dim=-1)
    return squared.masked_fill(weight == 0, 0).sum() / tokens

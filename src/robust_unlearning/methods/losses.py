"""Pure loss functions, one per formula: tensors in, scalar out.

Shapes: b sequences of a batch, t tokens of a sequence, d width of the hidden state, V size of the vocabulary.
Means over tokens are over all unmasked tokens of the batch together, in float32 at least whatever the inputs' type.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

Direction = Literal["reference_to_model", "model_to_reference"]


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
    return _token_mean((_wide(hidden) - _wide(target)).square().mean(dim=-1), mask)


def npo(logp: Tensor, ref_logp: Tensor, beta: float) -> Tensor:
    r"""Negative preference optimisation (Zhang et al. 2024; Eq. 3 of the paper), a mean over the batch.

    .. math:: -\frac{2}{\beta} \log \sigma\left(-\beta \log \frac{\pi_\theta(y)}{\pi_{ref}(y)}\right)

    As β goes to 0 its gradient goes to that of the mean of `logp`: gradient ascent on the forget text.

    Args:
        logp: [b] log-probabilities of the forget sequences, in nats: of whole sequences, or means over tokens.
        ref_logp: [b] the same under the reference.
        beta: temperature, above 0.

    Returns:
        A scalar in nats (through 1/β); 2 log 2 / β at the reference.
    """
    return -2 / beta * logsigmoid(-beta * (logp - ref_logp)).mean()


def simnpo(logp: Tensor, length: Tensor, beta: float, gamma: float) -> Tensor:
    r"""Simple NPO: no reference, the length in its place (Fan et al. 2024; Eq. 4 of the paper).

    .. math:: -\frac{2}{\beta} \log \sigma\left(-\frac{\beta}{|y|} \log \pi_\theta(y) - \gamma\right)

    Args:
        logp: [b] log-probabilities of whole forget sequences, in nats.
        length: [b] tokens of each that are predicted.
        beta: temperature, above 0.
        gamma: margin, at least 0.

    Returns:
        A scalar, the mean over the batch.
    """
    return -2 / beta * logsigmoid(-beta * logp / length - gamma).mean()


def dpo(
    preferred_logp: Tensor, preferred_ref_logp: Tensor, rejected_logp: Tensor, rejected_ref_logp: Tensor, beta: float
) -> Tensor:
    r"""Direct preference optimisation: refusals preferred, forget sequences rejected (Rafailov et al. 2023).

    .. math:: -\frac{2}{\beta} \log \sigma\left(\beta \log \frac{\pi_\theta(y^{idk})}{\pi_{ref}(y^{idk})}
              - \beta \log \frac{\pi_\theta(y)}{\pi_{ref}(y)}\right)

    The factor 2/β is NPO's, so that NPO is DPO without the preferred term; the paper prints no formula.

    Args:
        preferred_logp, preferred_ref_logp: [b] log-probabilities of the refusals, in nats.
        rejected_logp, rejected_ref_logp: [b] those of the forget sequences.
        beta: temperature, above 0.

    Returns:
        A scalar, the mean over the batch; 2 log 2 / β at the reference.
    """
    preferred, rejected = preferred_logp - preferred_ref_logp, rejected_logp - rejected_ref_logp
    return -2 / beta * logsigmoid(beta * (preferred - rejected)).mean()


def token_logp(logits: Tensor, targets: Tensor) -> Tensor:
    """log p [...] of tokens [...] under logits [..., V], by gather minus logsumexp, in float32 or wider."""
    logits = _wide(logits)
    return logits.gather(-1, targets[..., None])[..., 0] - logits.logsumexp(dim=-1)


def token_kl(logits: Tensor, ref_logits: Tensor, direction: Direction) -> Tensor:
    """KL divergence [...] in nats between the next-token distributions of logits [..., V]; see `logit_kl`."""
    own, reference = _wide(logits).log_softmax(dim=-1), _wide(ref_logits).log_softmax(dim=-1)
    if direction == "reference_to_model":
        return (reference.exp() * (reference - own)).sum(dim=-1)
    return (own.exp() * (own - reference)).sum(dim=-1)


def token_mse(logits: Tensor, ref_logits: Tensor) -> Tensor:
    """Mean over the vocabulary [...] of squared differences of log-probabilities; see `logit_mse`."""
    own, reference = _wide(logits).log_softmax(dim=-1), _wide(ref_logits).log_softmax(dim=-1)
    return (own - reference).square().mean(dim=-1)


def logit_kl(logits: Tensor, ref_logits: Tensor, mask: Tensor, direction: Direction = "reference_to_model") -> Tensor:
    r"""Kullback-Leibler divergence between next-token distributions, over unmasked tokens (section 2.2.2).

    `reference_to_model`: :math:`KL(\pi_{ref} \| \pi_\theta)`, as in NPO's and the authors' code;
    `model_to_reference`: :math:`KL(\pi_\theta \| \pi_{ref})`, as the paper writes it.

    Args:
        logits: [b, t, V] of the model.
        ref_logits: [b, t, V] of the reference.
        mask: [b, t], 1 where a next token is predicted.

    Returns:
        A scalar in nats, at least 0, and 0 at the reference.
    """
    return _token_mean(token_kl(logits, ref_logits, direction), mask)


def logit_mse(logits: Tensor, ref_logits: Tensor, mask: Tensor) -> Tensor:
    r"""Mean squared difference of log-probabilities, over unmasked tokens and the vocabulary (section 2.2.2).

    .. math:: \frac{1}{V \sum m} \sum_{b,t} m_{b,t} \lVert \log \pi_\theta - \log \pi_{ref} \rVert_2^2

    The paper prints the squared norm, a sum over V; the mean is what its retain weights were tuned with.

    Args:
        logits: [b, t, V] of the model.
        ref_logits: [b, t, V] of the reference.
        mask: [b, t], 1 where a next token is predicted.

    Returns:
        A scalar in nats².
    """
    return _token_mean(token_mse(logits, ref_logits), mask)


def _wide(values: Tensor) -> Tensor:
    """In float32, or as they are where they are wider."""
    return values if values.dtype == torch.float64 else values.float()


def _token_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of values [b, t] over unmasked tokens.

    Raises:
        ValueError: the mask has no token, or not the shape of the values.
    """
    if mask.shape != values.shape:
        raise ValueError(f"mask has shape {tuple(mask.shape)}, values {tuple(values.shape)}")
    weight = mask.to(values.dtype)
    if weight.sum() == 0:
        raise ValueError("the mask leaves no token to average over")
    return values.masked_fill(weight == 0, 0).sum() / weight.sum()

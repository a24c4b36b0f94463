"""One training step, top to bottom.

1. **Batch.** A topic's forget and retain sequences (and refusals), each as a `BatchForward`: its trunk is run once,
   without gradients, for all candidates.
2. **Forget term.** Band under the candidate's weights, then the loss of the method: `objective`, `methods.table`.
3. **Retain term.** Band on retain text against the reference, which RNA perturbs (Algorithm 1): `objective`,
   `methods.noise`.
4. **Weighted sum**, backward pass, sum over the processes, AdamW.

The model itself is only ever called by `engine`; every formula is a function of `methods.losses`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from robust_unlearning.errors import UserError
from robust_unlearning.train.objective import BatchForward, LossTerm, retain_term

if TYPE_CHECKING:
    from robust_unlearning.train.candidate import Candidate


class StepBatch(NamedTuple):
    """What all candidates see in a step: a topic's sequences; refusals where a method prefers them."""

    topic: str
    forget: BatchForward
    retain: BatchForward
    refusals: BatchForward | None = None


@dataclass
class StepLosses:
    """A step's total loss, a scalar with gradients, and the terms it is made of: this process's parts of them."""

    total: Tensor
    forget: LossTerm
    retain: LossTerm


def take_step(candidate: Candidate, batch: StepBatch) -> StepLosses:
    """Update a candidate once; returns the losses over the batch of all processes.

    Raises:
        UserError: the loss is not finite; the weights are left as they were.
    """
    losses = step_losses(candidate, batch)
    candidate.optimiser.zero_grad(set_to_none=True)
    losses.total.backward()
    sum_over_processes(candidate, losses)
    total, forget, retain = (loss.item() for loss in (losses.total, losses.forget.loss, losses.retain.loss))
    if not math.isfinite(total):
        recipe = candidate.recipe
        raise UserError(
            f"step {candidate.step + 1}, topic {batch.topic}: the loss is not finite (forget {forget:g}, retain "
            f"{retain:g}). Lower learning_rate ({recipe.learning_rate:g}) or "
            f"{getattr(recipe.spec, 'scale_field', 'forget_weight')}."
        )
    candidate.optimiser.step()
    candidate.step += 1
    candidate.recent.setdefault(batch.topic, []).append((total, forget, retain))
    return losses


def step_losses(candidate: Candidate, batch: StepBatch) -> StepLosses:
    """L = w L_forget + α L_retain (Eq. 1) under the candidate's weights, no gradient taken yet."""
    recipe, topic = candidate.recipe, batch.topic
    weights = band_weights(candidate)
    forget = candidate.forget.term(weights, topic, batch.forget, batch.refusals)
    retain = retain_term(recipe, weights, batch.retain, candidate.rna)
    forget_weight, retain_weight = recipe.of_topic(topic, "forget_weight"), recipe.of_topic(topic, "retain_weight")
    return StepLosses(forget_weight * forget.loss + retain_weight * retain.loss, forget, retain)


def band_weights(candidate: Candidate) -> dict[int, dict[str, Tensor]]:
    """The candidate's float32 masters in the model's own type; gradients flow through the cast into the masters."""
    weights: dict[int, dict[str, Tensor]] = {}
    for (layer, name), master in candidate.masters.items():
        weights.setdefault(layer, {})[name] = master.to(candidate.types[layer, name])
    return weights


def sum_over_processes(candidate: Candidate, losses: StepLosses) -> None:
    """Sum gradients and losses over the processes, all in one message; each process has its part of them."""
    if candidate.processes.count == 1:
        return
    gradients = [master.grad for master in candidate.masters.values() if master.grad is not None]
    parts = [*gradients, losses.total.detach(), losses.forget.loss.detach(), losses.retain.loss.detach()]
    sums = candidate.processes.sum(torch.cat([part.flatten().float() for part in parts]))
    for part, total in zip(parts, sums.split([part.numel() for part in parts]), strict=True):
        part.copy_(total.view_as(part))

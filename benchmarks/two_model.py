"""RMU and NPO training with two whole models: the plain way, which the benchmark compares the engine with.

This is how the public releases of RMU and of RNA train, written anew and without this library: the trained
model and a frozen copy of it are both whole causal LMs, both run through every layer and the LM head; a forward
hook keeps the hidden states of one layer on the way (RMU), or the logits are taken whole (NPO with KL). Kept
the same as in the engine, so that the two compute the same numbers: padding on the right, means over unmasked
tokens, the same batches and steering vector. Kinder than the releases: no key-value cache is filled.

Shapes: b sequences, t tokens, d width. Models are laid out as Llama and Mistral are (`model.layers.N`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

Variant = Literal["release", "frozen"]
"""Which parameters of the trained model require gradients: `release`, all; `frozen`, the trained tensors."""


def hidden_states(model: nn.Module, layer: nn.Module, ids: Tensor, mask: Tensor) -> Tensor:
    """The output [b, t, d] of `layer` while the whole `model` reads token ids and mask [b, t]."""
    kept: list[Tensor] = []

    def keep(_module: nn.Module, _args: Any, output: Any) -> None:
        kept.append(output[0] if isinstance(output, tuple) else output)

    handle = layer.register_forward_hook(keep)
    try:
        model(input_ids=ids, attention_mask=mask, use_cache=False)
    finally:
        handle.remove()
    return kept[0]


def masked_mse(hidden: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Mean over unmasked tokens and over d of the squared difference, in float32."""
    squared = (hidden.float() - target.float()).square().mean(dim=-1)
    return (squared * mask).sum() / mask.sum()


class TwoModel:
    """A trained model, its frozen reference and an AdamW over a few `mlp.down_proj` weights.

    Args:
        trained: the causal LM to change.
        reference: another causal LM object with the same weights.
        train_layers: layers whose `mlp.down_proj` is trained.
        retain_weight: α.
        learning_rate: of AdamW.
        weight_decay: of AdamW.
        variant: which parameters of the trained model require gradients.
    """

    def __init__(
        self,
        trained: nn.Module,
        reference: nn.Module,
        *,
        train_layers: Sequence[int],
        retain_weight: float,
        learning_rate: float,
        weight_decay: float,
        variant: Variant,
    ) -> None:
        self.trained, self.reference = trained, reference
        self.retain_weight = retain_weight
        names = [f"model.layers.{each}.mlp.down_proj.weight" for each in train_layers]
        weights = [trained.get_parameter(name) for name in names]
        trained.requires_grad_(variant == "release")
        for weight in weights:
            weight.requires_grad_(True)
        self.optimiser = torch.optim.AdamW(weights, lr=learning_rate, weight_decay=weight_decay)

    def losses(
        self, forget_ids: Tensor, forget_mask: Tensor, retain_ids: Tensor, retain_mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Forget and retain loss, scalars with gradients."""
        raise NotImplementedError

    def step(self, *batch: Tensor) -> tuple[float, float]:
        """One update from a forget and a retain batch (ids and masks [b, t]); its forget and retain loss."""
        forget_loss, retain_loss = self.losses(*batch)
        loss = forget_loss + self.retain_weight * retain_loss
        self.optimiser.zero_grad()  # knows the trained weights only, as in the releases
        loss.backward()
        self.optimiser.step()
        return forget_loss.item(), retain_loss.item()


class TwoModelRMU(TwoModel):
    """RMU.

    Args:
        layer: l, whose output the losses see, from 0.
        direction: [d] the steering vector u, of length 1.
        scale: c, in units of the hidden state.
    """

    def __init__(self, *models: nn.Module, layer: int, direction: Tensor, scale: float, **training: Any) -> None:
        super().__init__(*models, **training)
        self.layers = [model.get_submodule(f"model.layers.{layer}") for model in models]
        self.control = scale * direction

    def losses(
        self, forget_ids: Tensor, forget_mask: Tensor, retain_ids: Tensor, retain_mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Mean squared distances of hidden states to c·u, and to the reference's."""
        hidden = hidden_states(self.trained, self.layers[0], forget_ids, forget_mask)
        kept = hidden_states(self.trained, self.layers[0], retain_ids, retain_mask)
        with torch.no_grad():
            target = hidden_states(self.reference, self.layers[1], retain_ids, retain_mask)
        return masked_mse(hidden, self.control, forget_mask), masked_mse(kept, target, retain_mask)


def log_softmax(model: nn.Module, ids: Tensor, mask: Tensor) -> Tensor:
    """Log-probabilities [b, t - 1, V] of all tokens after each, in float32."""
    return model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1].float().log_softmax(dim=-1)


class TwoModelNPO(TwoModel):
    """NPO of whole sequences with KL(reference || model) on retain text.

    Args:
        temperature: β.
    """

    def __init__(self, *models: nn.Module, temperature: float, **training: Any) -> None:
        super().__init__(*models, **training)
        self.temperature = temperature

    def losses(
        self, forget_ids: Tensor, forget_mask: Tensor, retain_ids: Tensor, retain_mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        """NPO and KL, both models over both batches."""

        def of_sequences(model: nn.Module) -> Tensor:
            each = log_softmax(model, forget_ids, forget_mask).gather(-1, forget_ids[:, 1:, None])[..., 0]
            return (each * forget_mask[:, 1:]).sum(dim=1)

        own = of_sequences(self.trained)
        kept = log_softmax(self.trained, retain_ids, retain_mask)
        with torch.no_grad():
            known = of_sequences(self.reference)
            target = log_softmax(self.reference, retain_ids, retain_mask)
        beta = self.temperature
        pushed = -2 / beta * nn.functional.logsigmoid(-beta * (own - known)).mean()
        divergence = (target.exp() * (target - kept)).sum(dim=-1) * retain_mask[:, 1:]
        return pushed, divergence.sum() / retain_mask[:, 1:].sum()

"""RMU training with two whole models: the plain way, which the benchmark compares the engine with.

This is how the public releases of RMU and of RNA train, written anew and without this library: the trained
model and a frozen copy of it are both whole causal LMs, both run through every layer and the LM head, and a
forward hook keeps the hidden states of one layer on the way. Kept the same as in the engine, so that the two
compute the same numbers: padding on the right, means over unmasked tokens, the same batches and steering
vector. Kinder than the releases: no key-value cache is filled.

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


class TwoModelRMU:
    """A trained model, its frozen reference and an AdamW over a few `mlp.down_proj` weights.

    Args:
        trained: the causal LM to change.
        reference: another causal LM object with the same weights.
        layer: l, whose output the losses see, from 0.
        train_layers: layers whose `mlp.down_proj` is trained.
        direction: [d] the steering vector u, of length 1.
        scale: c, in units of the hidden state.
        retain_weight: α.
        learning_rate: of AdamW.
        weight_decay: of AdamW.
        variant: which parameters of the trained model require gradients.
        noise_std: √ν of RNA on the reference's retain activations; 0 for plain RMU.
    """

    def __init__(
        self,
        trained: nn.Module,
        reference: nn.Module,
        *,
        layer: int,
        train_layers: Sequence[int],
        direction: Tensor,
        scale: float,
        retain_weight: float,
        learning_rate: float,
        weight_decay: float,
        variant: Variant,
        noise_std: float = 0.0,
    ) -> None:
        self.trained, self.reference = trained, reference
        self.layer = trained.get_submodule(f"model.layers.{layer}")
        self.reference_layer = reference.get_submodule(f"model.layers.{layer}")
        self.control = scale * direction
        self.retain_weight = retain_weight
        self.noise_std = noise_std
        names = [f"model.layers.{each}.mlp.down_proj.weight" for each in train_layers]
        weights = [trained.get_parameter(name) for name in names]
        trained.requires_grad_(variant == "release")
        for weight in weights:
            weight.requires_grad_(True)
        self.optimiser = torch.optim.AdamW(weights, lr=learning_rate, weight_decay=weight_decay)

    def step(
        self, forget_ids: Tensor, forget_mask: Tensor, retain_ids: Tensor, retain_mask: Tensor
    ) -> tuple[float, float]:
        """One update from a forget and a retain batch (ids and masks [b, t]); its forget and retain loss."""
        hidden = hidden_states(self.trained, self.layer, forget_ids, forget_mask)
        forget_loss = masked_mse(hidden, self.control, forget_mask)
        kept = hidden_states(self.trained, self.layer, retain_ids, retain_mask)
        with torch.no_grad():
            target = hidden_states(self.reference, self.reference_layer, retain_ids, retain_mask)
            if self.noise_std:
                target = target + self.noise_std * torch.randn_like(target)
        retain_loss = masked_mse(kept, target, retain_mask)
        loss = forget_loss + self.retain_weight * retain_loss
        self.optimiser.zero_grad()  # knows the trained weights only, as in the releases
        loss.backward()
        self.optimiser.step()
        return forget_loss.item(), retain_loss.item()

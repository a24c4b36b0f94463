"""A candidate: one set of band weights with its losses, steering, noise and optimiser, and its resumable state."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from robust_unlearning import files
from robust_unlearning.band import BandEngine, Trunk
from robust_unlearning.corpora import TokenBatch, derived_seed
from robust_unlearning.errors import UserError
from robust_unlearning.losses import hidden_mse
from robust_unlearning.methods import Steering, draw_direction
from robust_unlearning.noise import RandomNoiseAugmentation
from robust_unlearning.runs import RunFolder

Key = tuple[int, str]
"""A trained tensor: layer index, name inside the layer."""


class View:
    """A batch as seen through the engine; each part is computed when first asked for, once for all candidates."""

    def __init__(self, engine: BandEngine, batch: TokenBatch) -> None:
        self.engine = engine
        self.batch = batch

    @cached_property
    def trunk(self) -> Trunk:
        """What enters the band."""
        return self.engine.trunk(self.batch)

    @cached_property
    def reference(self) -> Tensor:
        """The base's hidden states [b, t, d] after the band."""
        return self.engine.reference(self.trunk)

    @property
    def mask(self) -> Tensor:
        """[b, t], 1 for a token and 0 for padding."""
        return self.trunk.mask

    def noised(self, rna: RandomNoiseAugmentation | None) -> Tensor:
        """The reference under RNA. Noise on the band's own output needs no second pass."""
        if rna is None:
            return self.reference
        if rna.site == "block" and rna.layers == (self.engine.last,):
            return rna.noisy(self.reference)
        return self.engine.reference(self.trunk, rna)


@dataclass
class Losses:
    """A step's loss terms (scalars) and the hidden states [b, t, d] they came from."""

    total: Tensor
    forget: Tensor
    retain: Tensor
    forget_hidden: Tensor
    retain_hidden: Tensor


class Candidate:
    """One set of band weights: float32 masters of the trained tensors, their optimiser, steering and noise."""

    def __init__(self, run: RunFolder, base: dict[Key, Tensor], width: int, device: torch.device) -> None:
        self.run = run
        self.recipe = recipe = run.recipe
        self.types = {key: value.dtype for key, value in base.items()}
        self.masters = {key: nn.Parameter(value.detach().float().clone()) for key, value in base.items()}
        self.optimiser = torch.optim.AdamW(
            self.masters.values(),
            lr=recipe.learning_rate,
            weight_decay=recipe.weight_decay,
            fused=device.type == "cuda",
        )
        self.rna: RandomNoiseAugmentation | None = None
        if recipe.noise_scale > 0:
            seed = recipe.seed if recipe.noise_seed is None else recipe.noise_seed
            self.rna = RandomNoiseAugmentation(
                recipe.noised_layers, recipe.noise_scale, derived_seed(seed, "noise"), site=recipe.noise_site
            )
        self.steering = {
            topic: Steering(
                draw_direction(recipe.spec.direction, width, derived_seed(recipe.seed, "steering", topic)).to(device),
                recipe.of_topic(topic, recipe.spec.scale_field),
                keep_first=recipe.coefficient == "first_batch",
            )
            for topic in recipe.topics
        }
        self.step = 0
        self.seconds = 0.0
        self.tokens = 0

    def weights(self) -> dict[int, dict[str, Tensor]]:
        """Band weights in the model's own type; gradients flow through the cast into the masters."""
        weights: dict[int, dict[str, Tensor]] = {}
        for (layer, name), master in self.masters.items():
            weights.setdefault(layer, {})[name] = master.to(self.types[layer, name])
        return weights

    def losses(self, topic: str, forget: View, retain: View) -> Losses:
        """Forget and retain loss of a step (Eq. 1 and 2), no gradient taken yet."""
        recipe, engine = self.recipe, forget.engine
        weights = self.weights()
        hidden = engine.band(forget.trunk, weights)
        known = forget.reference if recipe.spec.needs_reference else None
        target = recipe.spec.target(self.steering[topic], known, forget.mask)
        forget_loss = hidden_mse(hidden, target, forget.mask)
        kept = engine.band(retain.trunk, weights)
        retain_loss = hidden_mse(kept, retain.noised(self.rna), retain.mask)
        total = (
            recipe.of_topic(topic, "forget_weight") * forget_loss
            + recipe.of_topic(topic, "retain_weight") * retain_loss
        )
        return Losses(total, forget_loss.detach(), retain_loss.detach(), hidden.detach(), kept.detach())

    def update(self, topic: str, forget: View, retain: View) -> Losses:
        """One optimiser step.

        Raises:
            UserError: the loss is not finite; the weights are left as they were.
        """
        losses = self.losses(topic, forget, retain)
        if not math.isfinite(losses.total.item()):
            raise UserError(
                f"step {self.step + 1}, topic {topic}: the loss is not finite (forget {losses.forget.item():g}, retain "
                f"{losses.retain.item():g}). Lower learning_rate ({self.recipe.learning_rate:g}) or "
                f"{self.recipe.spec.scale_field}."
            )
        self.optimiser.zero_grad(set_to_none=True)
        losses.total.backward()
        self.optimiser.step()
        self.step += 1
        return losses

    def state(self) -> dict[str, Tensor]:
        """Everything a resumed run needs, as named tensors."""
        state: dict[str, Tensor] = {}
        for (layer, name), master in self.masters.items():
            state[f"master/{layer}/{name}"] = master.detach()
            for entry, value in self.optimiser.state[master].items():
                state[f"optimiser/{layer}/{name}/{entry}"] = value
        for topic, steering in self.steering.items():
            state[f"steering/{topic}/direction"] = steering.direction
            state[f"steering/{topic}/scale"] = torch.tensor(steering.scale, dtype=torch.float64)
            if steering.frozen_norm is not None:
                state[f"steering/{topic}/frozen_norm"] = steering.frozen_norm
        for device, value in (self.rna.state_dict() if self.rna else {}).items():
            state[f"noise/{device}"] = value
        return state

    def save_checkpoint(self) -> None:
        """Write the resumable state, atomically, without pickles; weights that are not finite never replace it."""
        from safetensors.torch import save_file

        if not all(master.isfinite().all() for master in self.masters.values()):
            return

        metadata = {"step": str(self.step), "seconds": repr(self.seconds), "tokens": str(self.tokens)}
        with files.replacing(self.run.checkpoint) as temporary:
            save_file({key: value.contiguous() for key, value in self.state().items()}, temporary, metadata)

    def load_checkpoint(self) -> bool:
        """Continue from the run's checkpoint; False when there is none."""
        from safetensors import SafetensorError, safe_open

        if not self.run.checkpoint.exists():
            self.run.drop_rows_after(0)  # of an earlier start that came to no checkpoint
            return False
        try:
            with safe_open(self.run.checkpoint, framework="pt") as file:
                metadata = file.metadata()
                state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise UserError(f"{self.run.checkpoint} is damaged ({error}); remove it to begin the run again.") from error
        for (layer, name), master in self.masters.items():
            master.data.copy_(state[f"master/{layer}/{name}"])
            prefix = f"optimiser/{layer}/{name}/"
            entries = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
            self.optimiser.state[master] = {
                entry: value if entry == "step" and master.device.type == "cpu" else value.to(master.device)
                for entry, value in entries.items()
            }
        for topic, steering in self.steering.items():
            steering.scale = state[f"steering/{topic}/scale"].item()
            frozen = state.get(f"steering/{topic}/frozen_norm")
            steering.frozen_norm = None if frozen is None else frozen.to(steering.direction.device)
        noise = {key.removeprefix("noise/"): value for key, value in state.items() if key.startswith("noise/")}
        if self.rna:
            self.rna.load_state_dict(noise)
        self.step = int(metadata["step"])
        self.seconds, self.tokens = float(metadata["seconds"]), int(metadata["tokens"])
        self.run.drop_rows_after(self.step)
        return True


@torch.no_grad()
def _compare(hidden: Tensor, reference: Tensor, mask: Tensor) -> tuple[float, float, float]:
    """Mean cosine to the reference, mean L2 norm, and the reference's mean L2 norm, over unmasked tokens."""
    own, base = hidden.float()[mask.bool()], reference.float()[mask.bool()]
    cosine = torch.nn.functional.cosine_similarity(own, base, dim=-1).mean()
    return cosine.item(), own.norm(dim=-1).mean().item(), base.norm(dim=-1).mean().item()


def metrics_row(candidate: Candidate, topic: str, losses: Losses, forget: View, retain: View) -> dict[str, Any]:
    """A line of `metrics.jsonl`: losses in squared units of the hidden state, norms in its units."""
    row: dict[str, Any] = {"step": candidate.step, "topic": topic, "loss": losses.total.item()}
    row |= {"forget_loss": losses.forget.item(), "retain_loss": losses.retain.item()}
    for name, hidden, view in (
        ("forget", losses.forget_hidden, forget),
        ("retain", losses.retain_hidden, retain),
    ):
        cosine, norm, base = _compare(hidden, view.reference, view.mask)
        row |= {f"{name}_cosine": cosine, f"{name}_norm": norm, f"{name}_reference_norm": base}
    row["tokens_per_second"] = candidate.tokens / candidate.seconds if candidate.seconds else 0.0
    row["seconds"] = candidate.seconds
    return row

"""A candidate: one set of band weights with its objective, noise and optimiser, and its resumable state."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from robust_unlearning import files
from robust_unlearning.data.corpora import derived_seed
from robust_unlearning.errors import UserError
from robust_unlearning.methods.noise import RandomNoiseAugmentation
from robust_unlearning.parallel.processes import Processes
from robust_unlearning.run.folder import RunFolder
from robust_unlearning.train.objective import Term, View, forget_objective, retain_term

Key = tuple[int, str]
"""A trained tensor: layer index, name inside the layer."""


@dataclass
class Losses:
    """A step's total loss, a scalar with gradients, and the terms it is made of: this process's parts of them."""

    total: Tensor
    forget: Term
    retain: Term


class Candidate:
    """One set of band weights: float32 masters of the trained tensors, their objective, optimiser and noise."""

    def __init__(self, run: RunFolder, base: dict[Key, Tensor], width: int, processes: Processes) -> None:
        self.run = run
        self.processes = processes
        self.recipe = recipe = run.recipe
        self.types = {key: value.dtype for key, value in base.items()}
        self.masters = {key: nn.Parameter(value.detach().float().clone()) for key, value in base.items()}
        self.optimiser = torch.optim.AdamW(
            self.masters.values(),
            lr=recipe.learning_rate,
            weight_decay=recipe.weight_decay,
            fused=processes.device.type == "cuda",
        )
        self.rna: RandomNoiseAugmentation | None = None
        if recipe.noise_scale > 0:
            seed = recipe.seed if recipe.noise_seed is None else recipe.noise_seed
            self.rna = RandomNoiseAugmentation(
                recipe.noised_layers, recipe.noise_scale, derived_seed(seed, "noise"), site=recipe.noise_site
            )
        self.forget = forget_objective(recipe, width, processes.device)
        self.recent: dict[str, list[tuple[float, float, float]]] = {}
        """Topic -> total, forget and retain loss of each of its steps since the last row of metrics."""
        self.step = 0
        self.seconds = 0.0
        self.tokens = 0

    def weights(self) -> dict[int, dict[str, Tensor]]:
        """Band weights in the model's own type; gradients flow through the cast into the masters."""
        weights: dict[int, dict[str, Tensor]] = {}
        for (layer, name), master in self.masters.items():
            weights.setdefault(layer, {})[name] = master.to(self.types[layer, name])
        return weights

    def losses(self, topic: str, forget: View, retain: View, refusals: View | None = None) -> Losses:
        """Forget and retain loss of a step (Eq. 1), no gradient taken yet."""
        weights = self.weights()
        pushed = self.forget.term(weights, topic, forget, refusals)
        kept = retain_term(self.recipe, weights, retain, self.rna)
        total = (
            self.recipe.of_topic(topic, "forget_weight") * pushed.loss
            + self.recipe.of_topic(topic, "retain_weight") * kept.loss
        )
        return Losses(total, pushed, kept)

    def update(self, topic: str, forget: View, retain: View, refusals: View | None = None) -> Losses:
        """One optimiser step; returns the losses over the batch of all processes.

        Raises:
            UserError: the loss is not finite; the weights are left as they were.
        """
        losses = self.losses(topic, forget, retain, refusals)
        self.optimiser.zero_grad(set_to_none=True)
        losses.total.backward()
        self._add_up(losses)
        total, pushed, kept = (each.item() for each in (losses.total, losses.forget.loss, losses.retain.loss))
        if not math.isfinite(total):
            raise UserError(
                f"step {self.step + 1}, topic {topic}: the loss is not finite (forget {pushed:g}, retain {kept:g}). "
                f"Lower learning_rate "
                f"({self.recipe.learning_rate:g}) or {getattr(self.recipe.spec, 'scale_field', 'forget_weight')}."
            )
        self.optimiser.step()
        self.recent.setdefault(topic, []).append((total, pushed, kept))
        self.step += 1
        return losses

    @property
    def finite(self) -> bool:
        """Whether every trained number is one."""
        return all(bool(master.isfinite().all()) for master in self.masters.values())

    def _add_up(self, losses: Losses) -> None:
        """Sum gradients and losses over the processes, all in one message; each process has its part of them."""
        if self.processes.count == 1:
            return
        gradients = [master.grad for master in self.masters.values() if master.grad is not None]
        parts = [*gradients, losses.total.detach(), losses.forget.loss.detach(), losses.retain.loss.detach()]
        sums = self.processes.sum(torch.cat([part.flatten().float() for part in parts]))
        for part, total in zip(parts, sums.split([part.numel() for part in parts]), strict=True):
            part.copy_(total.view_as(part))

    def state(self) -> dict[str, Tensor]:
        """Everything a resumed run needs, as named tensors."""
        state: dict[str, Tensor] = {}
        for (layer, name), master in self.masters.items():
            state[f"master/{layer}/{name}"] = master.detach()
            for entry, value in self.optimiser.state[master].items():
                state[f"optimiser/{layer}/{name}/{entry}"] = value
        state |= {f"forget/{name}": value for name, value in self.forget.state().items()}
        for device, value in (self.rna.state_dict() if self.rna else {}).items():
            state[f"noise/{device}"] = value
        return state

    def save_checkpoint(self) -> None:
        """Write the resumable state, atomically, without pickles; weights that are not finite never replace it."""
        from safetensors.torch import save_file

        if not self.finite:
            return
        metadata = {"step": str(self.step), "seconds": repr(self.seconds), "tokens": str(self.tokens)}
        with files.replacing(self.run.checkpoint) as temporary:
            save_file({key: value.contiguous() for key, value in self.state().items()}, temporary, metadata)

    def load_checkpoint(self) -> bool:
        """Continue from the run's checkpoint; False when there is none."""
        from safetensors import SafetensorError, safe_open

        if not self.run.checkpoint.exists():
            self._drop_rows()  # of an earlier start that came to no checkpoint
            return False
        try:
            with safe_open(self.run.checkpoint, framework="pt") as file:
                metadata = file.metadata()
                state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise UserError(f"{self.run.checkpoint} is damaged ({error}); remove it to begin the run again.") from error
        for (layer, name), master in self.masters.items():
            master.data.copy_(state[f"master/{layer}/{name}"])
            self.optimiser.state[master] = {
                entry: value if entry == "step" and master.device.type == "cpu" else value.to(master.device)
                for entry, value in _below(f"optimiser/{layer}/{name}/", state).items()
            }
        self.forget.load_state(_below("forget/", state))
        if self.rna:
            device = str(next(iter(self.masters.values())).device)
            for value in _below("noise/", state).values():  # written by the first process, whose card has another name
                self.rna.load_state_dict({device: value})
        self.step = int(metadata["step"])
        self.seconds, self.tokens = float(metadata["seconds"]), int(metadata["tokens"])
        self._drop_rows()
        return True

    def _drop_rows(self) -> None:
        """Forget metrics of steps that will be taken again."""
        if self.processes.first:
            self.run.drop_rows_after(self.step)


def _below(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


@torch.no_grad()
def _compare(hidden: Tensor, reference: Tensor, mask: Tensor) -> tuple[float, float, float]:
    """Mean cosine to the reference, mean L2 norm, and the reference's mean L2 norm, over unmasked tokens."""
    own, base = hidden.float()[mask.bool()], reference.float()[mask.bool()]
    cosine = torch.nn.functional.cosine_similarity(own, base, dim=-1).mean()
    return cosine.item(), own.norm(dim=-1).mean().item(), base.norm(dim=-1).mean().item()


def metrics_row(candidate: Candidate, topic: str, losses: Losses, forget: View, retain: View) -> dict[str, Any]:
    """A line of `metrics.jsonl`: losses in their own units, norms in those of the hidden state.

    All processes must ask for it: means are over the batch of all of them.
    """
    row: dict[str, Any] = {"step": candidate.step, "topic": topic, "loss": losses.total.item()}
    row |= {"forget_loss": losses.forget.loss.item(), "retain_loss": losses.retain.loss.item()}
    parts: dict[str, float] = {}
    for name, term, view in (("forget", losses.forget, forget), ("retain", losses.retain, retain)):
        means = zip(("cosine", "norm", "reference_norm"), _compare(term.hidden, view.reference, view.mask), strict=True)
        parts |= {f"{name}_{kind}": mean * view.token_share for kind, mean in means}
        parts |= {key: value.item() for key, value in term.measures.items()}
    sums = candidate.processes.sum(torch.tensor(list(parts.values()), dtype=torch.float64))
    row |= dict(zip(parts, sums.tolist(), strict=True))
    row["tokens_per_second"] = candidate.tokens / candidate.seconds if candidate.seconds else 0.0
    row["seconds"] = candidate.seconds
    return row

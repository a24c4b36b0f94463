"""A candidate: one set of band weights with its objective, noise and optimiser, and its resumable state."""

from __future__ import annotations

from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from robust_unlearning.data.corpora import derived_seed
from robust_unlearning.errors import UserError
from robust_unlearning.methods.noise import RandomNoiseAugmentation
from robust_unlearning.models.checkpoint import read_tensors, write_tensors
from robust_unlearning.models.layers import Key
from robust_unlearning.parallel.processes import Processes
from robust_unlearning.run.folder import RunFolder
from robust_unlearning.train.objective import below, forget_objective
from robust_unlearning.train.step import StepBatch, StepLosses


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
        if recipe.rna_std > 0:
            seed = derived_seed(recipe.rna_seed, "noise")
            self.rna = RandomNoiseAugmentation(recipe.noised_layers, recipe.rna_std, seed, site=recipe.noise_site)
        self.forget = forget_objective(recipe, width, processes.device)
        self.recent: dict[str, list[tuple[float, float, float]]] = {}
        """Topic -> total, forget and retain loss of each of its steps since the last row of metrics."""
        self.step = 0
        self.seconds = 0.0
        self.tokens = 0

    @property
    def finite(self) -> bool:
        """Whether every trained number is one."""
        return all(bool(master.isfinite().all()) for master in self.masters.values())

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
        if not self.finite:
            return
        metadata = {"step": str(self.step), "seconds": repr(self.seconds), "tokens": str(self.tokens)}
        write_tensors(self.run.checkpoint, self.state(), metadata)

    def load_checkpoint(self) -> bool:
        """Continue from the run's checkpoint; False when there is none."""
        if not self.run.checkpoint.exists():
            self._drop_rows()  # of an earlier start that came to no checkpoint
            return False
        try:
            state, metadata = read_tensors(self.run.checkpoint)
        except SafetensorError as error:
            raise UserError(f"{self.run.checkpoint} is damaged ({error}); remove it to begin the run again.") from error
        for (layer, name), master in self.masters.items():
            master.data.copy_(state[f"master/{layer}/{name}"])
            self.optimiser.state[master] = {
                entry: value if entry == "step" and master.device.type == "cpu" else value.to(master.device)
                for entry, value in below(f"optimiser/{layer}/{name}/", state).items()
            }
        self.forget.load_state(below("forget/", state))
        if self.rna:
            device = str(next(iter(self.masters.values())).device)
            for value in below("noise/", state).values():  # written by the first process, whose card has another name
                self.rna.load_state_dict({device: value})
        self.step = int(metadata["step"])
        self.seconds, self.tokens = float(metadata["seconds"]), int(metadata["tokens"])
        self._drop_rows()
        return True

    def _drop_rows(self) -> None:
        """Forget metrics of steps that will be taken again."""
        if self.processes.is_rank_zero:
            self.run.drop_rows_after(self.step)


def metrics_row(candidate: Candidate, batch: StepBatch, losses: StepLosses) -> dict[str, Any]:
    """A line of `metrics.jsonl` but for its seconds: losses in their own units, norms in those of the hidden state.

    All processes must ask for it: means are over the batch of all of them.
    """
    row: dict[str, Any] = {"step": candidate.step, "topic": batch.topic, "loss": losses.total.item()}
    row |= {"forget_loss": losses.forget.loss.item(), "retain_loss": losses.retain.loss.item()}
    parts: dict[str, float] = {}
    for name, term, forward in (("forget", losses.forget, batch.forget), ("retain", losses.retain, batch.retain)):
        means = _distances(term.hidden, forward.reference, forward.mask)
        parts |= {f"{name}_{measure}": mean * forward.token_share for measure, mean in means.items()}
        parts |= {measure: value.item() for measure, value in term.measures.items()}
    sums = candidate.processes.sum(torch.tensor(list(parts.values()), dtype=torch.float64))
    row |= dict(zip(parts, sums.tolist(), strict=True))
    return row


@torch.no_grad()
def _distances(hidden: Tensor, reference: Tensor, mask: Tensor) -> dict[str, float]:
    """Mean cosine to the reference, mean L2 norm, and the reference's mean L2 norm, over unmasked tokens."""
    hidden, reference = hidden.float()[mask.bool()], reference.float()[mask.bool()]
    cosines = torch.nn.functional.cosine_similarity(hidden, reference, dim=-1)
    means = {"cosine": cosines, "norm": hidden.norm(dim=-1), "reference_norm": reference.norm(dim=-1)}
    return {measure: values.mean().item() for measure, values in means.items()}

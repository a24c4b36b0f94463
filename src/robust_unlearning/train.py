"""The training loop: one or several candidates in lockstep over the same batches, trunk and reference shared.

A candidate is one set of band weights with its method, weights of the losses, noise and optimiser. An ordinary
run has one; candidates that agree on model, layers, data and seed can be trained together, and each then gives
the same delta, to the bit, as if it had been alone.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from robust_unlearning import files, models
from robust_unlearning.band import BandEngine, Trunk
from robust_unlearning.corpora import Corpus, TokenBatch, _seed_of, read_documents
from robust_unlearning.delta import Delta
from robust_unlearning.errors import UserError
from robust_unlearning.layers import match_tensors
from robust_unlearning.losses import hidden_mse
from robust_unlearning.methods import Steering, draw_direction
from robust_unlearning.noise import RandomNoiseAugmentation
from robust_unlearning.recipe import Recipe
from robust_unlearning.runs import DELTA, RunFolder, environment, peak_memory

Key = tuple[int, str]
"""A trained tensor: layer index, name inside the layer."""

OWN_FIELDS = {
    "method", "steering_scale", "steering_unit", "adaptive_scale", "coefficient", "forget_weight", "retain_weight",
    "noise_std", "noise_variance", "noise_layers", "noise_site", "noise_seed", "steps", "learning_rate",
    "weight_decay", "log_every", "checkpoint_every", "snapshots",
}  # fmt: skip
"""Recipe fields in which candidates trained in lockstep may differ."""


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
                recipe.noised_layers, recipe.noise_scale, _seed_of(seed, "noise"), site=recipe.noise_site
            )
        self.steering = {
            topic: Steering(
                draw_direction(recipe.spec.direction, width, _seed_of(recipe.seed, "steering", topic)).to(device),
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
        """Write the resumable state, atomically, without pickles."""
        from safetensors.torch import save_file

        metadata = {"step": str(self.step), "seconds": repr(self.seconds), "tokens": str(self.tokens)}
        with files.replacing(self.run.checkpoint) as temporary:
            save_file({key: value.contiguous() for key, value in self.state().items()}, temporary, metadata)

    def load_checkpoint(self) -> bool:
        """Continue from the run's checkpoint; False when there is none."""
        from safetensors import safe_open

        if not self.run.checkpoint.exists():
            self.run.drop_rows_after(0)  # of an earlier start that came to no checkpoint
            return False
        with safe_open(self.run.checkpoint, framework="pt") as file:
            metadata = file.metadata()
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
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


def _row(candidate: Candidate, topic: str, losses: Losses, forget: View, retain: View) -> dict[str, Any]:
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


class Trainer:
    """Everything that candidates share: model, engine, corpora; then the loop.

    Args:
        runs: their open run folders; the recipes may differ in `OWN_FIELDS` only.

    Raises:
        UserError: the recipes do not fit together, or anything they name cannot be used.
    """

    def __init__(self, runs: Sequence[RunFolder]) -> None:
        self.runs = list(runs)
        self.recipe = recipe = runs[0].recipe
        for run in runs[1:]:
            differing = _shared(run.recipe).items() - _shared(recipe).items()
            if differing:
                fields = ", ".join(sorted(key for key, _ in differing))
                raise UserError(f"{run.path}: cannot be trained in lockstep with {runs[0].path}; differs in {fields}.")
        began = time.perf_counter()
        self.device = models.pick_device(recipe.device)
        self.base = models.resolve(
            recipe.model, allow_pickle=recipe.allow_pickle, trust_remote_code=recipe.trust_remote_code
        )
        tokenizer = models.load_tokenizer(self.base)
        self.corpora = {
            (topic, side): self._corpus(topic, side, tokenizer)
            for topic in recipe.topics
            for side in ("forget", "retain")
        }
        read = time.perf_counter()
        model = models.load_truncated(self.base, recipe.layer + 1, recipe.dtype, self.device)
        lowest = [min([*run.recipe.band_layers, *run.recipe.noised_layers]) for run in runs]
        self.engine = BandEngine(model, min(lowest), recipe.layer)
        self.trained: dict[Key, Tensor] = {
            (layer, name): self.engine.layers[layer].get_parameter(name)
            for layer in recipe.band_layers
            for name in match_tensors(self.engine.layers[layer], recipe.train_tensors)
        }
        path, _ = models.decoder_layers(model)
        self.keys = {(layer, name): self.base.key_of(f"{path}.{layer}.{name}") for layer, name in self.trained}
        self.fingerprint = self.base.fingerprint(self.keys.values())
        self.load_seconds = {"data": read - began, "model": time.perf_counter() - read}
        self.candidates = [Candidate(run, self.trained, self.engine.width, self.device) for run in self.runs]

    def _corpus(self, topic: str, side: str, tokenizer: Any) -> Corpus:
        source = getattr(self.recipe.topics[topic], side) or self.recipe.retain
        assert source is not None  # load_recipe has seen to it
        return Corpus(
            read_documents(source),
            tokenizer,
            max_tokens=self.recipe.of_topic(topic, "max_tokens"),
            batch_size=self.recipe.batch_size,
            order=source.order,
            seed=self.recipe.seed,
            name=f"{topic}/{side}",
        )

    def batches(self, step: int) -> tuple[str, View, View]:
        """Topic, forget batch and retain batch of step `step`, from 0; topics take turns."""
        topics = list(self.recipe.topics)
        topic, number = topics[step % len(topics)], step // len(topics)
        forget, retain = (self.corpora[topic, side].batch(number) for side in ("forget", "retain"))
        return topic, View(self.engine, forget), View(self.engine, retain)

    def _set_scales(self) -> None:
        """Turn scales in units of the hidden norm into absolute ones, from each topic's first forget batch."""
        relative = [each for each in self.candidates if each.recipe.steering_unit == "hidden_norm"]
        if not relative:
            return
        for topic in self.recipe.topics:
            view = View(self.engine, self.corpora[topic, "forget"].batch(0))
            norm = view.reference.float()[view.mask.bool()].norm(dim=-1).mean().item()
            for candidate in relative:
                if candidate.recipe.spec.scale_field == "steering_scale":
                    candidate.steering[topic].scale *= norm

    def train(self, report: Callable[[Candidate, dict[str, Any]], None] | None = None) -> None:
        """Train every candidate to its last step, resuming from checkpoints that are there, and write the folders.

        Args:
            report: called with a candidate and each row that it adds to its metrics.

        Raises:
            UserError: a loss is not finite; the run is marked failed, its last checkpoint and earlier steps kept.
        """
        self._set_scales()
        for candidate in self.candidates:
            candidate.load_checkpoint()
            candidate.run.write_record("running", **self._record(candidate))
        waiting = [each for each in self.candidates if each.step < each.recipe.steps]
        try:
            for step in range(min((each.step for each in waiting), default=0), max(self._lengths(waiting))):
                self._step(step, [each for each in waiting if each.step == step < each.recipe.steps], report)
        except BaseException:
            for candidate in waiting:
                if candidate.run.status == "running":
                    candidate.run.write_record("stopped")
            raise
        for candidate in self.candidates:
            self._finish(candidate)

    @staticmethod
    def _lengths(waiting: Sequence[Candidate]) -> list[int]:
        return [each.recipe.steps for each in waiting] or [0]

    def _step(self, step: int, due: Sequence[Candidate], report: Callable[..., None] | None) -> None:
        began = time.perf_counter()
        topic, forget, retain = self.batches(step)
        tokens = forget.batch.tokens + retain.batch.tokens
        for candidate in due:
            try:
                losses = candidate.update(topic, forget, retain)
            except UserError as error:
                candidate.run.write_record("failed", error=str(error))  # its last checkpoint stays as it is
                raise
            now = time.perf_counter()
            candidate.seconds, candidate.tokens = candidate.seconds + now - began, candidate.tokens + tokens
            began = now
            if candidate.step % candidate.recipe.log_every == 0 or candidate.step == candidate.recipe.steps:
                row = _row(candidate, topic, losses, forget, retain)
                candidate.run.add_row(row)
                if report:
                    report(candidate, row)
            if candidate.step in candidate.recipe.snapshots:
                self.delta(candidate).save(candidate.run.snapshot(candidate.step))
            if candidate.step % candidate.recipe.checkpoint_every == 0:
                candidate.save_checkpoint()

    def delta(self, candidate: Candidate) -> Delta:
        """The candidate's trained tensors under the checkpoint's names and in the checkpoint's types."""
        tensors = {}
        for key, master in candidate.masters.items():
            kind = self.base.tensor(self.keys[key]).dtype
            tensors[self.keys[key]] = master.detach().to("cpu", kind)
        provenance = {
            "model": candidate.recipe.model,
            "fingerprint": self.fingerprint,
            "recipe": json.loads(candidate.recipe.model_dump_json()),
            "recipe_hash": candidate.recipe.content_hash(),
            "step": candidate.step,
        }
        return Delta(tensors, provenance)

    def _record(self, candidate: Candidate) -> dict[str, Any]:
        recipe = candidate.recipe
        trained = {self.keys[key]: list(value.shape) for key, value in candidate.masters.items()}
        return {
            "recipe_hash": recipe.content_hash(),
            "method": recipe.method,
            "noise_std": recipe.noise_scale,
            "noise_variance": recipe.noise_scale**2 if recipe.noise_variance is None else recipe.noise_variance,
            "seeds": {
                "seed": recipe.seed,
                "noise_seed": recipe.seed if recipe.noise_seed is None else recipe.noise_seed,
            },
            "model": recipe.model,
            "model_fingerprint": self.fingerprint,
            "dtype": str(next(iter(self.trained.values())).dtype).removeprefix("torch."),
            "data_fingerprints": {
                topic: {side: self.corpora[topic, side].fingerprint for side in ("forget", "retain")}
                for topic in recipe.topics
            },
            "documents": {
                topic: {side: self.corpora[topic, side].documents for side in ("forget", "retain")}
                for topic in recipe.topics
            },
            "steering_scales": {topic: each.scale for topic, each in candidate.steering.items()},
            "trained_tensors": trained,
            "trained_parameters": sum(math.prod(shape) for shape in trained.values()),
            "environment": environment(str(self.device)),
        }

    def _finish(self, candidate: Candidate) -> None:
        run = candidate.run
        self.delta(candidate).save(run.path / DELTA)
        from safetensors.torch import save_file

        with files.replacing(run.path / "steering.safetensors") as temporary:
            save_file({topic: each.direction.contiguous() for topic, each in candidate.steering.items()}, temporary)
        run.write_record(
            "finished",
            steps=candidate.step,
            seconds={**self.load_seconds, "train": candidate.seconds},
            tokens=candidate.tokens,
            tokens_per_second=candidate.tokens / candidate.seconds if candidate.seconds else None,
            peak_memory=peak_memory(str(self.device)),
        )
        run.write_card()
        run.checkpoint.unlink(missing_ok=True)


def _shared(recipe: Recipe) -> dict[str, str]:
    """What candidates in lockstep must agree on, as comparable text."""
    data = recipe.model_dump(mode="json")
    for topic in data["topics"].values():
        for field in OWN_FIELDS & topic.keys():
            del topic[field]
    return {key: repr(value) for key, value in data.items() if key not in OWN_FIELDS}


def unlearn(
    recipe: Recipe | str | Path,
    out: str | Path,
    *,
    resume: bool = False,
    report: Callable[[Candidate, dict[str, Any]], None] | None = None,
) -> RunFolder:
    """Run one recipe into the folder `out`; a finished run of the same recipe is left as it is.

    Raises:
        UserError: see `load_recipe`, `RunFolder.open` and `Trainer`.
    """
    from robust_unlearning.recipe import load_recipe

    checked = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    run = RunFolder.open(Path(out), checked, resume=resume)
    if run.status != "finished":
        Trainer([run]).train(report)
    return run

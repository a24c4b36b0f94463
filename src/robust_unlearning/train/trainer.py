"""The training loop: one or several candidates in lockstep over the same batches, trunk and reference shared.

A candidate is one set of band weights with its method, weights of the losses, noise and optimiser. An ordinary
run has one; candidates that agree on model, layers, data and seed can be trained together, and each then gives
the same delta, to the bit, as if it had been alone.
"""

from __future__ import annotations

import json
import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from robust_unlearning import files
from robust_unlearning.data.corpora import Corpus, read_corpus
from robust_unlearning.errors import UserError
from robust_unlearning.methods.noise import Draws
from robust_unlearning.methods.table import Preference
from robust_unlearning.models import checkpoint
from robust_unlearning.models.layers import check_layers, match_tensors
from robust_unlearning.parallel.processes import join
from robust_unlearning.recipe import Recipe
from robust_unlearning.run.delta import FILE, Delta
from robust_unlearning.run.folder import RunFolder, environment, peak_memory
from robust_unlearning.train.candidate import Candidate, Key, metrics_row
from robust_unlearning.train.engine import BandEngine
from robust_unlearning.train.objective import View
from robust_unlearning.train.references import References

OWN_FIELDS = {
    "method", "steering_scale", "steering_unit", "adaptive_scale", "coefficient", "forget_weight", "retain_weight",
    "retain_loss", "kl", "temperature", "margin", "log_ratio", "recompute_tail", "noise_std", "noise_variance",
    "noise_layers", "noise_site", "noise_seed", "steps", "learning_rate", "weight_decay", "log_every",
    "checkpoint_every", "snapshots",
}  # fmt: skip
"""Recipe fields in which candidates trained in lockstep may differ."""


class Diverged(UserError):
    """Losses were not finite; what else was trained beside them is finished. `runs`: run folder -> the sentence."""

    def __init__(self, runs: dict[Path, str]) -> None:
        several = len(runs) > 1
        super().__init__("\n".join(f"{path}: {text}" if several else text for path, text in runs.items()))
        self.runs = runs


class Trainer:
    """Everything that candidates share: model, engine, corpora; then the loop.

    Args:
        runs: their open run folders; the recipes may differ in `OWN_FIELDS` only.
        shard: divide the frozen layers among the processes, for models that no card holds.

    Raises:
        UserError: the recipes do not fit together, or anything they name cannot be used.
    """

    def __init__(self, runs: Sequence[RunFolder], *, shard: bool = False) -> None:
        self.runs = list(runs)
        self.recipe = recipe = runs[0].recipe
        for run in runs[1:]:
            differing = shared_fields(run.recipe).items() - shared_fields(recipe).items()
            if differing:
                fields = ", ".join(sorted(key for key, _ in differing))
                raise UserError(f"{run.path}: cannot be trained in lockstep with {runs[0].path}; differs in {fields}.")
        began = time.perf_counter()
        self.processes = join(checkpoint.pick_device(recipe.device))
        self.device, self.shard = self.processes.device, shard
        self.rows = self.processes.rows(recipe.batch_size)
        self.base = checkpoint.resolve(
            recipe.model, allow_pickle=recipe.allow_pickle, trust_remote_code=recipe.trust_remote_code
        )
        tokenizer = checkpoint.load_tokenizer(self.base)
        self.corpora = {
            (topic, side): read_corpus(recipe, topic, side, tokenizer)
            for topic in recipe.topics
            for side in ("forget", "retain")
        }
        asking = [run.recipe.spec for run in runs if isinstance(run.recipe.spec, Preference)]
        if any(spec.needs_refusals for spec in asking):
            self.corpora |= {
                (topic, "refusals"): read_corpus(recipe, topic, "refusals", tokenizer) for topic in recipe.topics
            }
        read = time.perf_counter()
        tail = any(run.recipe.needs_tail for run in runs)
        lowest = min(min([*run.recipe.band_layers, *run.recipe.noised_layers, recipe.layer]) for run in runs)
        model = self._model(tail, lowest)
        self.engine = BandEngine(model, lowest, recipe.layer, tail=tail)
        self.trained: dict[Key, Tensor] = {
            (layer, name): self.engine.layers[layer].get_parameter(name)
            for layer in recipe.band_layers
            for name in match_tensors(self.engine.layers[layer], recipe.train_tensors)
        }
        path, _ = checkpoint.decoder_layers(model)
        self.keys = {(layer, name): self.base.key_of(f"{path}.{layer}.{name}") for layer, name in self.trained}
        self.fingerprint = self.base.fingerprint(self.keys.values())
        self.load_seconds = {"data": read - began, "model": time.perf_counter() - read}
        self.references: dict[tuple[str, str], References] = {}
        if any(spec.needs_reference for spec in asking):
            whole, kind = self.base.fingerprint(self.base.weight_map), str(next(iter(self.trained.values())).dtype)
            sides = {(topic, side): corpus for (topic, side), corpus in self.corpora.items() if side != "retain"}
            self.references = {
                key: References(self.engine, each, whole, kind, self.processes) for key, each in sides.items()
            }
        self.candidates = [Candidate(run, self.trained, self.engine.width, self.processes) for run in self.runs]
        self._draws: dict[int, Draws] = {}
        self._share_draws()

    def _share_draws(self) -> None:
        """Let candidates whose noises have the same seed draw it once."""
        seeds = Counter(each.rna.seed for each in self.candidates if each.rna)
        self._draws = {seed: Draws() for seed, count in seeds.items() if count > 1}
        for candidate in self.candidates:
            if candidate.rna:
                candidate.rna.draws = self._draws.get(candidate.rna.seed)

    def _model(self, tail: bool, lowest: int) -> nn.Module:
        """The base, as far as it is needed, on this process's device; the band begins at layer `lowest`."""
        recipe = self.recipe
        place = torch.device("cpu") if self.shard else self.device
        if tail:
            model = checkpoint.load_causal_lm(self.base, recipe.dtype, place)
            noised = {layer for run in self.runs for layer in run.recipe.noised_layers}
            check_layers(noised, len(checkpoint.decoder_layers(model)[1]), "noise_layers")
        else:
            model = checkpoint.load_truncated(self.base, recipe.layer + 1, recipe.dtype, place)
        if self.shard:
            _, layers = checkpoint.decoder_layers(model)
            self.processes.shard([*layers[:lowest], *layers[recipe.layer + 1 :]])
        return model.to(self.device)

    def batches(self, step: int) -> tuple[str, View, View, View | None]:
        """Topic, forget batch, retain batch and refusals (where needed) of step `step`; topics take turns."""
        topics = list(self.recipe.topics)
        topic, number = topics[step % len(topics)], step // len(topics)
        refusals = self._view(topic, "refusals", number) if (topic, "refusals") in self.corpora else None
        return topic, self._view(topic, "forget", number), self._view(topic, "retain", number), refusals

    def _view(self, topic: str, side: str, number: int) -> View:
        corpus = self.corpora[topic, side]
        places = corpus.places(number)
        known = self.references.get((topic, side))
        logp = known.of(places)[self.rows] if known else None
        return View(self.engine, corpus.collated(places), logp, self.rows)

    def _prepare_references(self, steps: int) -> None:
        """Score the forget sequences (and refusals) of all steps under the base, those that no run has scored yet."""
        began = time.perf_counter()
        numbers = range(math.ceil(steps / len(self.recipe.topics)))
        for (topic, side), references in self.references.items():
            corpus = self.corpora[topic, side]
            references.prepare(place for number in numbers for place in corpus.places(number))
        if self.references:
            self.load_seconds["reference"] = time.perf_counter() - began

    def _set_scales(self) -> None:
        """Turn scales in units of the hidden norm into absolute ones, from each topic's first forget batch."""
        relative = [each for each in self.candidates if each.recipe.steering_unit == "hidden_norm"]
        if not relative:
            return
        for topic in self.recipe.topics:
            view = View(self.engine, self.corpora[topic, "forget"].batch(0))
            norm = view.reference.float()[view.mask.bool()].norm(dim=-1).mean().item()
            for candidate in relative:
                candidate.forget.steering[topic].scale *= norm

    def train(self, report: Callable[[Candidate, dict[str, Any]], None] | None = None) -> None:
        """Train every candidate to its last step, resuming from checkpoints that are there, and write the folders.

        Args:
            report: called with a candidate and each row that it adds to its metrics; in the first process only.

        Raises:
            Diverged: losses, or the last weights, were not finite. Their runs are marked failed, last checkpoints and
                earlier steps kept, and the other runs are finished.
            UserError: a checkpoint is damaged, or of another model or other texts.
        """
        self._set_scales()
        for candidate in self.candidates:
            record = self._record(candidate)
            if candidate.load_checkpoint():
                _check_unchanged(candidate.run.record, record)
            if self.processes.first:
                candidate.run.write_record("running", **record)
        self._check_steps()
        waiting = [each for each in self.candidates if each.step < each.recipe.steps]
        failed: dict[Candidate, str] = {}
        self._prepare_references(max(self._lengths(waiting)))
        try:
            for step in range(min((each.step for each in waiting), default=0), max(self._lengths(waiting))):
                due = [each for each in waiting if each.step == step < each.recipe.steps and each not in failed]
                if due:
                    failed |= self._step(step, due, report)
        except BaseException:
            for candidate in waiting:
                if self.processes.first and candidate.run.status == "running":
                    candidate.run.write_record("stopped")
            raise
        for candidate in self.candidates:
            if candidate not in failed and not candidate.finite:
                failed[candidate] = f"step {candidate.step} left weights that are not finite. Lower learning_rate."
                self._fail(candidate, failed[candidate])
            elif candidate not in failed:
                self.processes.on_first(partial(self._finish, candidate))
        if failed:
            raise Diverged({candidate.run.path: error for candidate, error in failed.items()})

    def _fail(self, candidate: Candidate, error: str) -> None:
        """Mark a run as failed; its last checkpoint stays as it is."""
        if self.processes.first:
            candidate.run.write_record("failed", error=error)

    def _check_steps(self) -> None:
        """See that all processes continue from the same checkpoints."""
        steps = self.processes.gather([[each.step for each in self.candidates]])
        if any(each != steps[0] for each in steps):
            raise UserError(
                f"the processes would go on from unlike steps, {steps}: the run folder must lie on a disk that all "
                "machines share."
            )

    @staticmethod
    def _lengths(waiting: Sequence[Candidate]) -> list[int]:
        return [each.recipe.steps for each in waiting] or [0]

    def _step(self, step: int, due: Sequence[Candidate], report: Callable[..., None] | None) -> dict[Candidate, str]:
        """Update the candidates that are due; returns those whose loss was not finite, with the sentence."""
        failed = {}
        for draws in self._draws.values():
            draws.clear()
        began = time.perf_counter()
        topic, forget, retain, refusals = self.batches(step)
        tokens = forget.whole.tokens + retain.whole.tokens
        for candidate in due:
            try:
                losses = candidate.update(topic, forget, retain, refusals)
            except UserError as error:
                failed[candidate] = str(error)
                self._fail(candidate, failed[candidate])
                continue
            candidate.optimiser.zero_grad(set_to_none=True)  # the others need the memory
            now = time.perf_counter()
            candidate.seconds, candidate.tokens = candidate.seconds + now - began, candidate.tokens + tokens
            began = now
            if candidate.step % candidate.recipe.log_every == 0 or candidate.step == candidate.recipe.steps:
                row = metrics_row(candidate, topic, losses, forget, retain)
                if self.processes.first:
                    candidate.run.add_row(row)
                    if report:
                        report(candidate, row)
                candidate.recent.clear()
            if not self.processes.first:
                continue
            if candidate.step in candidate.recipe.snapshots:
                self.delta(candidate).save(candidate.run.snapshot(candidate.step))
            if candidate.step % candidate.recipe.checkpoint_every == 0:
                candidate.save_checkpoint()
        return failed

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
            "data_fingerprints": self._by_topic(lambda corpus: corpus.fingerprint),
            "documents": self._by_topic(lambda corpus: corpus.documents),
            "steering_scales": {topic: each.scale for topic, each in candidate.forget.steering.items()},
            "trained_tensors": trained,
            "trained_parameters": sum(math.prod(shape) for shape in trained.values()),
            "processes": self.processes.count,
            "sharded": self.shard,
            "environment": environment(str(self.device)),
        }

    def _by_topic(self, value: Callable[[Corpus], Any]) -> dict[str, dict[str, Any]]:
        found: dict[str, dict[str, Any]] = {}
        for (topic, side), corpus in self.corpora.items():
            found.setdefault(topic, {})[side] = value(corpus)
        return found

    def _finish(self, candidate: Candidate) -> None:
        run = candidate.run
        self.delta(candidate).save(run.path / FILE)
        if candidate.forget.steering:
            from safetensors.torch import save_file

            directions = {topic: each.direction.contiguous() for topic, each in candidate.forget.steering.items()}
            with files.replacing(run.path / "steering.safetensors") as temporary:
                save_file(directions, temporary)
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


def _check_unchanged(before: dict[str, Any], now: dict[str, Any]) -> None:
    """Raise a `UserError` when a resumed run would go on with another model or other texts than it began with."""
    for field in ("model_fingerprint", "data_fingerprints", "dtype"):
        if field in before and before[field] != now[field]:
            raise UserError(
                f"cannot resume: {field} was {before[field]} when the run began and is {now[field]} now; bring back "
                "what it began with, or start again in a new --out."
            )


def shared_fields(recipe: Recipe) -> dict[str, str]:
    """What candidates in lockstep must agree on: field -> its value, as comparable text."""
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
    shard: bool = False,
) -> RunFolder:
    """Run one recipe into the folder `out`; a finished run of the same recipe is left as it is.

    In a process that `accelerate launch` or `torchrun` started, the run is that of all processes, each of which
    must call this.

    Args:
        resume: continue an unfinished run that is there.
        report: see `Trainer.train`.
        shard: see `Trainer`.

    Raises:
        UserError: see `load_recipe`, `RunFolder.open` and `Trainer`.
    """
    from robust_unlearning.recipe import load_recipe

    checked = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    processes = join(checkpoint.pick_device(checked.device))
    run = RunFolder(Path(out), checked)
    status = processes.on_first(lambda: RunFolder.open(run.path, checked, resume=resume).status)
    if status != "finished":
        Trainer([run], shard=shard).train(report)
    return run

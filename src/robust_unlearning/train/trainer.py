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
from typing import TYPE_CHECKING, Any

import torch

from robust_unlearning.data.corpora import Sequences
from robust_unlearning.data.sides import read_corpora
from robust_unlearning.errors import UserError
from robust_unlearning.methods.noise import SharedNoise
from robust_unlearning.methods.table import Preference
from robust_unlearning.models import checkpoint
from robust_unlearning.models.layers import check_layers, trained_tensors
from robust_unlearning.parallel.processes import join
from robust_unlearning.recipe import Recipe, load_recipe, shared_fields
from robust_unlearning.run.delta import FILE, Delta
from robust_unlearning.run.folder import RunFolder, environment, peak_memory
from robust_unlearning.train.candidate import Candidate, metrics_row
from robust_unlearning.train.engine import BandEngine
from robust_unlearning.train.objective import BatchForward
from robust_unlearning.train.references import References
from robust_unlearning.train.step import StepBatch, take_step

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Report = Callable[[Candidate, dict[str, Any]], None]
"""Called with a candidate and each row that it adds to its metrics."""


class Diverged(UserError):
    """Losses were not finite; what else was trained beside them is finished. `runs`: run folder -> the sentence."""

    def __init__(self, runs: dict[Path, str]) -> None:
        several = len(runs) > 1
        super().__init__("\n".join(f"{path}: {text}" if several else text for path, text in runs.items()))
        self.runs = runs


class Trainer:
    """Everything that candidates share: model, engine, corpora; then the loop.

    Args:
        runs: their open run folders; the recipes may differ in fields marked `PerCandidate` only.
        shard: divide the frozen layers among the processes, for models that no card holds.

    Raises:
        UserError: the recipes do not fit together, or anything they name cannot be used.
    """

    def __init__(self, runs: Sequence[RunFolder], *, shard: bool = False) -> None:
        self.runs = list(runs)
        self.recipe = recipe = runs[0].recipe
        for run in runs[1:]:
            if differing := shared_fields(run.recipe).items() - shared_fields(recipe).items():
                fields = ", ".join(sorted(key for key, _ in differing))
                raise UserError(f"{run.path}: cannot be trained in lockstep with {runs[0].path}; differs in {fields}.")
        began = time.perf_counter()
        self.processes = join(checkpoint.pick_device(recipe.device))
        self.device, self.shard = self.processes.device, shard
        self.rows = self.processes.rows(recipe.batch_size)
        self.base = checkpoint.resolve(recipe.model, **recipe.model_options)
        tokenizer = checkpoint.load_tokenizer(self.base)
        asking = [run.recipe.spec for run in runs if isinstance(run.recipe.spec, Preference)]
        self.sides = ["forget", "retain", *(["refusals"] if any(spec.needs_refusals for spec in asking) else [])]
        self.corpora = {
            (topic, side): corpus
            for topic in recipe.topics
            for side, corpus in read_corpora(recipe, topic, self.sides, tokenizer).items()
        }
        read = time.perf_counter()
        tail = any(run.recipe.needs_tail for run in runs)
        lowest = min(min([*run.recipe.band_layers, *run.recipe.noised_layers, recipe.layer]) for run in runs)
        model = self._model(tail, lowest)
        self.engine = BandEngine(model, lowest, recipe.layer, tail=tail)
        self.trained = trained_tensors(self.engine.layers, recipe.band_layers, recipe.train_tensors)
        path, _ = checkpoint.decoder_layers(model)
        self.keys = {(layer, name): self.base.key_of(f"{path}.{layer}.{name}") for layer, name in self.trained}
        self.fingerprint = self.base.fingerprint(self.keys.values())
        self.load_seconds = {"data": read - began, "model": time.perf_counter() - read}
        self.references: dict[tuple[str, str], References] = {}
        if any(spec.needs_reference for spec in asking):
            whole, dtype = self.base.fingerprint(self.base.weight_map), str(next(iter(self.trained.values())).dtype)
            for (topic, side), corpus in self.corpora.items():
                if side != "retain":
                    self.references[topic, side] = References(self.engine, corpus, whole, dtype, self.processes)
        self.candidates = [Candidate(run, self.trained, self.engine.width, self.processes) for run in self.runs]
        for topic in recipe.topics:
            first = BatchForward(self.engine, self.corpora[topic, "forget"].batch(0))
            for candidate in self.candidates:
                candidate.forget.settle(topic, first)
        self._shared_noise: dict[int, SharedNoise] = {}
        self._share_noise()

    def _share_noise(self) -> None:
        """Let candidates whose noises have the same seed draw it once."""
        seeds = Counter(each.rna.seed for each in self.candidates if each.rna)
        self._shared_noise = {seed: SharedNoise() for seed, count in seeds.items() if count > 1}
        for candidate in self.candidates:
            if candidate.rna:
                candidate.rna.shared = self._shared_noise.get(candidate.rna.seed)

    def _model(self, tail: bool, lowest: int) -> PreTrainedModel:
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

    def batches(self, step: int) -> StepBatch:
        """What step `step` sees; topics take turns."""
        topics = list(self.recipe.topics)
        topic, number = topics[step % len(topics)], step // len(topics)
        return StepBatch(topic, *(self._forward(topic, side, number) for side in self.sides))

    def _forward(self, topic: str, side: str, number: int) -> BatchForward:
        corpus = self.corpora[topic, side]
        rows = corpus.row_indices(number)
        references = self.references.get((topic, side))
        logp = references.of(rows)[self.rows] if references else None
        return BatchForward(self.engine, corpus.collated(rows), logp, self.rows)

    def _prepare_references(self, steps: int) -> None:
        """Score the forget sequences (and refusals) of all steps under the base, those that no run has scored yet."""
        began = time.perf_counter()
        numbers = range(math.ceil(steps / len(self.recipe.topics)))
        for key, references in self.references.items():
            references.prepare(row for number in numbers for row in self.corpora[key].row_indices(number))
        if self.references:
            self.load_seconds["reference"] = time.perf_counter() - began

    def train(self, report: Report | None = None) -> None:
        """Train every candidate to its last step, resuming from checkpoints that are there, and write the folders.

        Args:
            report: called with a candidate and each row that it adds to its metrics; in the first process only.

        Raises:
            Diverged: losses, or the last weights, were not finite. Their runs are marked failed, last checkpoints and
                earlier steps kept, and the other runs are finished.
            UserError: a checkpoint is damaged, or of another model or other texts.
        """
        for candidate in self.candidates:
            record = self._record(candidate)
            if candidate.load_checkpoint():
                _check_unchanged(candidate.run.record, record)
            if self.processes.is_rank_zero:
                candidate.run.write_record("running", **record)
        self._check_steps()
        waiting = [candidate for candidate in self.candidates if candidate.step < candidate.recipe.steps]
        begin = min((candidate.step for candidate in waiting), default=0)
        end = max((candidate.recipe.steps for candidate in waiting), default=0)
        failed: dict[Candidate, str] = {}
        self._prepare_references(end)
        try:
            for step in range(begin, end):
                due = [each for each in waiting if each.step == step < each.recipe.steps and each not in failed]
                if due:
                    failed |= self.advance(step, due, report)
        except BaseException:
            for candidate in waiting:
                if self.processes.is_rank_zero and candidate.run.status == "running":
                    candidate.run.write_record("stopped")
            raise
        for candidate in self.candidates:
            if candidate not in failed and not candidate.finite:
                failed[candidate] = f"step {candidate.step} left weights that are not finite. Lower learning_rate."
                self._fail(candidate, failed[candidate])
            elif candidate not in failed:
                self.processes.on_rank_zero(partial(self._finish, candidate))
        if failed:
            raise Diverged({candidate.run.path: error for candidate, error in failed.items()})

    def _fail(self, candidate: Candidate, error: str) -> None:
        """Mark a run as failed; its last checkpoint stays as it is."""
        if self.processes.is_rank_zero:
            candidate.run.write_record("failed", error=error)

    def _check_steps(self) -> None:
        """See that all processes continue from the same checkpoints."""
        steps = self.processes.gather([[candidate.step for candidate in self.candidates]])
        if any(other != steps[0] for other in steps):
            raise UserError(
                f"the processes would go on from unlike steps, {steps}: the run folder must lie on a disk that all "
                "machines share."
            )

    def advance(self, step: int, due: Sequence[Candidate], report: Report | None = None) -> dict[Candidate, str]:
        """Take step `step` with the candidates that are due; returns those whose loss was not finite, and why."""
        failed = {}
        for noise in self._shared_noise.values():
            noise.clear()
        began = time.perf_counter()
        batch = self.batches(step)
        tokens = batch.forget.whole.tokens + batch.retain.whole.tokens
        for candidate in due:
            try:
                losses = take_step(candidate, batch)
            except UserError as error:
                failed[candidate] = str(error)
                self._fail(candidate, failed[candidate])
                continue
            candidate.optimiser.zero_grad(set_to_none=True)  # the others need the memory
            ended = time.perf_counter()
            candidate.seconds, candidate.tokens = candidate.seconds + ended - began, candidate.tokens + tokens
            began = ended
            if candidate.step % candidate.recipe.log_every == 0 or candidate.step == candidate.recipe.steps:
                row = metrics_row(candidate, batch, losses)
                if self.processes.is_rank_zero:
                    candidate.run.add_row(row)
                    if report:
                        report(candidate, row)
                candidate.recent.clear()
            if not self.processes.is_rank_zero:
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
            "noise_std": recipe.rna_std,
            "noise_variance": recipe.rna_variance,
            "seeds": {"seed": recipe.seed, "noise_seed": recipe.rna_seed},
            "model": recipe.model,
            "model_fingerprint": self.fingerprint,
            "dtype": str(next(iter(self.trained.values())).dtype).removeprefix("torch."),
            "data_fingerprints": self._by_topic(lambda corpus: corpus.fingerprint),
            "documents": self._by_topic(lambda corpus: corpus.documents),
            "steering_scales": {topic: steering.scale for topic, steering in candidate.forget.steering.items()},
            "trained_tensors": trained,
            "trained_parameters": sum(math.prod(shape) for shape in trained.values()),
            "processes": self.processes.count,
            "sharded": self.shard,
            "environment": environment(str(self.device)),
        }

    def _by_topic(self, value: Callable[[Sequences], Any]) -> dict[str, dict[str, Any]]:
        """Topic -> side -> the value of its corpus."""
        return {topic: {side: value(self.corpora[topic, side]) for side in self.sides} for topic in self.recipe.topics}

    def _finish(self, candidate: Candidate) -> None:
        run, steering = candidate.run, candidate.forget.steering
        self.delta(candidate).save(run.path / FILE)
        if steering:
            directions = {topic: own.direction for topic, own in steering.items()}
            checkpoint.write_tensors(run.path / "steering.safetensors", directions)
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


def unlearn(
    recipe: Recipe | str | Path,
    out: str | Path,
    *,
    resume: bool = False,
    report: Report | None = None,
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
    checked = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    processes = join(checkpoint.pick_device(checked.device))
    run = RunFolder(Path(out), checked)
    status = processes.on_rank_zero(lambda: RunFolder.open(run.path, checked, resume=resume).status)
    if status != "finished":
        Trainer([run], shard=shard).train(report)
    return run

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
from pathlib import Path
from typing import Any

from torch import Tensor

from robust_unlearning import files, models
from robust_unlearning.band import BandEngine
from robust_unlearning.candidate import Candidate, Key, metrics_row
from robust_unlearning.corpora import Corpus, read_documents
from robust_unlearning.delta import Delta
from robust_unlearning.errors import UserError
from robust_unlearning.layers import check_layers, match_tensors
from robust_unlearning.methods import Preference
from robust_unlearning.objective import View
from robust_unlearning.recipe import Recipe, TextSource
from robust_unlearning.references import References
from robust_unlearning.runs import DELTA, RunFolder, environment, peak_memory

OWN_FIELDS = {
    "method", "steering_scale", "steering_unit", "adaptive_scale", "coefficient", "forget_weight", "retain_weight",
    "retain_loss", "kl", "temperature", "margin", "log_ratio", "recompute_tail", "noise_std", "noise_variance",
    "noise_layers", "noise_site", "noise_seed", "steps", "learning_rate", "weight_decay", "log_every",
    "checkpoint_every", "snapshots",
}  # fmt: skip
"""Recipe fields in which candidates trained in lockstep may differ."""


def source_of(recipe: Recipe, topic: str, side: str) -> TextSource:
    """Where a topic's `forget`, `retain` or `refusals` lie: the topic's own, or the recipe's."""
    source = getattr(recipe.topics[topic], side, None) or getattr(recipe, side)
    assert source is not None  # load_recipe has seen to it
    return source


def read_corpus(recipe: Recipe, topic: str, side: str, tokenizer: Any) -> Corpus:
    """A topic's `forget`, `retain` or `refusals`, tokenised.

    Raises:
        UserError: see `read_documents` and `Corpus`.
    """
    source = source_of(recipe, topic, side)
    return Corpus(
        read_documents(source),
        tokenizer,
        max_tokens=recipe.of_topic(topic, "max_tokens"),
        batch_size=recipe.batch_size,
        order=source.order,
        seed=recipe.seed,
        name=f"{topic}/{side}",
    )


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
        if tail:
            model = models.load_causal_lm(self.base, recipe.dtype, self.device)
            noised = {layer for run in runs for layer in run.recipe.noised_layers}
            check_layers(noised, len(models.decoder_layers(model)[1]), "noise_layers")
        else:
            model = models.load_truncated(self.base, recipe.layer + 1, recipe.dtype, self.device)
        lowest = [min([*run.recipe.band_layers, *run.recipe.noised_layers]) for run in runs]
        self.engine = BandEngine(model, min(*lowest, recipe.layer), recipe.layer, tail=tail)
        self.trained: dict[Key, Tensor] = {
            (layer, name): self.engine.layers[layer].get_parameter(name)
            for layer in recipe.band_layers
            for name in match_tensors(self.engine.layers[layer], recipe.train_tensors)
        }
        path, _ = models.decoder_layers(model)
        self.keys = {(layer, name): self.base.key_of(f"{path}.{layer}.{name}") for layer, name in self.trained}
        self.fingerprint = self.base.fingerprint(self.keys.values())
        self.load_seconds = {"data": read - began, "model": time.perf_counter() - read}
        self.references: dict[tuple[str, str], References] = {}
        if any(spec.needs_reference for spec in asking):
            whole, kind = self.base.fingerprint(self.base.weight_map), str(next(iter(self.trained.values())).dtype)
            sides = {(topic, side): corpus for (topic, side), corpus in self.corpora.items() if side != "retain"}
            self.references = {key: References(self.engine, each, whole, kind) for key, each in sides.items()}
        self.candidates = [Candidate(run, self.trained, self.engine.width, self.device) for run in self.runs]

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
        return View(self.engine, corpus.collated(places), known.of(places) if known else None)

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
            report: called with a candidate and each row that it adds to its metrics.

        Raises:
            UserError: a loss is not finite; the run is marked failed, its last checkpoint and earlier steps kept.
        """
        self._set_scales()
        for candidate in self.candidates:
            record = self._record(candidate)
            if candidate.load_checkpoint():
                _check_unchanged(candidate.run.record, record)
            candidate.run.write_record("running", **record)
        waiting = [each for each in self.candidates if each.step < each.recipe.steps]
        self._prepare_references(max(self._lengths(waiting)))
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
        topic, forget, retain, refusals = self.batches(step)
        tokens = forget.batch.tokens + retain.batch.tokens
        for candidate in due:
            try:
                losses = candidate.update(topic, forget, retain, refusals)
            except UserError as error:
                candidate.run.write_record("failed", error=str(error))  # its last checkpoint stays as it is
                raise
            now = time.perf_counter()
            candidate.seconds, candidate.tokens = candidate.seconds + now - began, candidate.tokens + tokens
            began = now
            if candidate.step % candidate.recipe.log_every == 0 or candidate.step == candidate.recipe.steps:
                row = metrics_row(candidate, topic, losses, forget, retain)
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
            "data_fingerprints": self._by_topic(lambda corpus: corpus.fingerprint),
            "documents": self._by_topic(lambda corpus: corpus.documents),
            "steering_scales": {topic: each.scale for topic, each in candidate.forget.steering.items()},
            "trained_tensors": trained,
            "trained_parameters": sum(math.prod(shape) for shape in trained.values()),
            "environment": environment(str(self.device)),
        }

    def _by_topic(self, value: Callable[[Corpus], Any]) -> dict[str, dict[str, Any]]:
        found: dict[str, dict[str, Any]] = {}
        for (topic, side), corpus in self.corpora.items():
            found.setdefault(topic, {})[side] = value(corpus)
        return found

    def _finish(self, candidate: Candidate) -> None:
        run = candidate.run
        self.delta(candidate).save(run.path / DELTA)
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

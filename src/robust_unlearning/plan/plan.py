"""A run's costs from its recipe and the model's config: bytes to read, memory, FLOPs, disk."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from robust_unlearning.methods.table import Preference
from robust_unlearning.models import checkpoint
from robust_unlearning.models.layers import decoder_layers
from robust_unlearning.plan.lengths import Lengths, batch_lengths, config_of
from robust_unlearning.plan.memory import PROCESS, phases, process_bytes, stored_bytes, weight_bytes
from robust_unlearning.plan.meter import Meter
from robust_unlearning.plan.rehearsal import (
    HEAD,
    METRICS,
    SHARED,
    Rehearsal,
    prepare,
    rehearse_scoring,
    rehearse_step,
    types,
    without_data,
)
from robust_unlearning.recipe import Recipe
from robust_unlearning.train.references import BLOCK

CHECKPOINT = "checkpoint, until the run ends"


@dataclass(frozen=True)
class Plan:
    """What a run would cost.

    Attributes:
        model: the model's name.
        title: the method, as tables call it.
        layers: how many layers are loaded, and how many the base has.
        band: first and last layer of the band.
        dtype: type of the forward pass.
        device: `cpu`, `cuda` or `mps`.
        steps, points: updates of a candidate; candidates trained side by side.
        lengths: side -> lengths of its batches; `lengths_from` says where they come from.
        trained: trained parameters of one candidate.
        process: resident bytes of a process that has no model.
        read: part -> bytes of the checkpoint that are read into the model.
        again: bytes read once more for fingerprints.
        memory: phase -> part -> bytes on the device at that phase's peak.
        host: phase -> part -> bytes in the host's memory, where the device is another; empty on a CPU.
        flops: part -> floating-point operations of one step, mean over the run, all points.
        once: the same for what is done once a run.
        disk: file -> bytes; the checkpoint is there only while the run is unfinished.
    """

    model: str
    title: str
    layers: tuple[int, int]
    band: tuple[int, int]
    dtype: str
    device: str
    steps: int
    points: int
    lengths: dict[str, Lengths]
    lengths_from: str
    trained: int
    process: int
    read: dict[str, int]
    again: int
    memory: dict[str, dict[str, int]]
    host: dict[str, dict[str, int]]
    flops: dict[str, float]
    once: dict[str, float]
    disk: dict[str, int]

    @property
    def peak_phase(self) -> str:
        """The phase whose memory is greatest."""
        return max(self.memory, key=lambda phase: sum(self.memory[phase].values()))

    @property
    def peak(self) -> int:
        """Bytes on the device at the greatest phase."""
        return sum(self.memory[self.peak_phase].values())

    @property
    def total_flops(self) -> float:
        """Floating-point operations of the whole run."""
        return self.steps * sum(self.flops.values()) + sum(self.once.values())

    def seconds(self, flops_per_second: float, bytes_per_second: float) -> dict[str, float]:
        """Seconds of reading and of computing at sustained rates."""
        return {
            "reading": (sum(self.read.values()) + self.again) / bytes_per_second,
            "once": sum(self.once.values()) / flops_per_second,
            "steps": self.steps * sum(self.flops.values()) / flops_per_second,
        }

    def as_dict(self) -> dict[str, Any]:
        """All of it, JSON-able; `process` stands there as `floor`."""
        fields = asdict(self)
        fields["floor"] = fields.pop("process")
        return fields | {"peak_phase": self.peak_phase, "peak_bytes": self.peak, "total_flops": self.total_flops}


def make_plan(recipe: Recipe, *, config: Path | None = None, points: int = 1, process: int | None = None) -> Plan:
    """The costs of a run, or of `points` runs trained side by side.

    Args:
        config: a config.json or a folder with one, in place of the recipe's model.
        points: candidates over one trunk; each has masters, moments and gradients of its own, and they take turns
            with activations.
        process: resident bytes of a process without a model; measured in this one when left out.

    Raises:
        UserError: no config, layers or tensors that the model has not, or a forward pass that depends on values.
    """
    base = config_of(recipe, config)
    device = checkpoint.pick_device("auto").type if recipe.device == "auto" else recipe.device.partition(":")[0]
    lengths, lengths_from = batch_lengths(recipe, base)
    scored = _scored(recipe, lengths)
    _, dtype = types(recipe, base)
    if process is None:
        process = process_bytes(dtype)
    with without_data(recipe.model):
        rehearsal = prepare(recipe, base)
        step = rehearse_step(rehearsal, {side: length.widest for side, length in lengths.items()})
        scoring = {side: rehearse_scoring(rehearsal, lengths[side].widest) for side in scored}
        read, every = stored_bytes(rehearsal)
        memory = phases(rehearsal, step, scoring, points)
        weights = weight_bytes(rehearsal)
    trained = sum(value.numel() for value in rehearsal.trained.values())
    host: dict[str, dict[str, int]] = {}
    if device != "cpu":  # made in the host's memory, then moved
        hashed = {part: size for part, size in memory.pop("fingerprint").items() if part not in weights}
        saved = {"masters and moments, copied": 12 * trained}
        host = {"loading": memory["loading"], "fingerprint": hashed, "saving a checkpoint": saved}
        memory["loading"] = weights
    for parts_of in [memory] if device == "cpu" else [host]:
        parts_of.update({phase: {PROCESS: process} | parts for phase, parts in parts_of.items()})
    return Plan(
        model=base.name,
        title=recipe.title,
        layers=(len(decoder_layers(rehearsal.model)[1]), rehearsal.depth),
        band=(rehearsal.engine.first, rehearsal.engine.last),
        dtype=str(dtype).removeprefix("torch."),
        device=device,
        steps=recipe.steps,
        points=points,
        lengths=lengths,
        lengths_from=lengths_from,
        trained=trained,
        process=process,
        read=read,
        again=trained * rehearsal.stored.itemsize + (sum(every) if scored else 0),
        memory=memory,
        host=host,
        flops=_step_flops(recipe, step, lengths, points),
        once=_once_flops(scoring, lengths, scored),
        disk=_disk(rehearsal, scored, points),
    )


def _step_flops(recipe: Recipe, step: Meter, lengths: Mapping[str, Lengths], points: int) -> dict[str, float]:
    """FLOPs of a mean step by part: those of the widest batch, scaled to the lengths of the run's batches."""
    by_part: dict[str, float] = defaultdict(float)
    for (side, part), flops in step.flops.items():
        length = lengths[side]
        if part == HEAD:
            mean = flops.linear * length.predicted / (recipe.batch_size * (length.widest - 1))
        else:
            mean = length.mean_flops(flops) / (recipe.log_every if part == METRICS else 1)
        by_part[part] += mean * (1 if part in SHARED else points)
    return dict(by_part)


def _once_flops(
    scoring: Mapping[str, Meter], lengths: Mapping[str, Lengths], scored: Mapping[str, int]
) -> dict[str, float]:
    """FLOPs of what is done once: reference log-probabilities, unless an earlier run has left them."""
    return {
        f"reference log-probabilities, {side}": scored[side] * sum(map(lengths[side].mean_flops, meter.flops.values()))
        for side, meter in scoring.items()
    }


def _scored(recipe: Recipe, lengths: Mapping[str, Lengths]) -> dict[str, int]:
    """Sides whose reference log-probabilities a run needs -> in how many blocks of sequences."""
    if not (isinstance(recipe.spec, Preference) and recipe.spec.needs_reference):
        return {}
    return {side: length.blocks for side, length in lengths.items() if side != "retain"}


def _disk(rehearsal: Rehearsal, scored: Mapping[str, int], points: int) -> dict[str, int]:
    """Bytes a run leaves, headers of the files left out."""
    recipe = rehearsal.recipe
    trained = sum(value.numel() for value in rehearsal.trained.values())
    delta = trained * rehearsal.stored.itemsize
    disk = {"delta, in the checkpoint's type": delta * points}
    if recipe.snapshots:
        disk["snapshots"] = delta * len(recipe.snapshots) * points
    if not isinstance(recipe.spec, Preference):
        disk["steering vectors"] = 4 * rehearsal.engine.width * len(recipe.topics) * points
    if scored:
        disk["reference log-probabilities, in the cache"] = 8 * BLOCK * sum(scored.values())
    disk[CHECKPOINT] = 12 * trained * points
    return disk


@dataclass(frozen=True)
class Change:
    """A change of the recipe, as one would type it, and what the run would then take.

    Attributes:
        text: what to add to the command.
        peak: bytes on the device.
    """

    text: str
    peak: int


def changes(recipe: Recipe, plan: Plan, *, config: Path | None = None) -> list[Change]:
    """Changes that may make a run smaller, one by one, then all that keep its method together; each planned anew."""
    tried = dict(_single(recipe, plan))
    keeping = [text for text in tried if not text.startswith("method")]
    if len(keeping) > 1:
        tried[" ".join(keeping)] = {field: value for text in keeping for field, value in tried[text].items()}
    planned = []
    for text, fields in tried.items():
        points = fields.get("points", plan.points)
        changed = recipe.model_copy(update={field: value for field, value in fields.items() if field != "points"})
        planned.append(Change(text, make_plan(changed, config=config, points=points, process=plan.process).peak))
    return planned


def _single(recipe: Recipe, plan: Plan) -> Iterator[tuple[str, dict[str, Any]]]:
    if plan.points > 1:
        yield "--points 1", {"points": 1}
    if "tensors as stored" in plan.memory["loading"]:
        yield "dtype=auto", {"dtype": "auto"}
    elif plan.dtype == "float32":
        yield "dtype=bfloat16", {"dtype": "bfloat16"}
    if recipe.needs_tail and not recipe.recompute_tail:
        yield "recompute_tail=true", {"recompute_tail": True}
    if recipe.batch_size > 1:
        yield "batch_size=1", {"batch_size": 1}
    if recipe.max_tokens >= 64 and all(topic.max_tokens is None for topic in recipe.topics.values()):
        yield f"max_tokens={recipe.max_tokens // 2}", {"max_tokens": recipe.max_tokens // 2}
    if len(recipe.band_layers) > 1:
        highest = max(recipe.band_layers)
        yield f"train_layers=[{highest}]", {"train_layers": (highest,)}
    if recipe.needs_tail:
        fields = {"method": "rmu", "retain_loss": "hidden_mse", "steering_scale": 1.0, "noise_layers": None}
        yield "method=rmu retain_loss=hidden_mse steering_scale=…", fields

"""A run's costs from its recipe and the model's config: bytes to read, memory, FLOPs, disk.

Memory has phases, and the peak is the greatest of them. With W the weights in use (embedding, layers 0 to l; tail
and LM head where a loss needs log-probabilities), P the trained parameters, N candidates side by side:

- loading: W; where `dtype` is not the checkpoint's, also the stored tensors that W is made from.
- fingerprint: W; the trained tensors as stored, one after the other, or every tensor of the base where reference
  log-probabilities are kept under its fingerprint; a copy of the tensor at hand.
- scoring: W, masters (4 P N bytes); the forward pass over a block of sequences, without gradients.
- step: W, masters, AdamW's moments (8 P N), gradients (4 P N), and what the rehearsed step has live at its peak:
  activations kept for the backward pass, the trained tensors cast to the model's type, a chunk of logits.
- optimiser: W, masters, moments, gradients, and two temporary tensors as large as the largest master.

On a CPU each phase also has the floor: what Python, the libraries, the tokenizer and the texts take, measured in
this process. Stored tensors are mapped, not copied: they count in the resident set, which `run.json` records,
though the system can take their pages back. All of the embedding is counted, also the pages that no text touches.
Not modelled: holes in the C library's heap, and what a kernel takes for itself while it runs; benchmarks/planner.py
compares with measured peaks. On a GPU the phases are what torch allocates there, without CUDA's own context and the
allocator's cache; this has not been compared with a measurement.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from robust_unlearning.methods.table import Preference
from robust_unlearning.models import checkpoint
from robust_unlearning.models.layers import decoder_layers
from robust_unlearning.plan.floor import resident_floor
from robust_unlearning.plan.lengths import Lengths, batch_lengths, config_of
from robust_unlearning.plan.meter import Meter, Part
from robust_unlearning.plan.rehearsal import (
    BAND,
    GRADIENTS,
    HEAD,
    METRICS,
    SHARED,
    TAIL,
    Stage,
    rehearse_scoring,
    rehearse_step,
    set_stage,
    types,
    without_data,
)
from robust_unlearning.recipe import Recipe
from robust_unlearning.train.references import BLOCK

EMBEDDING, TRUNK_LAYERS, BAND_LAYERS, TAIL_LAYERS, FINAL_NORM, LM_HEAD = (
    "embedding", "trunk layers", "band layers", "tail layers", "final norm", "LM head",
)  # fmt: skip
CHECKPOINT = "checkpoint, until the run ends"
_KEPT = {BAND: "band, kept for backward", TAIL: "tail, kept for backward", HEAD: "LM head, a chunk of logits"}


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
        floor: resident bytes of a process that has no model.
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
    floor: int
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
        """All of it, JSON-able."""
        peak = {"peak_phase": self.peak_phase, "peak_bytes": self.peak, "total_flops": self.total_flops}
        return asdict(self) | peak


def make_plan(recipe: Recipe, *, config: Path | None = None, points: int = 1, floor: int | None = None) -> Plan:
    """The costs of a run, or of `points` runs trained side by side.

    Args:
        config: a config.json or a folder with one, in place of the recipe's model.
        points: candidates over one trunk; each has masters, moments and gradients of its own, and they take turns
            with activations.
        floor: resident bytes of a process without a model; measured in this one when left out.

    Raises:
        UserError: no config, layers or tensors that the model has not, or a forward pass that depends on values.
    """
    base = config_of(recipe, config)
    device = checkpoint.pick_device("auto").type if recipe.device == "auto" else recipe.device.partition(":")[0]
    lengths, lengths_from = batch_lengths(recipe, base)
    scored = _scored(recipe, lengths)
    _, dtype = types(recipe, base)
    if floor is None:
        floor = resident_floor(dtype)
    with without_data(recipe.model):
        stage = set_stage(recipe, base)
        step = rehearse_step(stage, {side: each.widest for side, each in lengths.items()})
        scoring = {side: rehearse_scoring(stage, lengths[side].widest) for side in scored}
        read, every = _read(stage)
        memory = _memory(stage, step, scoring, points)
        weights = _weights(stage)
    process = {"Python, libraries, tokenizer, texts": floor}
    host: dict[str, dict[str, int]] = {}
    if device == "cpu":
        memory = {phase: process | parts for phase, parts in memory.items()}
    else:  # made in the host's memory, then moved
        hashed = {key: size for key, size in memory.pop("fingerprint").items() if key not in weights}
        saved = {"masters and moments, copied": _disk(stage, scored, 1)[CHECKPOINT]}
        host = {
            "loading": process | memory["loading"],
            "fingerprint": process | hashed,
            "saving a checkpoint": process | saved,
        }
        memory["loading"] = weights
    return Plan(
        model=base.name,
        title=recipe.title,
        layers=(len(decoder_layers(stage.model)[1]), stage.depth),
        band=(stage.engine.first, stage.engine.last),
        dtype=str(dtype).removeprefix("torch."),
        device=device,
        steps=recipe.steps,
        points=points,
        lengths=lengths,
        lengths_from=lengths_from,
        trained=sum(value.numel() for value in stage.trained.values()),
        floor=floor,
        read=read,
        again=_again(stage, every, bool(scored)),
        memory=memory,
        host=host,
        flops=_step_flops(recipe, step, lengths, points),
        once=_once_flops(scoring, lengths, scored),
        disk=_disk(stage, scored, points),
    )


def _places(stage: Stage) -> dict[str, str]:
    """Parameter -> the part it belongs to; a truncated model's final norm, which is never read, is left out."""
    path, _ = decoder_layers(stage.model)
    parent, _, own = path.rpartition(".")
    children = [name for name, _ in stage.model.get_submodule(parent).named_children()]
    prefix = f"{parent}." if parent else ""
    behind = {prefix + name for name in children[children.index(own) + 1 :]}
    head = stage.model.get_output_embeddings() if stage.recipe.needs_tail else None
    heads = set() if head is None else {id(each) for each in head.parameters()}
    embedding = stage.model.get_input_embeddings().weight
    places = {}
    for name, value in stage.model.named_parameters():
        if name.startswith(path + "."):
            index = int(name.removeprefix(path + ".").split(".", 1)[0])
            below, above = index < stage.engine.first, index > stage.engine.last
            places[name] = TRUNK_LAYERS if below else TAIL_LAYERS if above else BAND_LAYERS
        elif any(name.startswith(each + ".") for each in behind):
            if stage.recipe.needs_tail:
                places[name] = FINAL_NORM
        else:
            places[name] = LM_HEAD if id(value) in heads and value is not embedding else EMBEDDING
    return places


def _read(stage: Stage) -> tuple[dict[str, int], list[int]]:
    """Bytes of the checkpoint by part, and of each of its tensors in the order of their names."""
    size = stage.stored.itemsize
    parameters = dict(stage.model.named_parameters())
    read: Counter[str] = Counter()
    for name, place in _places(stage).items():
        read[place] += parameters[name].numel() * size
    return dict(read), [parameters[name].numel() * size for name in sorted(parameters)]


def _weights(stage: Stage) -> dict[str, int]:
    """Bytes of the weights in use, by part."""
    parameters = dict(stage.model.named_parameters())
    weights: Counter[str] = Counter()
    for name, place in _places(stage).items():
        weights[f"weights: {place}"] += parameters[name].nbytes
    return dict(weights)


def _again(stage: Stage, every: list[int], scored: bool) -> int:
    """Bytes read again for fingerprints: the trained tensors', and the whole base's where references are kept."""
    trained = sum(value.numel() for value in stage.trained.values()) * stage.stored.itemsize
    return trained + (sum(every) if scored else 0)


def _memory(stage: Stage, step: Meter, scoring: Mapping[str, Meter], points: int) -> dict[str, dict[str, int]]:
    """Phase -> part -> bytes, without the process's floor."""
    weights = _weights(stage)
    read, every = _read(stage)
    sizes = [value.numel() for value in stage.trained.values()]
    masters = {"masters, float32": 4 * sum(sizes) * points}
    optimiser = masters | {"AdamW moments, float32": 8 * sum(sizes) * points}
    mapped = every if scoring else [size * stage.stored.itemsize for size in sizes]
    hashed = max(sum(mapped[: index + 1]) + size for index, size in enumerate(mapped))
    cast = next(iter(stage.trained.values())).dtype != stage.stored
    phases = {
        "loading": weights | ({"tensors as stored": sum(read.values())} if cast else {}),
        "fingerprint": weights | {"tensors as stored, one copied": hashed},
    }
    for side, meter in scoring.items():
        phases[f"scoring {side}"] = weights | masters | {"a block's forward pass": sum(meter.peak.values())}
    own = _by_kind(step.peak)
    own["gradients, float32"] = own.get("gradients, float32", 0) + 4 * sum(sizes) * (points - 1)
    phases["step"] = weights | optimiser | own
    gradients = {"gradients, float32": 4 * sum(sizes) * points}
    phases["optimiser"] = weights | optimiser | gradients | {"AdamW's temporaries": 8 * max(sizes)}
    return phases


def _by_kind(live: Mapping[Part, int]) -> dict[str, int]:
    """Live bytes of a step by what they are for, all sides together, the gradients of masters named as such."""
    kinds: Counter[str] = Counter()
    for (_side, part), size in live.items():
        if part == GRADIENTS:
            kinds["gradients, float32"] += size
        elif part.endswith("backward"):
            kinds["backward pass: gradients under way"] += size
        else:
            kinds[_KEPT.get(part, part)] += size
    return {kind: size for kind, size in kinds.items() if size}


def _step_flops(recipe: Recipe, step: Meter, lengths: Mapping[str, Lengths], points: int) -> dict[str, float]:
    """FLOPs of a mean step by part: those of the widest batch, scaled to the lengths of the run's batches."""
    found: dict[str, float] = defaultdict(float)
    for (side, part), flops in step.flops.items():
        length = lengths[side]
        if part == HEAD:
            share = length.predicted / (recipe.batch_size * (length.widest - 1))
            done = flops.linear * share
        else:
            done = flops.linear * length.width / length.widest + flops.attention * length.square / length.widest**2
        if part == METRICS:
            done /= recipe.log_every
        found[part] += done * (1 if part in SHARED else points)
    return dict(found)


def _once_flops(
    scoring: Mapping[str, Meter], lengths: Mapping[str, Lengths], scored: Mapping[str, int]
) -> dict[str, float]:
    """FLOPs of what is done once: reference log-probabilities, unless an earlier run has left them."""
    once: dict[str, float] = {}
    for side, meter in scoring.items():
        length = lengths[side]
        block = sum(
            flops.linear * length.width / length.widest + flops.attention * length.square / length.widest**2
            for flops in meter.flops.values()
        )
        once[f"reference log-probabilities, {side}"] = block * scored[side]
    return once


def _scored(recipe: Recipe, lengths: Mapping[str, Lengths]) -> dict[str, int]:
    """Sides whose reference log-probabilities a run needs -> in how many blocks of sequences."""
    if not (isinstance(recipe.spec, Preference) and recipe.spec.needs_reference):
        return {}
    return {side: each.blocks for side, each in lengths.items() if side != "retain"}


def _disk(stage: Stage, scored: Mapping[str, int], points: int) -> dict[str, int]:
    """Bytes a run leaves, headers of the files left out."""
    recipe = stage.recipe
    trained = sum(value.numel() for value in stage.trained.values())
    delta = trained * stage.stored.itemsize
    disk = {"delta, in the checkpoint's type": delta * points}
    if recipe.snapshots:
        disk["snapshots"] = delta * len(recipe.snapshots) * points
    if not isinstance(recipe.spec, Preference):
        disk["steering vectors"] = 4 * stage.engine.width * len(recipe.topics) * points
    if scored:
        disk["reference log-probabilities, in the cache"] = 8 * BLOCK * sum(scored.values())
    disk[CHECKPOINT] = 12 * trained * points
    return disk

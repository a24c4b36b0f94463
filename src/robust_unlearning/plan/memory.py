"""Memory of a run, phase by phase, of points side by side, and what a machine has left.

The peak is the greatest of the phases. With W the weights in use (embedding, layers 0 to l; tail and LM head where a
loss needs log-probabilities), P the trained parameters, N candidates side by side:

- loading: W; where `dtype` is not the checkpoint's, also the stored tensors that W is made from.
- fingerprint: W; the trained tensors as stored, one after the other, or every tensor of the base where reference
  log-probabilities are kept under its fingerprint; a copy of the tensor at hand.
- scoring: W, masters (4 P N bytes); the forward pass over a block of sequences, without gradients.
- step: W, masters, AdamW's moments (8 P N), gradients (4 P N), and what the rehearsed step has live at its peak:
  activations kept for the backward pass, the trained tensors cast to the model's type, a chunk of logits.
- optimiser: W, masters, moments, gradients, and two temporary tensors as large as the largest master.

On a CPU each phase also has what the process holds without a model: Python, the libraries, the tokenizer and the
texts, measured in this one. Stored tensors are mapped, not copied: they count in the resident set, which `run.json`
records, though the system can take their pages back. All of the embedding is counted, also the pages that no text
touches. Not modelled: holes in the C library's heap, and what a kernel takes for itself while it runs;
benchmarks/planner.py compares with measured peaks. On a GPU the phases are what torch allocates there, without CUDA's
own context and the allocator's cache; this has not been compared with a measurement.
"""

from __future__ import annotations

import operator
import os
import resource
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from robust_unlearning.methods.table import Preference
from robust_unlearning.models.convert import quiet
from robust_unlearning.models.layers import decoder_layers
from robust_unlearning.plan.lengths import config_of, upper_bounds
from robust_unlearning.plan.meter import Meter
from robust_unlearning.plan.rehearsal import (
    BAND,
    GRADIENTS,
    HEAD,
    TAIL,
    Rehearsal,
    prepare,
    rehearse_step,
    without_data,
)  # fmt: skip
from robust_unlearning.recipe import Recipe

EMBEDDING, TRUNK_LAYERS, BAND_LAYERS, TAIL_LAYERS, FINAL_NORM, LM_HEAD = (
    "embedding", "trunk layers", "band layers", "tail layers", "final norm", "LM head",
)  # fmt: skip
PROCESS = "Python, libraries, tokenizer, texts"
MASTERS, MOMENTS, GRADIENT = "masters, float32", "AdamW moments, float32", "gradients, float32"
_LIVE = {
    BAND: "band, kept for backward",
    TAIL: "tail, kept for backward",
    HEAD: "LM head, a chunk of logits",
    GRADIENTS: GRADIENT,
}
USABLE = 0.8
"""Share of the free memory that a sweep plans with; the rest is for what is not counted."""


def tensor_places(rehearsal: Rehearsal) -> dict[str, str]:
    """Parameter -> the part it belongs to; a truncated model's final norm, which is never read, is left out."""
    path, _ = decoder_layers(rehearsal.model)
    parent, _, own = path.rpartition(".")
    children = [name for name, _ in rehearsal.model.get_submodule(parent).named_children()]
    prefix = f"{parent}." if parent else ""
    behind = tuple(f"{prefix}{name}." for name in children[children.index(own) + 1 :])
    head = rehearsal.model.get_output_embeddings() if rehearsal.recipe.needs_tail else None
    heads = set() if head is None else {id(parameter) for parameter in head.parameters()}
    embedding = rehearsal.model.get_input_embeddings().weight
    places = {}
    for name, value in rehearsal.model.named_parameters():
        if name.startswith(path + "."):
            index = int(name.removeprefix(path + ".").split(".", 1)[0])
            below, above = index < rehearsal.engine.first, index > rehearsal.engine.last
            places[name] = TRUNK_LAYERS if below else TAIL_LAYERS if above else BAND_LAYERS
        elif name.startswith(behind):
            if rehearsal.recipe.needs_tail:
                places[name] = FINAL_NORM
        else:
            places[name] = LM_HEAD if id(value) in heads and value is not embedding else EMBEDDING
    return places


def _by_place(rehearsal: Rehearsal, sizes: Mapping[str, int]) -> dict[str, int]:
    """Sizes of parameters, by part."""
    sums: Counter[str] = Counter()
    for name, place in tensor_places(rehearsal).items():
        sums[place] += sizes[name]
    return dict(sums)


def stored_bytes(rehearsal: Rehearsal) -> tuple[dict[str, int], list[int]]:
    """Bytes of the checkpoint by part, and of each of its tensors in the order of their names."""
    sizes = {name: value.numel() * rehearsal.stored.itemsize for name, value in rehearsal.model.named_parameters()}
    return _by_place(rehearsal, sizes), [sizes[name] for name in sorted(sizes)]


def weight_bytes(rehearsal: Rehearsal) -> dict[str, int]:
    """Bytes of the weights in use, by part."""
    sizes = {name: value.nbytes for name, value in rehearsal.model.named_parameters()}
    return {f"weights: {place}": size for place, size in _by_place(rehearsal, sizes).items()}


def phases(rehearsal: Rehearsal, step: Meter, scoring: Mapping[str, Meter], points: int) -> dict[str, dict[str, int]]:
    """Phase -> part -> bytes, without the process itself.

    Args:
        step: the rehearsed step.
        scoring: side -> the rehearsed scoring of its reference log-probabilities.
        points: candidates side by side.
    """
    weights = weight_bytes(rehearsal)
    read, every = stored_bytes(rehearsal)
    sizes = [value.numel() for value in rehearsal.trained.values()]
    masters = {MASTERS: 4 * sum(sizes) * points}
    optimiser = masters | {MOMENTS: 8 * sum(sizes) * points}
    mapped = every if scoring else [size * rehearsal.stored.itemsize for size in sizes]
    hashed = max(sum(mapped[: index + 1]) + size for index, size in enumerate(mapped))
    cast = next(iter(rehearsal.trained.values())).dtype != rehearsal.stored
    live = _by_kind(step)
    live[GRADIENT] = live.get(GRADIENT, 0) + 4 * sum(sizes) * (points - 1)
    return {
        "loading": weights | ({"tensors as stored": sum(read.values())} if cast else {}),
        "fingerprint": weights | {"tensors as stored, one copied": hashed},
        **{
            f"scoring {side}": weights | masters | {"a block's forward pass": sum(meter.peak.values())}
            for side, meter in scoring.items()
        },
        "step": weights | optimiser | live,
        "optimiser": weights | optimiser | {GRADIENT: 4 * sum(sizes) * points, "AdamW's temporaries": 8 * max(sizes)},
    }


def _by_kind(step: Meter) -> dict[str, int]:
    """Live bytes of a step by what they are for, all sides together."""
    kinds: Counter[str] = Counter()
    for (_side, part), size in step.peak.items():
        backward = part.endswith("backward")
        kinds["backward pass: gradients under way" if backward else _LIVE.get(part, part)] += size
    return {kind: size for kind, size in kinds.items() if size}


@dataclass(frozen=True)
class Need:
    """Bytes that training a group side by side takes.

    Points take turns within a step, so gradients, weights in the model's type and activations are there for one
    point only.

    Attributes:
        model: the frozen model.
        point: what stays in memory for each point: masters and moments.
        step: what the point in hand needs besides.
    """

    model: int
    point: int
    step: int

    def fits(self, free: int) -> int:
        """How many points fit side by side into `free` bytes, at least one."""
        return max(1, (int(USABLE * free) - self.model - self.step) // self.point)


def need(recipes: Sequence[Recipe]) -> Need:
    """What recipes of one group need: the planner's phases, batches as long as they may be; no weight is read.

    Recipes are rehearsed that no other of the group surpasses in everything that takes memory.

    Raises:
        UserError: the model cannot be found, lacks a layer, or has no tensor of the recipe's pattern.
    """
    demands = {_demands(recipe): recipe for recipe in recipes}
    needs = [
        _need_of(recipe)
        for demand, recipe in demands.items()
        if not any(demand != other and all(map(operator.le, demand, other)) for other in demands)
    ]
    return Need(*(max(getattr(need_of, field) for need_of in needs) for field in ("model", "point", "step")))


def _demands(recipe: Recipe) -> tuple[bool, ...]:
    """What in a recipe takes memory beyond the band."""
    spec, tail = recipe.spec, recipe.needs_tail
    preference = isinstance(spec, Preference)
    refusals = isinstance(spec, Preference) and spec.needs_refusals
    return (
        tail,
        preference,
        refusals,
        tail and not recipe.recompute_tail,
        recipe.retain_kind == "kl",
        recipe.rna_std > 0,
    )


def _need_of(recipe: Recipe) -> Need:
    base = config_of(recipe, None)
    with without_data(recipe.model):
        rehearsal = prepare(recipe, base)
        step = rehearse_step(rehearsal, {side: lengths.widest for side, lengths in upper_bounds(recipe).items()})
        parts = phases(rehearsal, step, {}, points=1)
    model = sum(weight_bytes(rehearsal).values())
    point = parts["step"][MASTERS] + parts["step"][MOMENTS]
    return Need(model, point, max(sum(parts[phase].values()) for phase in ("step", "optimiser")) - model - point)


def free_memory(device: torch.device) -> int:
    """Bytes that can still be had: of the GPU; elsewhere of the machine, within the control group's limit."""
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what an earlier model has left
        return torch.cuda.mem_get_info(device)[0]
    available = _kibibytes(Path("/proc/meminfo"), "MemAvailable:")
    limits = [available] if available else []
    most, used = (Path(f"/sys/fs/cgroup/memory.{name}") for name in ("max", "current"))
    if most.exists() and used.exists() and (limit := most.read_text(encoding="utf-8").strip()) != "max":
        limits.append(int(limit) - int(used.read_text(encoding="utf-8")))
    # elsewhere half of what is built in, as nothing tells what is free
    return min(limits) if limits else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def process_bytes(dtype: torch.dtype) -> int:
    """What a process holds before it has a model: its resident bytes after one step of training with a toy model.

    Measured, not a constant: it differs between versions and machines. The step brings in what the first
    products, backward pass and optimiser step of a type bring in (code, thread pools). It means what it says in a
    process that has done nothing else, as the command line's has not.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    toy = LlamaConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, vocab_size=128)
    with quiet(), torch.random.fork_rng(devices=[]):
        model = LlamaForCausalLM(toy).to(dtype)
    optimiser = torch.optim.AdamW(model.parameters())
    ids = torch.ones(2, 8, dtype=torch.long)
    model(input_ids=ids, attention_mask=ids.tril(), use_cache=False).logits.float().square().mean().backward()
    optimiser.step()
    if resident := _kibibytes(Path("/proc/self/status"), "VmRSS:"):
        return resident
    # where the system does not say, the peak so far
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _kibibytes(path: Path, field: str) -> int | None:
    """Bytes from a line `FIELD COUNT kB` of a file of /proc; None where there is none."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(field)), None)

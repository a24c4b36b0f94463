"""How many points fit into memory side by side: what they need, and what is free.

Points of a group take turns within a step. So each needs its float32 masters and the two moments of AdamW all the
time, 12 bytes a trained parameter, while gradients, weights in the model's type and activations are there for one
point only.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from robust_unlearning.recipe import Recipe

if TYPE_CHECKING:
    import torch

KEPT = 12
"""Bytes a trained parameter of every point: master and two moments, float32."""
IN_HAND = 8
"""Bytes a trained parameter of the point in hand: its gradient, and at most 4 for the weight in the model's type."""
USABLE = 0.8
"""Share of the free memory that may be planned with; the rest is for what is not counted."""


@dataclass(frozen=True)
class Need:
    """Bytes that training a group takes.

    Attributes:
        model: the frozen model.
        point: what stays in memory for each point.
        step: what the point in hand needs besides.
    """

    model: int
    point: int
    step: int

    def fits(self, free: int) -> int:
        """How many points fit side by side into `free` bytes, at least one."""
        return max(1, (int(USABLE * free) - self.model - self.step) // self.point)


def need(recipes: Sequence[Recipe]) -> Need:
    """What recipes of one group need, from the model's config; no weight is read.

    Activations are counted as 16 numbers of the width and 4 of the feed-forward width for each token and layer
    that gradients pass through, in forget and retain batch, twice as long as the model's type.

    Raises:
        UserError: the model cannot be found, lacks a layer, or has no tensor of the recipe's pattern.
    """
    import torch
    from transformers import AutoModel, AutoModelForCausalLM

    from robust_unlearning.models import checkpoint
    from robust_unlearning.models.layers import check_layers, decoder_layers, trained_tensors

    recipe = recipes[0]
    tail = any(each.needs_tail for each in recipes)
    base = checkpoint.resolve(
        recipe.model, allow_pickle=recipe.allow_pickle, trust_remote_code=recipe.trust_remote_code
    )
    config = checkpoint.read_config(base, None if tail else recipe.layer + 1)
    text = config.get_text_config()
    kind = (text.dtype or config.dtype or torch.float32) if recipe.dtype == "auto" else getattr(torch, recipe.dtype)
    with torch.device("meta"):
        auto = AutoModelForCausalLM if tail else AutoModel
        model = auto.from_config(config, trust_remote_code=recipe.trust_remote_code)
    _, layers = decoder_layers(model)
    check_layers(recipe.band_layers, len(layers), "layer")
    tensors = trained_tensors(layers, recipe.band_layers, recipe.train_tensors)
    trained = sum(tensor.numel() for tensor in tensors.values())
    numbers = 16 * text.hidden_size + 4 * (getattr(text, "intermediate_size", None) or 4 * text.hidden_size)
    tokens = 2 * recipe.batch_size * max(recipe.of_topic(topic, "max_tokens") for topic in recipe.topics)
    depth = len(layers) - min(recipe.band_layers)
    return Need(
        model=sum(each.numel() for each in model.parameters()) * kind.itemsize,
        point=KEPT * trained,
        step=IN_HAND * trained + 2 * kind.itemsize * tokens * depth * numbers,
    )


def free_memory(device: torch.device) -> int:
    """Bytes that can still be had: of the GPU; elsewhere of the machine, within the control group's limit."""
    if device.type == "cuda":
        import torch

        torch.cuda.empty_cache()  # what an earlier model has left
        return torch.cuda.mem_get_info(device)[0]
    found = []
    meminfo, limit, used = (
        Path(each) for each in ("/proc/meminfo", "/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current")
    )
    if meminfo.exists():
        lines = meminfo.read_text(encoding="utf-8").splitlines()
        found += [1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
    if limit.exists() and used.exists() and (most := limit.read_text(encoding="utf-8").strip()) != "max":
        found.append(int(most) - int(used.read_text(encoding="utf-8")))
    # elsewhere half of what is built in, as nothing tells what is free
    return min(found) if found else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def in_words(count: int) -> str:
    """Bytes for people."""
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"

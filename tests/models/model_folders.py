"""Folders of models for the tests of loading, and what their layers give."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from robust_unlearning import UserError
from robust_unlearning.models import checkpoint
from robust_unlearning.models.layers import decoder_layers

CPU = torch.device("cpu")
IDS = torch.tensor([[5, 6, 7, 8, 9, 10, 11], [11, 12, 13, 14, 15, 0, 0]])
MASK = torch.tensor([[1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0, 0]])


@torch.no_grad()
def layer_output(model: nn.Module, index: int) -> Tensor:
    seen: list[Any] = []
    _, found = decoder_layers(model)
    handle = found[index].register_forward_hook(lambda _module, _args, output: seen.append(output))
    try:
        model(input_ids=IDS, attention_mask=MASK, use_cache=False)
    finally:
        handle.remove()
    return seen[0][0] if isinstance(seen[0], tuple) else seen[0]


def whole(folder: Path) -> nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder).eval()


def resolve_error(name: str | Path, **changes: Any) -> str:
    with pytest.raises(UserError) as caught:
        checkpoint.resolve(str(name), **changes)
    return str(caught.value)


def copy_of(folder: Path, target: Path) -> Path:
    return Path(shutil.copytree(folder, target))


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

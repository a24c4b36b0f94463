"""A LoRA adapter on every linear layer of a frozen model, saved in PEFT's layout.

The low-rank path runs in the type of the frozen weights, with float32 masters. PEFT runs that path in float32: on two
CPU cores 335 tokens a second, against 476 here (one reading each, docs/log.md).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from robust_unlearning import files

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ALPHA = 2
"""α/r: what the low-rank product counts."""
TYPE = torch.bfloat16
"""Of the saved factors."""


class LowRank(nn.Module):
    """A frozen linear layer with a change of low rank: x Wᵀ + (α/r) x Aᵀ Bᵀ (Hu et al. 2021, arXiv 2106.09685).

    A [r, inputs] begins as He's uniform initialisation has it and B [outputs, r] as zeros, so the layer begins as it
    was.
    """

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Parameter(torch.empty(rank, base.in_features, device=base.weight.device))
        self.up = nn.Parameter(torch.zeros(base.out_features, rank, device=base.weight.device))
        nn.init.kaiming_uniform_(self.down, a=5**0.5)

    def forward(self, x: Tensor) -> Tensor:
        """[…, inputs] -> […, outputs]."""
        low = ALPHA * (x @ self.down.to(x.dtype).T).flatten(0, -2)
        return torch.addmm(self.base(x).flatten(0, -2), low, self.up.to(x.dtype).T).unflatten(0, x.shape[:-1])


def add_adapter(model: PreTrainedModel, rank: int, seed: int) -> None:
    """Freeze a model and put a `LowRank` in place of every linear layer but the LM head."""
    model.requires_grad_(False)
    head = model.get_output_embeddings()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for module in list(model.modules()):
            for name, child in list(module.named_children()):
                if isinstance(child, nn.Linear) and child is not head:
                    setattr(module, name, LowRank(child, rank))


def save_adapter(model: nn.Module, folder: Path, base: str) -> None:
    """Write `adapter_model.safetensors` (factors in bfloat16) and `adapter_config.json`, as PEFT reads them."""
    from safetensors.torch import save_file

    layers = {name: each for name, each in model.named_modules() if isinstance(each, LowRank)}
    factors = {}
    for name, each in layers.items():
        for factor, value in (("lora_A", each.down), ("lora_B", each.up)):
            factors[f"base_model.model.{name}.{factor}.weight"] = value.detach().to(TYPE).cpu().contiguous()
    rank = next(iter(layers.values())).down.shape[0]
    config = {
        "base_model_name_or_path": base,
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": ALPHA * rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted({name.rpartition(".")[2] for name in layers}),
        "inference_mode": True,
    }
    with files.replacing(folder / "adapter_model.safetensors") as temporary:
        save_file(factors, temporary)
    files.write_json(folder / "adapter_config.json", config)

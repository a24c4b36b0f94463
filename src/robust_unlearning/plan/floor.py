"""What a process holds before it has a model: Python, torch, transformers, tokenizer and texts."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import torch

from robust_unlearning.models.convert import quiet


def resident_floor(dtype: torch.dtype) -> int:
    """This process's resident bytes after one step of training with a toy model.

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
    return resident_bytes()


def resident_bytes() -> int:
    """This process's resident set now, or where the system does not say, its peak so far."""
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text(encoding="utf-8").splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

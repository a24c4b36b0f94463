"""Reference log-probabilities of a corpus: computed once, kept on disk, read by every later run.

They depend on the model, the texts' tokens and the type of the forward pass, and on nothing else of a recipe.
Sequences are scored in fixed blocks, so that a value never depends on which run asked for it first.

Shapes: b sequences of a batch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from robust_unlearning import files
from robust_unlearning.band import BandEngine
from robust_unlearning.corpora import Corpus
from robust_unlearning.objective import sequence_logp

BLOCK = 8
"""Sequences scored together: always the same ones, whoever asks."""


class References:
    """log p of each sequence of a corpus under the base, in nats.

    Args:
        corpus: the sequences.
        model: fingerprint of every tensor of the base.
        dtype: type of the forward pass.
    """

    def __init__(self, engine: BandEngine, corpus: Corpus, model: str, dtype: str) -> None:
        self.engine, self.corpus = engine, corpus
        said = repr((model, dtype, engine.device.type, corpus.rows))
        self.path = folder() / f"{hashlib.sha256(said.encode()).hexdigest()[:24]}.safetensors"
        self.logp = torch.full((len(corpus.rows),), float("nan"), dtype=torch.float64)
        if self.path.exists():
            from safetensors.torch import load_file

            self.logp = load_file(self.path)["logp"]

    def prepare(self, rows: Iterable[int]) -> int:
        """Score those of `rows` that are not known yet, and keep them on disk; returns how many were scored."""
        blocks = sorted({row // BLOCK for row in rows if self.logp[row].isnan()})
        for block in blocks:
            own = list(range(block * BLOCK, min((block + 1) * BLOCK, len(self.logp))))
            trunk = self.engine.trunk(self.corpus.collated(own))
            with torch.no_grad():
                final = self.engine.reference_tail(trunk, self.engine.reference(trunk))
                self.logp[own] = sequence_logp(self.engine, trunk, final).logp.double().cpu()
        if blocks:
            from safetensors.torch import save_file

            self.path.parent.mkdir(parents=True, exist_ok=True)
            with files.replacing(self.path) as temporary:
                save_file({"logp": self.logp}, temporary)
        return len(blocks) * BLOCK

    def of(self, rows: list[int]) -> Tensor:
        """log p [b] of these sequences, in float32 on the engine's device."""
        self.prepare(rows)
        return self.logp[rows].float().to(self.engine.device)


def folder() -> Path:
    """Where references are kept."""
    return files.cache_dir() / "references"

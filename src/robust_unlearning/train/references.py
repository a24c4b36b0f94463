"""Reference log-probabilities of a corpus: computed once, kept on disk, read by every later run.

They depend on the model, the sequences' tokens (and what of them is given) and the type of the forward pass, and on
nothing else of a recipe.
Sequences are scored in fixed blocks, so that a value never depends on which run asked for it first.

Shapes: b sequences of a batch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from robust_unlearning import files
from robust_unlearning.data.corpora import Sequences
from robust_unlearning.models.checkpoint import read_tensors, write_tensors
from robust_unlearning.parallel.processes import Processes
from robust_unlearning.train.engine import BandEngine
from robust_unlearning.train.objective import BatchForward

BLOCK = 8
"""Sequences scored together: always the same ones, whoever asks."""


class References:
    """log p of each sequence of a corpus under the base, in nats.

    Args:
        corpus: the sequences; where their numbers go on without end, values are kept as far as they were asked for.
        model: fingerprint of every tensor of the base.
        dtype: type of the forward pass.
        processes: they share the work, and know the same values afterwards.
    """

    def __init__(self, engine: BandEngine, corpus: Sequences, model: str, dtype: str, processes: Processes) -> None:
        self.engine, self.corpus, self.processes = engine, corpus, processes
        key = repr((model, dtype, engine.device.type, corpus.identity))
        self.path = folder() / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.safetensors"
        self.logp = processes.on_rank_zero(self._read)

    def _read(self) -> Tensor:
        """What is on disk, or NaN for every sequence."""
        if not self.path.exists():
            return _unknown(self.corpus.size or 0)
        return read_tensors(self.path)[0]["logp"]

    def prepare(self, rows: Iterable[int]) -> int:
        """Score those of `rows` that are not known yet, and keep them on disk; returns how many were scored."""
        rows = list(rows)
        if self.corpus.size is None:  # whole blocks, as far as is asked for
            missing = -(-(max(rows, default=-1) + 1) // BLOCK) * BLOCK - len(self.logp)
            self.logp = torch.cat([self.logp, _unknown(max(0, missing))])
        blocks = sorted({row // BLOCK for row in rows if self.logp[row].isnan()})
        padded = blocks + blocks[-1:] * (-len(blocks) % self.processes.count)  # sharded layers are run equally often
        for block, logp in zip(padded, self.processes.map_split(padded, self._scored), strict=True):
            self.logp[self._rows(block)] = logp
        if blocks and self.processes.is_rank_zero:
            write_tensors(self.path, {"logp": self.logp})
        return len(blocks) * BLOCK

    def _rows(self, block: int) -> list[int]:
        """The sequences of a block."""
        return list(range(block * BLOCK, min((block + 1) * BLOCK, len(self.logp))))

    def _scored(self, blocks: Sequence[int]) -> list[Tensor]:
        """log p of the sequences of each block."""
        forwards = (BatchForward(self.engine, self.corpus.collated(self._rows(block))) for block in blocks)
        with torch.no_grad():
            return [forward.sequence_logp(forward.final).logp.double().cpu() for forward in forwards]

    def of(self, rows: list[int]) -> Tensor:
        """log p [b] of these sequences, in float32 on the engine's device."""
        self.prepare(rows)
        return self.logp[rows].float().to(self.engine.device)


def _unknown(count: int) -> Tensor:
    return torch.full((count,), float("nan"), dtype=torch.float64)


def folder() -> Path:
    """Where references are kept."""
    return files.cache_dir() / "references"

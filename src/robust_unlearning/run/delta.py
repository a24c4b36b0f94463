"""Deltas: the tensors a run changed, in one safetensors file with its provenance, and how they join a base."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from robust_unlearning import files
from robust_unlearning.errors import UserError
from robust_unlearning.models.checkpoint import Checkpoint, read_tensors, tensor_digest, write_tensors

FILE = "delta.safetensors"
_KIND = "robust-unlearning delta 1"
_STRAY = {".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".gguf", ".lock"}
"""Endings of files in a model's folder that an unlearned copy must not bring along."""


@dataclass(frozen=True)
class Delta:
    """Changed tensors under the base checkpoint's names and in its types.

    Attributes:
        tensors: name in the base checkpoint -> new value.
        provenance: base model's name and fingerprint, recipe, step, versions; JSON-able.
    """

    tensors: dict[str, Tensor]
    provenance: dict[str, Any]

    def save(self, path: Path) -> None:
        """Write to one file, atomically."""
        metadata = {"kind": _KIND, "provenance": json.dumps(self.provenance, sort_keys=True)}
        write_tensors(path, self.tensors, metadata)

    def digest(self) -> str:
        """SHA-256 of the tensors' names and bytes."""
        return tensor_digest(self.tensors)

    def check_base(self, checkpoint: Checkpoint) -> None:
        """Raise a `UserError` unless `checkpoint` is the base this delta was made from."""
        missing = [name for name in self.tensors if name not in checkpoint.weight_map]
        if missing:
            raise UserError(
                f"this delta changes {missing[0]!r}, which {checkpoint.name} does not have; "
                f"it was made from {self.provenance['model']!r}."
            )
        expected, found = self.provenance["fingerprint"], checkpoint.fingerprint(self.tensors)
        if found != expected:
            raise UserError(
                f"this delta was made from {self.provenance['model']!r} with fingerprint {expected}, and "
                f"{checkpoint.name} at {checkpoint.folder} has {found}: joining them would give a broken model."
            )

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[nn.Module]:
        """`model`, a loaded base, with this delta's tensors inside the block and its own afterwards."""
        own = dict(model.named_parameters())
        prefix = f"{getattr(model, 'base_model_prefix', '')}."  # which some checkpoints leave out, GPT-2's for one
        parameters = {}
        for name in self.tensors:
            inside = name if name in own else prefix + name
            if inside not in own:
                raise UserError(f"{type(model).__name__} has no tensor {name!r}, which the delta changes.")
            parameters[name] = own[inside]
        kept = {name: parameters[name].detach().clone() for name in self.tensors}
        try:
            _fill(parameters, self.tensors)
            yield model
        finally:
            _fill(parameters, kept)


@torch.no_grad()
def _fill(parameters: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    for name, value in values.items():
        parameters[name].copy_(value)


def load_delta(path: str | os.PathLike[str]) -> Delta:
    """The delta of a run folder or of a delta file.

    Raises:
        UserError: nothing there, or a file of another kind.
    """
    found = files.locate(path)
    if found.is_dir():
        if not (found / FILE).exists():
            raise UserError(f"{path}: no {FILE} in this folder; is the run finished? See its run.json.")
        found = found / FILE
    try:
        with safe_open(found, framework="pt") as file:
            kind = (file.metadata() or {}).get("kind")
        if kind != _KIND:
            raise UserError(f"{found}: a safetensors file, but no delta of this project.")
        tensors, metadata = read_tensors(found)
    except SafetensorError as error:
        raise UserError(f"{found}: not a safetensors file ({error}).") from error
    return Delta(tensors, json.loads(metadata["provenance"]))


def apply(delta: Delta, checkpoint: Checkpoint, target: Path, card: str = "") -> list[str]:
    """Write the whole unlearned model to the new folder `target`; returns the shards that were rewritten.

    Shards without changed tensors are hard-linked where the file system allows, else copied. The folder
    appears at once, complete, or not at all.

    Args:
        delta: what a run produced.
        checkpoint: its base.
        target: a folder that does not exist yet.
        card: text of the new README.md.

    Raises:
        UserError: the base is another one, or `target` exists.
    """
    delta.check_base(checkpoint)
    changed = {checkpoint.weight_map[name] for name in delta.tensors}
    weights = set(checkpoint.weight_map.values())
    with files.replacing_folder(target) as folder:
        for path in checkpoint.folder.iterdir():
            if path.is_file() and path.name not in {*weights, "README.md"} and path.suffix not in _STRAY:
                shutil.copy(path.resolve(), folder / path.name)
        for name in sorted(weights):
            source = checkpoint.shard(name).resolve()
            if name not in changed:
                _link_or_copy(source, folder / name)
                continue
            tensors, metadata = read_tensors(source)
            tensors |= {key: value.to(tensors[key].dtype) for key, value in delta.tensors.items() if key in tensors}
            write_tensors(folder / name, tensors, metadata or None)
        if card:
            files.write_text(folder / "README.md", card)
    return sorted(changed)


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without hard links
        shutil.copyfile(source, target)

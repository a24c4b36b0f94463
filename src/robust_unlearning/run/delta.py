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
from torch import Tensor, nn

from robust_unlearning import files
from robust_unlearning.errors import UserError
from robust_unlearning.models.checkpoint import Checkpoint, tensor_digest

FILE = "delta.safetensors"
_KIND = "robust-unlearning delta 1"


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
        from safetensors.torch import save_file

        metadata = {"kind": _KIND, "provenance": json.dumps(self.provenance, sort_keys=True)}
        with files.replacing(path) as temporary:
            save_file({name: value.contiguous() for name, value in self.tensors.items()}, temporary, metadata)

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
    from safetensors import SafetensorError, safe_open

    found = files.locate(path)
    if found.is_dir():
        if not (found / FILE).exists():
            raise UserError(f"{path}: no {FILE} in this folder; is the run finished? See its run.json.")
        found = found / FILE
    try:
        with safe_open(found, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("kind") != _KIND:
                raise UserError(f"{found}: a safetensors file, but no delta of this project.")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
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
    from safetensors import safe_open
    from safetensors.torch import save_file

    delta.check_base(checkpoint)
    changed = {checkpoint.weight_map[name] for name in delta.tensors}
    weights = set(checkpoint.weight_map.values())
    with files.replacing_folder(target) as folder:
        for each in checkpoint.folder.iterdir():
            stray = each.suffix in {
                ".safetensors",
                ".bin",
                ".pt",
                ".pth",
                ".h5",
                ".msgpack",
                ".gguf",
                ".lock",
            }
            if each.is_file() and each.name not in weights and not stray and each.name != "README.md":
                shutil.copy(each.resolve(), folder / each.name)
        for name in sorted(weights):
            source = checkpoint.shard(name).resolve()
            if name not in changed:
                _link_or_copy(source, folder / name)
                continue
            with safe_open(source, framework="pt") as file:
                metadata = file.metadata()
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            for key, value in delta.tensors.items():
                if key in tensors:
                    tensors[key] = value.to(tensors[key].dtype)
            save_file(tensors, folder / name, metadata)
            (folder / name).chmod(0o644)  # it comes readable by its owner only
        if card:
            files.write_text(folder / "README.md", card)
    return sorted(changed)


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without hard links
        shutil.copyfile(source, target)

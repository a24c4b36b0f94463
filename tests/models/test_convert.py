"""Pickled and GGUF weights are converted once; what could run code is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import SPECIAL, VOCABULARY, WORDS, random_model
from model_folders import CPU, change_config, copy_of, layer_output, resolve_error, whole

from robust_unlearning.models import checkpoint

# --- pickles and remote code


@pytest.fixture
def pickled(tiny_model: Path, tmp_path: Path) -> Path:
    """The tiny model with pickled weights only."""
    folder = copy_of(tiny_model, tmp_path / "pickled")
    torch.save(whole(tiny_model).state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    return folder


def test_pickled_weights_are_refused_with_the_way_out(pickled: Path) -> None:
    message = resolve_error(pickled)
    assert "pytorch_model.bin" in message
    assert "allow_pickle=true" in message


def test_allowed_pickled_weights_are_converted_once(
    pickled: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ROBUST_UNLEARNING_CACHE", str(tmp_path / "cache"))
    base = checkpoint.resolve(str(pickled), allow_pickle=True)
    expected = checkpoint.resolve(str(tiny_model))
    assert tmp_path / "cache" in base.folder.parents
    assert not list(base.folder.glob("*.bin"))
    assert set(base.weight_map) == set(expected.weight_map)
    assert all(torch.equal(base.tensor(name), expected.tensor(name)) for name in expected.weight_map)
    made = (base.folder / "model.safetensors").stat().st_ino
    again = checkpoint.resolve(str(pickled), allow_pickle=True)
    assert again.folder == base.folder
    assert (again.folder / "model.safetensors").stat().st_ino == made


def test_pickled_weights_of_another_model_are_not_taken_from_the_cache(
    pickled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ROBUST_UNLEARNING_CACHE", str(tmp_path / "cache"))
    first = checkpoint.resolve(str(pickled), allow_pickle=True)
    state = torch.load(pickled / "pytorch_model.bin", weights_only=True)
    state["model.layers.2.mlp.down_proj.weight"] += 1
    torch.save(state, pickled / "pytorch_model.bin")
    second = checkpoint.resolve(str(pickled), allow_pickle=True)
    name = "model.layers.2.mlp.down_proj.weight"
    assert torch.equal(second.tensor(name), state[name])
    assert not torch.equal(first.tensor(name), second.tensor(name))


def test_pickled_weights_under_a_name_transformers_does_not_know_are_an_error(
    pickled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ROBUST_UNLEARNING_CACHE", str(tmp_path / "cache"))
    (pickled / "pytorch_model.bin").rename(pickled / "consolidated.00.pt")
    assert str(pickled) in resolve_error(pickled, allow_pickle=True)
    assert not list((tmp_path / "cache" / "models").glob("[!.]*"))


@pytest.mark.parametrize(
    "auto_map",
    [
        {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnModel"},
        {
            "AutoModelForCausalLM": "modeling_own.OwnModel",
            "AutoTokenizer": ["tokenization_own.OwnTokenizer", None],
        },
    ],
    ids=["strings", "with a tokenizer's list"],
)
def test_a_models_own_code_is_refused_and_named(auto_map: dict[str, Any], tiny_model: Path, tmp_path: Path) -> None:
    folder = copy_of(tiny_model, tmp_path / "model")
    change_config(folder, auto_map=auto_map)
    message = resolve_error(folder)
    assert "modeling_own.OwnModel" in message
    assert "trust_remote_code=true" in message


def test_a_models_own_code_is_run_once_trusted(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers.dynamic_module_utils as dynamic

    monkeypatch.setattr(dynamic, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    folder = copy_of(tiny_model, tmp_path / "owncode")
    (folder / "configuration_own.py").write_text(
        "from transformers import LlamaConfig\n\n\nclass OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
    )
    (folder / "modeling_own.py").write_text(
        "from transformers import LlamaForCausalLM, LlamaModel\n"
        "from .configuration_own import OwnConfig\n\n\n"
        "class OwnModel(LlamaModel):\n    config_class = OwnConfig\n\n\n"
        "class OwnForCausalLM(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    auto_map = {
        "AutoConfig": "configuration_own.OwnConfig",
        "AutoModel": "modeling_own.OwnModel",
        "AutoModelForCausalLM": "modeling_own.OwnForCausalLM",
    }
    change_config(folder, auto_map=auto_map, model_type="own")
    base = checkpoint.resolve(str(folder), trust_remote_code=True)
    ours = checkpoint.load_truncated(base, 4, "auto", CPU)
    assert type(ours).__name__ == "OwnModel"
    assert torch.equal(layer_output(ours, 3), layer_output(whole(tiny_model), 3))
    assert type(checkpoint.load_causal_lm(base, "auto", CPU)).__name__ == "OwnForCausalLM"


# --- GGUF


def _permuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """The order of rows in which llama.cpp keeps queries and keys."""
    return (
        weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)
    )


def _write_gguf(path: Path, model: Any) -> None:
    import gguf

    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_vocab_size(VOCABULARY)
    tokens = [
        *SPECIAL,
        *WORDS,
        *(f"<extra{index}>" for index in range(VOCABULARY - len(SPECIAL) - len(WORDS))),
    ]
    letters = sorted(set("".join(WORDS)))
    tokens[-len(letters) - 1 :] = [*letters, "ba"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.NORMAL] * VOCABULARY)
    writer.add_token_merges(["b a"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(3)
    writer.add_pad_token_id(0)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, value in model.state_dict().items():
        array = value.float().numpy()
        if name.endswith("q_proj.weight"):
            array = _permuted(array, config.num_attention_heads)
        elif name.endswith("k_proj.weight"):
            array = _permuted(array, config.num_key_value_heads)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "tiny-f32.gguf"
    _write_gguf(path, random_model("llama"))
    return path


def test_a_gguf_file_is_converted_once_and_gives_the_models_tensors(
    gguf_file: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ROBUST_UNLEARNING_CACHE", str(tmp_path / "cache"))
    base = checkpoint.resolve(str(gguf_file))
    expected = checkpoint.resolve(str(tiny_model))
    assert base.folder.parent == tmp_path / "cache" / "models"
    assert base.folder.name.startswith("tiny-f32-")
    assert set(base.weight_map) == set(expected.weight_map)
    assert all(torch.equal(base.tensor(name), expected.tensor(name)) for name in expected.weight_map)
    ours = checkpoint.load_truncated(base, 4, "auto", CPU)
    torch.testing.assert_close(layer_output(ours, 3), layer_output(whole(tiny_model), 3))
    assert checkpoint.load_tokenizer(base)("ba")["input_ids"]
    made = (base.folder / "model.safetensors").stat().st_ino
    assert (checkpoint.resolve(str(gguf_file)).folder / "model.safetensors").stat().st_ino == made
    assert [each.name for each in base.folder.parent.glob("[!.]*")] == [base.folder.name]


def test_a_file_that_is_no_gguf_is_an_error_and_leaves_nothing_in_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ROBUST_UNLEARNING_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "broken.gguf"
    path.write_bytes(b"not a model")
    assert "broken.gguf" in resolve_error(path)
    assert not list((tmp_path / "cache" / "models").glob("[!.]*"))


def test_a_missing_gguf_file_gets_the_nearest_beside_it(gguf_file: Path) -> None:
    assert str(gguf_file) in resolve_error(gguf_file.with_name("tiny-f16.gguf"))

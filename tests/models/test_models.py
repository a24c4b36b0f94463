"""Finding base models in every form, refusing what could run code, and reading no more than is needed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import FAMILIES, SPECIAL, VOCABULARY, WORDS, random_model, save_tokenizer
from torch import Tensor, nn

from robust_unlearning import UserError
from robust_unlearning.models import checkpoint
from robust_unlearning.models.layers import decoder_layers

CPU = torch.device("cpu")
IDS = torch.tensor([[5, 6, 7, 8, 9, 10, 11], [11, 12, 13, 14, 15, 0, 0]])
MASK = torch.tensor([[1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0, 0]])


@torch.no_grad()
def _layer_output(model: nn.Module, index: int) -> Tensor:
    seen: list[Any] = []
    _, found = decoder_layers(model)
    handle = found[index].register_forward_hook(lambda _module, _args, output: seen.append(output))
    try:
        model(input_ids=IDS, attention_mask=MASK, use_cache=False)
    finally:
        handle.remove()
    return seen[0][0] if isinstance(seen[0], tuple) else seen[0]


def _whole(folder: Path) -> nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder).eval()


def _error(name: str | Path, **changes: Any) -> str:
    with pytest.raises(UserError) as caught:
        checkpoint.resolve(str(name), **changes)
    return str(caught.value)


def _copy(folder: Path, target: Path) -> Path:
    return Path(shutil.copytree(folder, target))


def _change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


# --- folders


def test_a_folder_with_one_weight_file(tiny_model: Path) -> None:
    base = checkpoint.resolve(str(tiny_model))
    assert base.folder == tiny_model
    assert set(base.weight_map) == set(_whole(tiny_model).state_dict())
    assert set(base.weight_map.values()) == {"model.safetensors"}


def test_a_folder_with_shards_has_the_same_tensors(tiny_model: Path, tiny_sharded: Path) -> None:
    single, sharded = checkpoint.resolve(str(tiny_model)), checkpoint.resolve(str(tiny_sharded))
    assert set(single.weight_map) == set(sharded.weight_map)
    assert len(set(sharded.weight_map.values())) > 5
    assert all(torch.equal(single.tensor(name), sharded.tensor(name)) for name in single.weight_map)


def test_the_whole_model_is_the_one_transformers_loads(tiny_sharded: Path) -> None:
    model = checkpoint.load_causal_lm(checkpoint.resolve(str(tiny_sharded)), "auto", CPU)
    expected = _whole(tiny_sharded)
    with torch.no_grad():
        assert torch.equal(model(IDS, attention_mask=MASK).logits, expected(IDS, attention_mask=MASK).logits)
    assert not model.training
    assert not any(each.requires_grad for each in model.parameters())


def test_the_tokenizer_comes_with_the_model(tiny_model: Path) -> None:
    tokenizer = checkpoint.load_tokenizer(checkpoint.resolve(str(tiny_model)))
    assert tokenizer(f"{WORDS[0]} {WORDS[7]}")["input_ids"] == [len(SPECIAL), len(SPECIAL) + 7]


def test_a_folder_without_tokenizer_is_an_error_when_it_is_needed(tiny_model: Path, tmp_path: Path) -> None:
    folder = _copy(tiny_model, tmp_path / "model")
    for each in folder.glob("tokenizer*"):
        each.unlink()
    base = checkpoint.resolve(str(folder))
    with pytest.raises(UserError, match="no tokenizer"):
        checkpoint.load_tokenizer(base)


def test_an_empty_folder_is_no_model(tmp_path: Path) -> None:
    assert "no config.json" in _error(tmp_path)


def test_a_folder_without_weights_names_the_files_it_needs(tiny_model: Path, tmp_path: Path) -> None:
    folder = _copy(tiny_model, tmp_path / "model")
    (folder / "model.safetensors").unlink()
    message = _error(folder)
    assert "model.safetensors" in message
    assert "model.safetensors.index.json" in message


def test_a_config_that_is_not_json_is_an_error(tiny_model: Path, tmp_path: Path) -> None:
    folder = _copy(tiny_model, tmp_path / "model")
    (folder / "config.json").write_text("{")
    assert "is not JSON" in _error(folder)


def test_a_missing_shard_is_named(tiny_sharded: Path, tmp_path: Path) -> None:
    folder = _copy(tiny_sharded, tmp_path / "model")
    base = checkpoint.resolve(str(folder))
    shard = base.weight_map["model.layers.2.mlp.down_proj.weight"]
    (folder / shard).unlink()
    with pytest.raises(UserError, match=shard):
        checkpoint.load_truncated(base, 4, "auto", CPU)


def test_a_wrong_path_gets_the_nearest_name(tiny_model: Path) -> None:
    message = _error(tiny_model.parent / "lama")
    assert "no such file or folder" in message
    assert str(tiny_model) in message


def test_a_file_of_another_kind_is_no_model(tiny_model: Path) -> None:
    assert "no folder and no .gguf file" in _error(tiny_model / "model.safetensors")


@pytest.mark.parametrize("name", ["smolm2-135m", "SmolLM2-135M"])
def test_an_unknown_name_gets_the_nearest_bundled_model(name: str) -> None:
    message = _error(name)
    assert "Did you mean the bundled model 'smollm2-135m'?" in message


def test_an_unknown_hub_id_lists_the_bundled_models() -> None:
    message = _error("no-such-org/no-such-model")
    assert "'no-such-org/no-such-model'" in message
    assert "Bundled: tiny, smollm2-135m" in message


# --- the hub's cache


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub, in use."""
    from huggingface_hub import constants

    folder = tmp_path / "hub"
    folder.mkdir()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    return folder


def _cached(cache: Path, source: Path, sha: str = "a" * 40) -> Path:
    """Put a model into the cache as the hub's own client does: blobs, links to them, and a reference."""
    root = cache / "models--org--tiny"
    snapshot = root / "snapshots" / sha
    for folder in (root / "blobs", root / "refs", snapshot):
        folder.mkdir(parents=True, exist_ok=True)
    for index, each in enumerate(sorted(source.iterdir())):
        blob = root / "blobs" / f"{sha[:8]}{index}"
        shutil.copyfile(each, blob)
        (snapshot / each.name).symlink_to(Path("..") / ".." / "blobs" / blob.name)
    (root / "refs" / "main").write_text(sha)
    return snapshot


def test_a_hub_id_is_found_in_the_cache_without_a_network(hub_cache: Path, tiny_sharded: Path) -> None:
    snapshot = _cached(hub_cache, tiny_sharded)
    base = checkpoint.resolve("org/tiny")
    assert (base.folder, base.repo, base.name) == (snapshot, "org/tiny", "org/tiny")
    expected = checkpoint.resolve(str(tiny_sharded))
    assert base.fingerprint(base.weight_map) == expected.fingerprint(expected.weight_map)
    ours = checkpoint.load_truncated(base, 4, "auto", CPU)
    assert torch.equal(_layer_output(ours, 3), _layer_output(_whole(tiny_sharded), 3))
    assert checkpoint.load_tokenizer(base)(WORDS[1])["input_ids"] == [len(SPECIAL) + 1]


def test_a_hub_model_without_its_tail_in_the_cache_still_loads_truncated(hub_cache: Path, tiny_sharded: Path) -> None:
    snapshot = _cached(hub_cache, tiny_sharded)
    for shard in _tail_only_shards(checkpoint.resolve(str(tiny_sharded)), 4):
        (snapshot / shard).unlink()
    base = checkpoint.resolve("org/tiny")
    ours = checkpoint.load_truncated(base, 4, "auto", CPU)
    assert torch.equal(_layer_output(ours, 3), _layer_output(_whole(tiny_sharded), 3))
    with pytest.raises(UserError, match="cannot get 'model-"):
        checkpoint.load_causal_lm(base, "auto", CPU)


def test_weights_come_from_the_revision_the_config_came_from(hub_cache: Path, tiny_model: Path, tmp_path: Path) -> None:
    bare = _copy(tiny_model, tmp_path / "bare")
    (bare / "model.safetensors").unlink()
    _cached(hub_cache, bare, "a" * 40)
    base = checkpoint.resolve("org/tiny")
    _cached(hub_cache, tiny_model, "b" * 40)  # the repository moves on
    with pytest.raises(UserError, match=r"model\.safetensors"):
        base.shard("model.safetensors")


# --- pickles and remote code


@pytest.fixture
def pickled(tiny_model: Path, tmp_path: Path) -> Path:
    """The tiny model with pickled weights only."""
    folder = _copy(tiny_model, tmp_path / "pickled")
    torch.save(_whole(tiny_model).state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    return folder


def test_pickled_weights_are_refused_with_the_way_out(pickled: Path) -> None:
    message = _error(pickled)
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
    assert str(pickled) in _error(pickled, allow_pickle=True)
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
    folder = _copy(tiny_model, tmp_path / "model")
    _change_config(folder, auto_map=auto_map)
    message = _error(folder)
    assert "modeling_own.OwnModel" in message
    assert "trust_remote_code=true" in message


def test_a_models_own_code_is_run_once_trusted(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers.dynamic_module_utils as dynamic

    monkeypatch.setattr(dynamic, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    folder = _copy(tiny_model, tmp_path / "owncode")
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
    _change_config(folder, auto_map=auto_map, model_type="own")
    base = checkpoint.resolve(str(folder), trust_remote_code=True)
    ours = checkpoint.load_truncated(base, 4, "auto", CPU)
    assert type(ours).__name__ == "OwnModel"
    assert torch.equal(_layer_output(ours, 3), _layer_output(_whole(tiny_model), 3))
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
    torch.testing.assert_close(_layer_output(ours, 3), _layer_output(_whole(tiny_model), 3))
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
    assert "broken.gguf" in _error(path)
    assert not list((tmp_path / "cache" / "models").glob("[!.]*"))


def test_a_missing_gguf_file_gets_the_nearest_beside_it(gguf_file: Path) -> None:
    assert str(gguf_file) in _error(gguf_file.with_name("tiny-f16.gguf"))


# --- truncated loads


def _tail_only_shards(base: checkpoint.Checkpoint, depth: int) -> list[str]:
    """Shards that hold nothing of the embedding or of the first `depth` layers."""
    needed = {
        shard
        for name, shard in base.weight_map.items()
        if "embed" in name or any(f".layers.{index}." in name for index in range(depth))
    }
    return sorted(set(base.weight_map.values()) - needed)


def test_a_truncated_load_never_reads_the_tail(tiny_sharded: Path, tmp_path: Path) -> None:
    expected = _layer_output(_whole(tiny_sharded), 3)
    folder = _copy(tiny_sharded, tmp_path / "model")
    tail = _tail_only_shards(checkpoint.resolve(str(folder)), 4)
    assert len(tail) >= 3
    for shard in tail:
        (folder / shard).unlink()
    model = checkpoint.load_truncated(checkpoint.resolve(str(folder)), 4, "auto", CPU)
    assert torch.equal(_layer_output(model, 3), expected)


def test_a_truncated_load_of_a_single_file_reads_no_byte_of_the_tail(tiny_model: Path, tmp_path: Path) -> None:
    expected = _layer_output(_whole(tiny_model), 3)
    folder = _copy(tiny_model, tmp_path / "model")
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    for name, entry in header.items():
        if name.startswith(("lm_head", "model.layers.4", "model.layers.5")):
            first, last = (start + each for each in entry["data_offsets"])
            data[first:last] = b"\xff" * (last - first)  # not a number, in every type
    path.write_bytes(data)
    model = checkpoint.load_truncated(checkpoint.resolve(str(folder)), 4, "auto", CPU)
    assert torch.equal(_layer_output(model, 3), expected)
    assert all(torch.isfinite(each).all() for each in model.parameters())


def test_a_truncated_model_has_only_the_first_layers_and_no_gradients(tiny_model: Path) -> None:
    model = checkpoint.load_truncated(checkpoint.resolve(str(tiny_model)), 4, "auto", CPU)
    assert len(decoder_layers(model)[1]) == 4
    assert not hasattr(model, "lm_head")
    assert not model.training
    assert not any(each.requires_grad for each in model.parameters())


def test_depth_may_be_the_whole_model_and_no_more(tiny_model: Path) -> None:
    base = checkpoint.resolve(str(tiny_model))
    model = checkpoint.load_truncated(base, 6, "auto", CPU)
    assert torch.equal(_layer_output(model, 5), _layer_output(_whole(tiny_model), 5))
    with pytest.raises(UserError, match="has layers 0 to 5; given 6"):
        checkpoint.load_truncated(base, 7, "auto", CPU)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_load_has_the_type_asked_for(dtype: str, tiny_model: Path) -> None:
    base = checkpoint.resolve(str(tiny_model))
    kinds = {each.dtype for each in checkpoint.load_truncated(base, 2, dtype, CPU).parameters()}
    assert kinds == {getattr(torch, dtype)}


def test_auto_is_the_checkpoints_type(tiny_model: Path, tmp_path: Path) -> None:
    _whole(tiny_model).to(torch.bfloat16).save_pretrained(tmp_path / "half")
    model = checkpoint.load_truncated(checkpoint.resolve(str(tmp_path / "half")), 2, "auto", CPU)
    assert {each.dtype for each in model.parameters()} == {torch.bfloat16}


def test_loading_leaves_transformers_logging_as_it_was(tiny_model: Path) -> None:
    from transformers.utils import logging

    level = logging.get_verbosity()
    checkpoint.load_truncated(checkpoint.resolve(str(tiny_model)), 2, "auto", CPU)
    assert logging.get_verbosity() == level
    assert logging.is_progress_bar_enabled()


def test_progress_bars_that_the_user_turned_off_stay_off(tiny_model: Path) -> None:
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        checkpoint.load_truncated(checkpoint.resolve(str(tiny_model)), 2, "auto", CPU)
        assert not logging.is_progress_bar_enabled()
    finally:
        logging.enable_progress_bar()


@pytest.mark.parametrize("family", FAMILIES)
def test_config_lists_with_an_entry_a_layer_are_cut_along(family: str, family_folder: Callable[[str], Path]) -> None:
    base = checkpoint.resolve(str(family_folder(family)))
    whole, cut = checkpoint.read_config(base), checkpoint.read_config(base, 4)
    assert (whole.num_hidden_layers, cut.num_hidden_layers) == (6, 4)
    kinds = getattr(whole, "layer_types", None)
    if kinds:
        assert len(kinds) == 6
        assert cut.layer_types == kinds[:4]


def test_the_windowed_families_do_mix_kinds_of_attention(family_folder: Callable[[str], Path]) -> None:
    """Else the tests on them would test nothing."""
    for family in ("qwen2", "gemma2", "gemma3"):
        kinds = checkpoint.read_config(checkpoint.resolve(str(family_folder(family)))).layer_types
        assert set(kinds) == {"sliding_attention", "full_attention"}


def test_a_config_list_of_another_length_is_left_alone(tiny_model: Path, tmp_path: Path) -> None:
    folder = _copy(tiny_model, tmp_path / "model")
    _change_config(folder, eos_token_id=[2, 3])
    assert checkpoint.read_config(checkpoint.resolve(str(folder)), 4).eos_token_id == [2, 3]


# --- names and fingerprints


@pytest.mark.parametrize(
    ("family", "parameter", "key"),
    [
        ("llama", "layers.5.mlp.down_proj.weight", "model.layers.5.mlp.down_proj.weight"),
        ("gpt_neox", "layers.5.mlp.dense_h_to_4h.bias", "gpt_neox.layers.5.mlp.dense_h_to_4h.bias"),
        ("gpt2", "h.5.mlp.c_proj.weight", "transformer.h.5.mlp.c_proj.weight"),
    ],
)
def test_a_parameter_is_found_under_the_checkpoints_own_prefix(
    family: str, parameter: str, key: str, family_folder: Callable[[str], Path]
) -> None:
    assert checkpoint.resolve(str(family_folder(family))).key_of(parameter) == key


def test_a_parameter_the_checkpoint_lacks_is_an_error_with_the_nearest(tiny_model: Path) -> None:
    with pytest.raises(UserError, match=r"0 tensors .*nearest: 'model\.layers\.5\.mlp\.down_proj\.weight'"):
        checkpoint.resolve(str(tiny_model)).key_of("layers.5.mlp.downproj.weight")


def test_the_fingerprint_is_of_names_and_bytes_not_of_shards(tiny_model: Path, tiny_sharded: Path) -> None:
    band = [f"model.layers.{index}.mlp.down_proj.weight" for index in (1, 2, 3)]
    expected = checkpoint.resolve(str(tiny_model)).fingerprint(band)
    assert checkpoint.resolve(str(tiny_sharded)).fingerprint(reversed(band)) == expected
    assert checkpoint.resolve(str(tiny_sharded)).fingerprint(band[:2]) != expected


def test_the_fingerprint_changes_with_the_band_tensors_and_not_with_others(tiny_model: Path, tmp_path: Path) -> None:
    band = ["model.layers.2.mlp.down_proj.weight"]
    expected = checkpoint.resolve(str(tiny_model)).fingerprint(band)
    for name, same in (
        ("model.layers.2.mlp.down_proj.weight", False),
        ("model.layers.4.mlp.down_proj.weight", True),
    ):
        model = _whole(tiny_model)
        with torch.no_grad():
            model.get_parameter(name)[0, 0] += 1e-3
        folder = tmp_path / name
        model.save_pretrained(folder)
        assert (checkpoint.resolve(str(folder)).fingerprint(band) == expected) is same


def test_the_fingerprint_sees_bfloat16_bytes(tiny_model: Path, tmp_path: Path) -> None:
    band = ["model.layers.2.mlp.down_proj.weight"]
    model = _whole(tiny_model).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "one")
    with torch.no_grad():
        model.get_parameter(band[0])[3, 5] *= 1.01
    model.save_pretrained(tmp_path / "two")
    one, two = (checkpoint.resolve(str(tmp_path / name)).fingerprint(band) for name in ("one", "two"))
    assert one != two


# --- devices


def test_an_unusable_device_is_an_error_with_a_way_out() -> None:
    with pytest.raises(UserError, match="try device=cpu"):
        checkpoint.pick_device("no-such-device")


def test_a_device_is_picked_by_name_or_by_what_is_there() -> None:
    assert checkpoint.pick_device("cpu") == CPU
    assert checkpoint.pick_device("auto").type in {"cpu", "cuda", "mps"}


def test_the_helpers_tokenizer_covers_the_vocabulary(tmp_path: Path) -> None:
    save_tokenizer(tmp_path)
    assert json.loads((tmp_path / "tokenizer.json").read_text())["model"]["vocab"][WORDS[-1]] < VOCABULARY

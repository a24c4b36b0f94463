"""Finding base models, and reading no more of them than is needed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import FAMILIES, SPECIAL, VOCABULARY, WORDS, save_tokenizer
from model_folders import CPU, IDS, MASK, change_config, copy_of, layer_output, resolve_error, whole

from robust_unlearning import UserError
from robust_unlearning.models import checkpoint
from robust_unlearning.models.layers import decoder_layers

# --- folders


def test_a_folder_with_one_weight_file(tiny_model: Path) -> None:
    base = checkpoint.resolve(str(tiny_model))
    assert base.folder == tiny_model
    assert set(base.weight_map) == set(whole(tiny_model).state_dict())
    assert set(base.weight_map.values()) == {"model.safetensors"}


def test_a_folder_with_shards_has_the_same_tensors(tiny_model: Path, tiny_sharded: Path) -> None:
    single, sharded = checkpoint.resolve(str(tiny_model)), checkpoint.resolve(str(tiny_sharded))
    assert set(single.weight_map) == set(sharded.weight_map)
    assert len(set(sharded.weight_map.values())) > 5
    assert all(torch.equal(single.tensor(name), sharded.tensor(name)) for name in single.weight_map)


def test_the_whole_model_is_the_one_transformers_loads(tiny_sharded: Path) -> None:
    model = checkpoint.load_causal_lm(checkpoint.resolve(str(tiny_sharded)), "auto", CPU)
    expected = whole(tiny_sharded)
    with torch.no_grad():
        assert torch.equal(model(IDS, attention_mask=MASK).logits, expected(IDS, attention_mask=MASK).logits)
    assert not model.training
    assert not any(each.requires_grad for each in model.parameters())


def test_the_tokenizer_comes_with_the_model(tiny_model: Path) -> None:
    tokenizer = checkpoint.load_tokenizer(checkpoint.resolve(str(tiny_model)))
    assert tokenizer(f"{WORDS[0]} {WORDS[7]}")["input_ids"] == [len(SPECIAL), len(SPECIAL) + 7]


def test_a_folder_without_tokenizer_is_an_error_when_it_is_needed(tiny_model: Path, tmp_path: Path) -> None:
    folder = copy_of(tiny_model, tmp_path / "model")
    for each in folder.glob("tokenizer*"):
        each.unlink()
    base = checkpoint.resolve(str(folder))
    with pytest.raises(UserError, match="no tokenizer"):
        checkpoint.load_tokenizer(base)


def test_an_empty_folder_is_no_model(tmp_path: Path) -> None:
    assert "no config.json" in resolve_error(tmp_path)


def test_a_folder_without_weights_names_the_files_it_needs(tiny_model: Path, tmp_path: Path) -> None:
    folder = copy_of(tiny_model, tmp_path / "model")
    (folder / "model.safetensors").unlink()
    message = resolve_error(folder)
    assert "model.safetensors" in message
    assert "model.safetensors.index.json" in message


def test_a_config_that_is_not_json_is_an_error(tiny_model: Path, tmp_path: Path) -> None:
    folder = copy_of(tiny_model, tmp_path / "model")
    (folder / "config.json").write_text("{")
    assert "is not JSON" in resolve_error(folder)


def test_a_missing_shard_is_named(tiny_sharded: Path, tmp_path: Path) -> None:
    folder = copy_of(tiny_sharded, tmp_path / "model")
    base = checkpoint.resolve(str(folder))
    shard = base.weight_map["model.layers.2.mlp.down_proj.weight"]
    (folder / shard).unlink()
    with pytest.raises(UserError, match=shard):
        checkpoint.load_truncated(base, 4, "auto", CPU)


def test_a_wrong_path_gets_the_nearest_name(tiny_model: Path) -> None:
    message = resolve_error(tiny_model.parent / "lama")
    assert "no such file or folder" in message
    assert str(tiny_model) in message


def test_a_file_of_another_kind_is_no_model(tiny_model: Path) -> None:
    assert "no folder and no .gguf file" in resolve_error(tiny_model / "model.safetensors")


@pytest.mark.parametrize("name", ["smolm2-135m", "SmolLM2-135M"])
def test_an_unknown_name_gets_the_nearest_bundled_model(name: str) -> None:
    message = resolve_error(name)
    assert "Did you mean the bundled model 'smollm2-135m'?" in message


def test_an_unknown_hub_id_lists_the_bundled_models() -> None:
    message = resolve_error("no-such-org/no-such-model")
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
    assert torch.equal(layer_output(ours, 3), layer_output(whole(tiny_sharded), 3))
    assert checkpoint.load_tokenizer(base)(WORDS[1])["input_ids"] == [len(SPECIAL) + 1]


def test_a_hub_model_without_its_tail_in_the_cache_still_loads_truncated(hub_cache: Path, tiny_sharded: Path) -> None:
    snapshot = _cached(hub_cache, tiny_sharded)
    for shard in _tail_only_shards(checkpoint.resolve(str(tiny_sharded)), 4):
        (snapshot / shard).unlink()
    base = checkpoint.resolve("org/tiny")
    ours = checkpoint.load_truncated(base, 4, "auto", CPU)
    assert torch.equal(layer_output(ours, 3), layer_output(whole(tiny_sharded), 3))
    with pytest.raises(UserError, match="cannot get 'model-"):
        checkpoint.load_causal_lm(base, "auto", CPU)


def test_weights_come_from_the_revision_the_config_came_from(hub_cache: Path, tiny_model: Path, tmp_path: Path) -> None:
    bare = copy_of(tiny_model, tmp_path / "bare")
    (bare / "model.safetensors").unlink()
    _cached(hub_cache, bare, "a" * 40)
    base = checkpoint.resolve("org/tiny")
    _cached(hub_cache, tiny_model, "b" * 40)  # the repository moves on
    with pytest.raises(UserError, match=r"model\.safetensors"):
        base.shard("model.safetensors")


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
    expected = layer_output(whole(tiny_sharded), 3)
    folder = copy_of(tiny_sharded, tmp_path / "model")
    tail = _tail_only_shards(checkpoint.resolve(str(folder)), 4)
    assert len(tail) >= 3
    for shard in tail:
        (folder / shard).unlink()
    model = checkpoint.load_truncated(checkpoint.resolve(str(folder)), 4, "auto", CPU)
    assert torch.equal(layer_output(model, 3), expected)


def test_a_truncated_load_of_a_single_file_reads_no_byte_of_the_tail(tiny_model: Path, tmp_path: Path) -> None:
    expected = layer_output(whole(tiny_model), 3)
    folder = copy_of(tiny_model, tmp_path / "model")
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
    assert torch.equal(layer_output(model, 3), expected)
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
    assert torch.equal(layer_output(model, 5), layer_output(whole(tiny_model), 5))
    with pytest.raises(UserError, match="has layers 0 to 5; given 6"):
        checkpoint.load_truncated(base, 7, "auto", CPU)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_load_has_the_type_asked_for(dtype: str, tiny_model: Path) -> None:
    base = checkpoint.resolve(str(tiny_model))
    kinds = {each.dtype for each in checkpoint.load_truncated(base, 2, dtype, CPU).parameters()}
    assert kinds == {getattr(torch, dtype)}


def test_auto_is_the_checkpoints_type(tiny_model: Path, tmp_path: Path) -> None:
    whole(tiny_model).to(torch.bfloat16).save_pretrained(tmp_path / "half")
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
    folder = copy_of(tiny_model, tmp_path / "model")
    change_config(folder, eos_token_id=[2, 3])
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
        model = whole(tiny_model)
        with torch.no_grad():
            model.get_parameter(name)[0, 0] += 1e-3
        folder = tmp_path / name
        model.save_pretrained(folder)
        assert (checkpoint.resolve(str(folder)).fingerprint(band) == expected) is same


def test_the_fingerprint_sees_bfloat16_bytes(tiny_model: Path, tmp_path: Path) -> None:
    band = ["model.layers.2.mlp.down_proj.weight"]
    model = whole(tiny_model).to(torch.bfloat16)
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

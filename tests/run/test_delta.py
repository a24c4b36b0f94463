"""Deltas: saved, loaded, put into a model and taken out again, and joined to a base on disk."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import random_model, save_tokenizer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from robust_unlearning import UserError, load_recipe, unlearn
from robust_unlearning.models import checkpoint
from robust_unlearning.run.delta import Delta, apply, load_delta

CPU = torch.device("cpu")
IDS = torch.tensor([[5, 6, 7, 8, 9, 10, 11], [11, 12, 13, 14, 15, 0, 0]])
MASK = torch.tensor([[1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0, 0]])


@torch.no_grad()
def _logits(model: nn.Module) -> Tensor:
    return model(input_ids=IDS, attention_mask=MASK).logits


def _load(folder: Path) -> nn.Module:
    """As any user of transformers loads it."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder).eval()


def _raw(folder: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Tensor name -> type, shape and bytes as they stand in the weight files."""
    found = {}
    for path in folder.glob("*.safetensors"):
        data = path.read_bytes()
        start = 8 + int.from_bytes(data[:8], "little")
        for name, entry in json.loads(data[8:start]).items():
            if name != "__metadata__":
                first, last = entry["data_offsets"]
                found[name] = (entry["dtype"], tuple(entry["shape"]), data[start + first : start + last])
    return found


def _unlearned(plain: Mapping[str, Any], out: Path, **changes: Any) -> Delta:
    return load_delta(unlearn(load_recipe({**plain, "steps": 2, **changes}), out).path)


@pytest.fixture(scope="module")
def delta(plain_recipe: Mapping[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Delta:
    """Two steps on the tiny model; its sharded copy has the same names and bytes, so the same fingerprint."""
    return _unlearned(plain_recipe, tmp_path_factory.mktemp("run") / "run")


# --- files


@pytest.mark.integration
def test_a_saved_delta_loads_as_it_was(delta: Delta, tmp_path: Path) -> None:
    delta.save(tmp_path / "d.safetensors")
    again = load_delta(tmp_path / "d.safetensors")
    assert again.provenance == delta.provenance
    assert again.tensors.keys() == delta.tensors.keys()
    assert all(torch.equal(again.tensors[name], value) for name, value in delta.tensors.items())
    assert [each.name for each in tmp_path.iterdir()] == ["d.safetensors"]


@pytest.mark.integration
def test_a_delta_names_its_origin(delta: Delta, tiny_model: Path) -> None:
    provenance = delta.provenance
    assert provenance["model"] == str(tiny_model)
    assert provenance["step"] == 2
    assert provenance["fingerprint"] == checkpoint.resolve(str(tiny_model)).fingerprint(delta.tensors)
    assert load_recipe(provenance["recipe"]).content_hash() == provenance["recipe_hash"]


def test_a_folder_without_delta_points_to_the_record(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no delta\.safetensors in this folder.*run\.json"):
        load_delta(tmp_path)


def test_another_safetensors_file_is_no_delta(tiny_model: Path) -> None:
    with pytest.raises(UserError, match="no delta of this project"):
        load_delta(tiny_model / "model.safetensors")


def test_a_file_of_another_kind_is_no_delta(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_text("text")
    with pytest.raises(UserError, match="not a safetensors file"):
        load_delta(tmp_path / "a.safetensors")


# --- in a loaded model


@pytest.mark.integration
def test_applied_puts_the_tensors_in_and_the_bases_back(delta: Delta, tiny_model: Path) -> None:
    model = checkpoint.load_causal_lm(checkpoint.resolve(str(tiny_model)), "auto", CPU)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    expected = _logits(model)
    with delta.applied(model) as inside:
        assert inside is model
        assert all(torch.equal(model.get_parameter(name), value) for name, value in delta.tensors.items())
        assert not torch.equal(_logits(model), expected)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(_logits(model), expected)


@pytest.mark.integration
def test_applied_puts_the_bases_tensors_back_after_an_exception(delta: Delta, tiny_model: Path) -> None:
    model = checkpoint.load_causal_lm(checkpoint.resolve(str(tiny_model)), "auto", CPU)
    before = {name: value.clone() for name, value in model.state_dict().items()}

    def fail() -> None:
        with delta.applied(model):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.integration
def test_many_deltas_share_one_loaded_base(delta: Delta, tiny_model: Path) -> None:
    model = checkpoint.load_causal_lm(checkpoint.resolve(str(tiny_model)), "auto", CPU)
    other = Delta({name: value * 2 for name, value in delta.tensors.items()}, delta.provenance)
    with delta.applied(model):
        first = _logits(model)
    with other.applied(model):
        assert not torch.equal(_logits(model), first)
    with delta.applied(model):
        assert torch.equal(_logits(model), first)


@pytest.mark.integration
def test_a_delta_does_not_fit_a_model_of_other_names(delta: Delta, family_folder: Callable[[str], Path]) -> None:
    model = _load(family_folder("gpt_neox"))
    with pytest.raises(UserError, match="has no tensor"), delta.applied(model):
        pass


# --- joined to a base on disk


@pytest.mark.integration
@pytest.mark.parametrize("name", ["tiny_model", "tiny_sharded"])
def test_the_applied_folder_is_the_base_with_the_delta(
    name: str, delta: Delta, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    base = checkpoint.resolve(str(request.getfixturevalue(name)))
    apply(delta, base, tmp_path / "new")
    model = checkpoint.load_causal_lm(base, "auto", CPU)
    with delta.applied(model):
        expected = _logits(model)
    assert torch.equal(_logits(_load(tmp_path / "new")), expected)
    assert not torch.equal(expected, _logits(model))


@pytest.mark.integration
@pytest.mark.parametrize("name", ["tiny_model", "tiny_sharded"])
def test_every_other_tensor_is_the_bases_byte_for_byte(
    name: str, delta: Delta, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(name)
    apply(delta, checkpoint.resolve(str(folder)), tmp_path / "new")
    before, after = _raw(folder), _raw(tmp_path / "new")
    assert before.keys() == after.keys()
    assert {key for key in before if before[key] != after[key]} == set(delta.tensors)
    for key, value in delta.tensors.items():
        assert after[key] == (before[key][0], before[key][1], value.numpy().tobytes())


@pytest.mark.integration
def test_only_shards_with_changed_tensors_are_rewritten_and_the_others_are_linked(
    delta: Delta, tiny_sharded: Path, tmp_path: Path
) -> None:
    base = checkpoint.resolve(str(tiny_sharded))
    before = {each.name: each.read_bytes() for each in tiny_sharded.iterdir()}
    changed = apply(delta, base, tmp_path / "new")
    assert changed == sorted({base.weight_map[name] for name in delta.tensors})
    assert 0 < len(changed) < len(set(base.weight_map.values()))
    for shard in set(base.weight_map.values()):
        old, new = (tiny_sharded / shard).stat(), (tmp_path / "new" / shard).stat()
        assert ((old.st_dev, old.st_ino) == (new.st_dev, new.st_ino)) is (shard not in changed)
    assert {each.name: each.read_bytes() for each in tiny_sharded.iterdir()} == before


@pytest.mark.integration
def test_shards_are_copied_where_links_cannot_be_made(
    delta: Delta, tiny_sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError("another file system")

    monkeypatch.setattr("os.link", refuse)
    apply(delta, checkpoint.resolve(str(tiny_sharded)), tmp_path / "new")
    before, after = _raw(tiny_sharded), _raw(tmp_path / "new")
    assert {key for key in before if before[key] != after[key]} == set(delta.tensors)


@pytest.mark.integration
def test_config_tokenizer_and_card_come_along(delta: Delta, tiny_model: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_model, tmp_path / "base"))
    (folder / "README.md").write_text("the base's own card")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "pytorch_model.bin").write_bytes(b"the base's weights again")
    apply(delta, checkpoint.resolve(str(folder)), tmp_path / "new", card="# Unlearned\n")
    names = {each.name for each in (tmp_path / "new").iterdir()}
    assert names == {each.name for each in folder.iterdir()} - {"pytorch_model.bin"}
    assert (tmp_path / "new" / "README.md").read_text() == "# Unlearned\n"
    assert checkpoint.load_tokenizer(checkpoint.resolve(str(tmp_path / "new")))("baba")["input_ids"]


@pytest.mark.integration
def test_no_second_copy_of_the_bases_weights_comes_along(delta: Delta, tiny_sharded: Path, tmp_path: Path) -> None:
    """Some repositories hold `consolidated.safetensors` beside the shards, with what was to be forgotten."""
    folder = Path(shutil.copytree(tiny_sharded, tmp_path / "base"))
    save_file({"output.weight": torch.zeros(2)}, folder / "consolidated.safetensors")
    apply(delta, checkpoint.resolve(str(folder)), tmp_path / "new")
    assert not (tmp_path / "new" / "consolidated.safetensors").exists()


@pytest.mark.integration
def test_a_base_with_both_one_file_and_shards_still_gives_the_unlearned_model(
    delta: Delta, tiny_model: Path, tiny_sharded: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny_sharded, tmp_path / "base"))
    shutil.copy(tiny_model / "model.safetensors", folder)
    apply(delta, checkpoint.resolve(str(folder)), tmp_path / "new")
    model = checkpoint.load_causal_lm(checkpoint.resolve(str(tiny_model)), "auto", CPU)
    with delta.applied(model):
        expected = _logits(model)
    assert torch.equal(_logits(_load(tmp_path / "new")), expected)


@pytest.mark.integration
def test_an_applied_folder_can_be_unlearned_again_and_the_first_delta_no_longer_fits_it(
    delta: Delta, tiny_model: Path, plain_recipe: Mapping[str, Any], tmp_path: Path
) -> None:
    apply(delta, checkpoint.resolve(str(tiny_model)), tmp_path / "once")
    second = _unlearned(plain_recipe, tmp_path / "run", model=str(tmp_path / "once"))
    apply(second, checkpoint.resolve(str(tmp_path / "once")), tmp_path / "twice")
    assert _load(tmp_path / "twice") is not None
    with pytest.raises(UserError, match="fingerprint"):
        apply(delta, checkpoint.resolve(str(tmp_path / "once")), tmp_path / "wrong")


@pytest.mark.integration
def test_a_base_of_the_same_shape_with_other_weights_is_refused_and_no_folder_left(
    delta: Delta, tmp_path: Path
) -> None:
    other = random_model("llama")
    with torch.no_grad():
        other.get_parameter(next(iter(delta.tensors)))[0, 0] += 1
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match="would give a broken model"):
        apply(delta, checkpoint.resolve(str(tmp_path / "other")), tmp_path / "new")
    assert [each.name for each in tmp_path.iterdir()] == ["other"]


@pytest.mark.integration
def test_a_base_of_another_family_is_refused_by_the_tensor_it_lacks(
    delta: Delta, family_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"changes 'model\.layers\.1\.mlp\.down_proj\.weight', which"):
        apply(delta, checkpoint.resolve(str(family_folder("gpt_neox"))), tmp_path / "new")
    assert not list(tmp_path.iterdir())


@pytest.mark.integration
def test_a_target_that_exists_is_refused_and_left_alone(delta: Delta, tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("text")
    with pytest.raises(UserError, match="exists already"):
        apply(delta, checkpoint.resolve(str(tiny_model)), tmp_path)
    assert [each.name for each in tmp_path.iterdir()] == ["mine"]


@pytest.mark.integration
def test_a_failure_on_the_way_leaves_no_folder(
    delta: Delta, tiny_sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("robust_unlearning.run.delta.write_tensors", fail)
    with pytest.raises(OSError, match="disk full"):
        apply(delta, checkpoint.resolve(str(tiny_sharded)), tmp_path / "new")
    assert not list(tmp_path.iterdir())


# --- other families


def _round_trip(model: Path, delta: Delta, target: Path) -> None:
    base = checkpoint.resolve(str(model))
    apply(delta, base, target)
    loaded = checkpoint.load_causal_lm(base, "auto", CPU)
    plain = _logits(loaded)
    with delta.applied(loaded):
        expected = _logits(loaded)
    assert torch.equal(_logits(_load(target)), expected)
    assert not torch.equal(plain, expected)
    assert torch.equal(_logits(loaded), plain)
    before, after = _raw(model), _raw(target)
    assert {key for key in before if before[key] != after[key]} == set(delta.tensors)


@pytest.mark.integration
@pytest.mark.parametrize(
    ("family", "pattern", "key"),
    [
        ("gpt_neox", "mlp.dense_4h_to_h", "gpt_neox.layers.2.mlp.dense_4h_to_h.weight"),
        ("gpt2", "mlp.c_proj", "transformer.h.2.mlp.c_proj.weight"),
        ("gemma3", "mlp.down_proj", "model.layers.2.mlp.down_proj.weight"),
        ("phi3", "mlp.*", "model.layers.2.mlp.gate_up_proj.weight"),
        ("gpt_neox", "all", "gpt_neox.layers.2.attention.dense.bias"),
    ],
)
def test_families_with_other_names_and_prefixes_round_trip(
    family: str,
    pattern: str,
    key: str,
    family_folder: Callable[[str], Path],
    plain_recipe: Mapping[str, Any],
    tmp_path: Path,
) -> None:
    folder = family_folder(family)
    delta = _unlearned(plain_recipe, tmp_path / "run", model=str(folder), train_tensors=pattern)
    assert key in delta.tensors
    _round_trip(folder, delta, tmp_path / "new")


@pytest.mark.integration
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_checkpoint_saved_without_the_models_prefix_round_trips(
    family: str, plain_recipe: Mapping[str, Any], tmp_path: Path
) -> None:
    """As `openai-community/gpt2` on the hub: `h.0.mlp…` where the model says `transformer.h.0.mlp…`."""
    model = random_model(family, tie_word_embeddings=True)
    folder = tmp_path / "bare"
    model.save_pretrained(folder)
    prefix = model.base_model_prefix + "."
    state = load_file(folder / "model.safetensors")
    bare = {name.removeprefix(prefix): value for name, value in state.items() if not name.startswith("lm_head")}
    save_file(bare, folder / "model.safetensors", {"format": "pt"})
    save_tokenizer(folder)
    pattern = "mlp.c_proj" if family == "gpt2" else "mlp.down_proj"
    delta = _unlearned(plain_recipe, tmp_path / "run", model=str(folder), train_tensors=pattern)
    assert not any(name.startswith(prefix) for name in delta.tensors)
    _round_trip(folder, delta, tmp_path / "new")


@pytest.mark.integration
def test_tied_embeddings_stay_tied(plain_recipe: Mapping[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / "tied"
    random_model("llama", tie_word_embeddings=True).save_pretrained(folder)
    save_tokenizer(folder)
    assert "lm_head.weight" not in checkpoint.resolve(str(folder)).weight_map
    delta = _unlearned(plain_recipe, tmp_path / "run", model=str(folder))
    _round_trip(folder, delta, tmp_path / "new")
    model: Any = _load(tmp_path / "new")
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight


@pytest.mark.integration
def test_a_bfloat16_base_stays_bfloat16(plain_recipe: Mapping[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / "half"
    random_model("llama").to(torch.bfloat16).save_pretrained(folder)
    save_tokenizer(folder)
    delta = _unlearned(plain_recipe, tmp_path / "run", model=str(folder))
    _round_trip(folder, delta, tmp_path / "new")
    assert {kind for kind, _, _ in _raw(tmp_path / "new").values()} == {"BF16"}

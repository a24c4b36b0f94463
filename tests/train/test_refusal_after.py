"""DPO's refusals after forget text: which tokens are given, what is predicted, and that both readings keep apart."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import WORDS, random_model
from safetensors.torch import load_file

from robust_unlearning import load_recipe, unlearn
from robust_unlearning.models.checkpoint import load_tokenizer, resolve
from robust_unlearning.run.delta import load_delta
from robust_unlearning.run.folder import RunFolder
from robust_unlearning.train.references import folder
from robust_unlearning.train.step import StepBatch, step_losses
from robust_unlearning.train.trainer import Trainer

REFUSALS = [" ".join(WORDS[start : start + count]) for start, count in ((3, 3), (9, 5), (2, 2), (14, 4))]
AFTER = "refusal_after=forget_text"


@pytest.fixture
def dpo(tiny_recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setenv("ROBUST_UNLEARNING_CACHE", str(tmp_path / "cache"))
    own = tmp_path / "idontknow.jsonl"
    own.write_text("".join(json.dumps(refusal) + "\n" for refusal in REFUSALS), encoding="utf-8")
    left = {key: value for key, value in tiny_recipe.items() if key != "steering_scale"}
    return {**left, "method": "dpo", "retain_weight": 1, "refusals": str(own), "dtype": "float32"}


def _trainer(recipe: dict[str, Any], out: Path, *overrides: str) -> Trainer:
    return Trainer([RunFolder.open(out, load_recipe(recipe, overrides))])


def _sequences(batch: Any) -> list[list[int]]:
    return [ids[mask.bool()].tolist() for ids, mask in zip(batch.ids, batch.mask, strict=True)]


@pytest.mark.unit
@pytest.mark.parametrize("max_tokens", [24, 4, 2])
def test_only_the_refusals_tokens_are_predicted_given_the_forget_sequence(
    max_tokens: int, dpo: dict[str, Any], tmp_path: Path
) -> None:
    trainer = _trainer({**dpo, "max_tokens": max_tokens}, tmp_path / "run", AFTER)
    tokenizer: Any = load_tokenizer(resolve(dpo["model"]))
    refusals = [tokenizer(refusal, add_special_tokens=False)["input_ids"][: max_tokens - 1] for refusal in REFUSALS]
    model = random_model("llama")
    for step in range(4):
        _, forget, _, view = trainer.batches(step)
        assert view is not None
        assert view.reference_logp is not None
        texts = _sequences(forget.batch)
        scored = view.sequence_logp(view.final)
        for row, (sequence, text) in enumerate(zip(_sequences(view.batch), texts, strict=True)):
            refusal = next(each for each in refusals if sequence == text[: max_tokens - len(each)] + each)
            given = len(sequence) - len(refusal)
            assert given >= 1
            assert len(sequence) <= max_tokens
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([sequence])).logits[0].double().numpy()
            log_p = logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)
            expected = sum(log_p[place - 1, sequence[place]] for place in range(given, len(sequence)))
            assert view.reference_logp[row].item() == pytest.approx(expected, rel=1e-4)
            assert scored.logp[row].item() == pytest.approx(expected, rel=1e-4)
            assert scored.length[row].item() == len(refusal)
        assert view.predictions == int(scored.length.sum())


@pytest.mark.unit
def test_the_refusals_part_of_the_loss_moves_with_the_forget_text_in_one_reading_only(
    dpo: dict[str, Any], tmp_path: Path
) -> None:
    other = tmp_path / "other.txt"
    other.write_text("\n\n".join(" ".join(WORDS[start:] + WORDS[:start]) for start in range(20)), encoding="utf-8")
    found: dict[str, list[tuple[float, float]]] = {}
    for name, overrides in {"nothing": [], "forget_text": [AFTER]}.items():
        held = None
        for number, changes in enumerate(([], [f"topics.spells.forget={other}"])):
            trainer = _trainer(dpo, tmp_path / f"{name}-{number}", *overrides, *changes)
            batch = trainer.batches(0)
            held = held or batch.forget  # the forget term is held as it is: what moves is the refusals' part
            (candidate,) = trainer.candidates
            for master in candidate.masters.values():
                master.data += 0.05 * torch.randn(master.shape, generator=torch.Generator().manual_seed(1))
            term = step_losses(candidate, StepBatch(batch.topic, held, batch.retain, batch.refusals)).forget
            found.setdefault(name, []).append((term.loss.item(), term.measures["refusal_nats"].item()))
    first, second = found["nothing"]
    assert first == second
    first, second = found["forget_text"]
    assert abs(first[0] - second[0]) > 1e-4
    assert abs(first[1] - second[1]) > 1e-3


def test_references_of_both_readings_are_kept_apart_and_read_again(dpo: dict[str, Any], tmp_path: Path) -> None:
    alone = unlearn(load_recipe(dpo), tmp_path / "alone")
    kept = {path.name for path in folder().glob("*.safetensors")}
    assert len(kept) == 2  # forget text, refusals
    after = unlearn(load_recipe(dpo, [AFTER]), tmp_path / "after")
    (added,) = {path.name for path in folder().glob("*.safetensors")} - kept
    values = load_file(folder() / added)["logp"]
    assert values.shape == (16,)  # 8 steps of 2
    assert not values.isnan().any()
    again = unlearn(load_recipe(dpo, [AFTER, "temperature=0.2"]), tmp_path / "again")
    assert torch.equal(load_file(folder() / added)["logp"], values)
    longer = unlearn(load_recipe(dpo, [AFTER, "steps=11"]), tmp_path / "longer")
    assert torch.equal(load_file(folder() / added)["logp"][:16], values)
    assert len(load_file(folder() / added)["logp"]) == 24  # whole blocks
    deltas = [load_delta(run.path).tensors for run in (alone, after, again, longer)]
    assert any(not torch.equal(value, deltas[1][name]) for name, value in deltas[0].items())


def test_a_resumed_run_is_an_uninterrupted_one(dpo: dict[str, Any], tmp_path: Path) -> None:
    def stop(_candidate: Any, row: dict[str, Any]) -> None:
        if row["step"] == 5:
            raise KeyboardInterrupt

    recipe = load_recipe(dpo, [AFTER, "log_every=1", "checkpoint_every=3"])
    whole = unlearn(recipe, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        unlearn(recipe, tmp_path / "cut", report=stop)
    resumed = unlearn(recipe, tmp_path / "cut", resume=True)
    first, second = (load_delta(run.path).tensors for run in (whole, resumed))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.unit
def test_at_its_default_the_field_is_no_part_of_the_hash(plain: dict[str, Any]) -> None:
    """Runs from before the field can be resumed, and are found by their names."""
    recipe = load_recipe(plain)
    before = {key: value for key, value in recipe.model_dump(mode="json").items() if key != "refusal_after"}
    old = hashlib.sha256(json.dumps(before, sort_keys=True).encode()).hexdigest()[:16]
    assert recipe.content_hash() == old == load_recipe(plain, ["refusal_after=nothing"]).content_hash()
    assert load_recipe(plain, [AFTER]).content_hash() != old

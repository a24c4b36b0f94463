"""A run: repeatable to the bit, honest when it fails, and what it writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from training_runs import Report, rows_of, run_recipe, same, tensors_of, trainer_of, two_topics

from robust_unlearning import UserError
from robust_unlearning.methods.table import METHODS
from robust_unlearning.run.delta import load_delta
from robust_unlearning.run.folder import open_run
from robust_unlearning.train.candidate import Candidate
from robust_unlearning.train.step import take_step

# --- what a run does and writes


def test_a_run_forgets_and_retains_and_writes_its_folder(tiny_recipe: dict[str, Any], tmp_path: Path) -> None:
    run = run_recipe(tiny_recipe, tmp_path / "run", "retain_weight=0.1", "learning_rate=3e-2", "steps=20")
    rows = run.rows()
    assert [row["step"] for row in rows] == list(range(1, 21))
    assert np.mean([row["forget_loss"] for row in rows[-3:]]) < np.mean([row["forget_loss"] for row in rows[:3]])
    assert rows[-1]["forget_cosine"] < 0.99
    names = {each.name for each in run.path.iterdir()}
    assert {"recipe.yaml", "run.json", "metrics.jsonl", "delta.safetensors", "README.md"} <= names
    assert "checkpoint.safetensors" not in names
    record = json.loads((run.path / "run.json").read_text())
    assert record["status"] == "finished"
    assert record["steps"] == 20
    assert record["tokens"] > 0
    assert record["model_fingerprint"] == load_delta(run.path).provenance["fingerprint"]
    assert record["trained_tensors"] == {f"model.layers.{index}.mlp.down_proj.weight": [32, 64] for index in (1, 2, 3)}
    assert record["trained_parameters"] == 3 * 32 * 64
    assert (record["noise_std"], record["noise_variance"]) == (0, 0)


def test_the_delta_holds_the_trained_tensors_alone_in_the_checkpoints_types(
    tiny_recipe: dict[str, Any], tmp_path: Path
) -> None:
    run = run_recipe({**tiny_recipe, "train_layers": [0, 2]}, tmp_path / "run", "train_tensors=mlp.*", "dtype=bfloat16")
    tensors = tensors_of(run)
    parts = ("down_proj", "gate_proj", "up_proj")
    assert set(tensors) == {f"model.layers.{index}.mlp.{part}.weight" for index in (0, 2) for part in parts}
    assert {each.dtype for each in tensors.values()} == {torch.float32}
    base = load_file(Path(tiny_recipe["model"]) / "model.safetensors")
    assert not any(torch.equal(value, base[name]) for name, value in tensors.items())


def test_a_pattern_that_matches_nothing_names_the_nearest(tiny_recipe: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"did you mean 'mlp\.down_proj'"):
        run_recipe(tiny_recipe, tmp_path / "run", "train_tensors=mlp.downproj")


def test_a_layer_the_model_lacks_is_an_error(tiny_recipe: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="layers 0 to 5; given 6"):
        run_recipe(tiny_recipe, tmp_path / "run", "layer=6")


@pytest.mark.parametrize("method", METHODS)
def test_a_run_repeats_itself_to_the_bit_and_another_seed_does_not(
    method: str, tiny_recipe: dict[str, Any], tmp_path: Path
) -> None:
    recipe = {**tiny_recipe, "method": method, "adaptive_scale": 2, "noise_std": 0.2}
    first, again, other = (
        run_recipe(recipe, tmp_path / name, f"seed={seed}") for name, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    assert same(tensors_of(first), tensors_of(again))
    assert rows_of(first) == rows_of(again)
    assert not same(tensors_of(first), tensors_of(other))


def test_a_run_draws_nothing_from_the_global_generator(tiny_recipe: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(3)
    expected = run_recipe(tiny_recipe, tmp_path / "a", "noise_std=0.2")
    torch.manual_seed(4)
    assert same(tensors_of(run_recipe(tiny_recipe, tmp_path / "b", "noise_std=0.2")), tensors_of(expected))


# --- run folders


@pytest.mark.parametrize("resume", [False, True])
def test_a_finished_run_is_left_alone(resume: bool, tiny_recipe: dict[str, Any], tmp_path: Path) -> None:
    run = run_recipe(tiny_recipe, tmp_path / "run")
    before = {each.name: (each.stat().st_mtime_ns, each.read_bytes()) for each in run.path.iterdir()}
    again = run_recipe(tiny_recipe, tmp_path / "run", resume=resume)
    assert again.status == "finished"
    assert {each.name: (each.stat().st_mtime_ns, each.read_bytes()) for each in run.path.iterdir()} == before


def test_a_folder_of_another_recipe_is_refused_with_the_fields_that_differ(
    tiny_recipe: dict[str, Any], tmp_path: Path
) -> None:
    run_recipe(tiny_recipe, tmp_path / "run", "steps=3")
    with pytest.raises(UserError) as caught:
        run_recipe(tiny_recipe, tmp_path / "run", "steps=4", "noise_std=0.1", resume=True)
    message = str(caught.value)
    assert "another recipe" in message
    assert "steps (3 there)" in message
    assert "noise_std (None there)" in message
    assert "learning_rate" not in message


def test_a_folder_of_something_else_is_refused(tiny_recipe: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="not empty and holds no run"):
        run_recipe(tiny_recipe, tmp_path)
    with pytest.raises(UserError, match="is a file"):
        run_recipe(tiny_recipe, tmp_path / "notes.txt")
    assert [each.name for each in tmp_path.iterdir()] == ["notes.txt"]


def test_an_empty_folder_may_hold_a_run(tiny_recipe: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    assert run_recipe(tiny_recipe, tmp_path / "run", "steps=1").status == "finished"


def test_a_run_leaves_no_temporary_file(tiny_recipe: dict[str, Any], tmp_path: Path) -> None:
    run = run_recipe(tiny_recipe, tmp_path / "run", "snapshots=[2]")
    assert not list(run.path.rglob(".*"))


def test_the_model_card_says_what_was_done(tiny_recipe: dict[str, Any], tmp_path: Path) -> None:
    card = (run_recipe(tiny_recipe, tmp_path / "run", "noise_std=0.25").path / "README.md").read_text()
    for each in (
        "RMU",
        "noise_std 0.25 (variance 0.0625)",
        "spells",
        "`mlp.down_proj` of layers 1, 2, 3",
        "@",
    ):
        assert each in card
    assert "no RNA" in (run_recipe(tiny_recipe, tmp_path / "plain").path / "README.md").read_text()


# --- failing


def _blow_up_at(step: int) -> Report:
    """From `step` on the learning rate is so large that the next update leaves nothing finite."""

    def report(candidate: Candidate, row: dict[str, Any]) -> None:
        if row["step"] == step:
            candidate.optimiser.param_groups[0]["lr"] = 1e30

    return report


def test_a_loss_that_is_not_finite_ends_the_run_as_failed(tiny_recipe: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"step 7, topic spells: the loss is not finite.*learning_rate"):
        run_recipe(tiny_recipe, tmp_path / "run", report=_blow_up_at(5))
    run = open_run(tmp_path / "run")
    assert run.status == "failed"
    assert "step 7" in run.record["error"]
    assert [row["step"] for row in run.rows()] == [1, 2, 3, 4, 5, 6]
    assert not (run.path / "delta.safetensors").exists()


def test_the_checkpoint_before_a_loss_that_is_not_finite_is_kept(tiny_recipe: dict[str, Any], tmp_path: Path) -> None:
    kept: list[bytes] = []
    blow_up = _blow_up_at(5)

    def report(candidate: Candidate, row: dict[str, Any]) -> None:
        if row["step"] == 5:
            kept.append(candidate.run.checkpoint.read_bytes())  # of step 4
        blow_up(candidate, row)

    overrides = ["checkpoint_every=4", "noise_std=0.2"]
    with pytest.raises(UserError, match="not finite"):
        run_recipe(tiny_recipe, tmp_path / "run", *overrides, report=report)
    assert open_run(tmp_path / "run").checkpoint.read_bytes() == kept[0]
    resumed = run_recipe(tiny_recipe, tmp_path / "run", *overrides, resume=True)
    whole = run_recipe(tiny_recipe, tmp_path / "whole", *overrides)
    assert same(tensors_of(resumed), tensors_of(whole))
    assert rows_of(resumed) == rows_of(whole)
    assert "error" not in resumed.record


@pytest.mark.unit
def test_a_failure_leaves_the_weights_of_the_last_step(tiny_recipe: dict[str, Any], tmp_path: Path) -> None:
    trainer = trainer_of(tiny_recipe, tmp_path / "run")
    (candidate,) = trainer.candidates
    candidate.forget.steering["spells"].scale = float("inf")
    before = [master.detach().clone() for master in candidate.masters.values()]
    with pytest.raises(UserError, match="steering_scale"):
        take_step(candidate, trainer.batches(0))
    assert candidate.step == 0
    assert all(map(torch.equal, candidate.masters.values(), before))


# --- topics


def test_two_topics_take_turns_with_steering_of_their_own(
    tiny_recipe: dict[str, Any], texts: dict[str, Path], tmp_path: Path
) -> None:
    run = run_recipe(two_topics(tiny_recipe, texts), tmp_path / "run", "topics.potions.steering_scale=9")
    assert [row["topic"] for row in run.rows()] == ["spells", "potions"] * 4
    steering = load_file(run.path / "steering.safetensors")
    assert set(steering) == {"spells", "potions"}
    assert not torch.allclose(steering["spells"], steering["potions"])
    assert run.record["steering_scales"] == {"spells": 5, "potions": 9}
    fingerprints = run.record["data_fingerprints"]
    assert fingerprints["spells"]["forget"] != fingerprints["potions"]["forget"]
    assert fingerprints["spells"]["retain"] == fingerprints["potions"]["retain"]


def test_a_topics_own_norm_is_kept_from_its_own_first_batch(
    tiny_recipe: dict[str, Any], texts: dict[str, Path], tmp_path: Path
) -> None:
    recipe = {
        **two_topics(tiny_recipe, texts),
        "method": "adaptive_rmu",
        "adaptive_scale": 2,
        "coefficient": "first_batch",
    }
    trainer = trainer_of(recipe, tmp_path / "run")
    (candidate,) = trainer.candidates
    trainer.train()
    for topic in recipe["topics"]:
        batch = trainer.corpora[topic, "forget"].batch(0)
        hidden = trainer.engine.reference(trainer.engine.trunk(batch)).numpy()
        rows = [
            np.linalg.norm(row[keep == 1], axis=-1).mean() for row, keep in zip(hidden, batch.mask.numpy(), strict=True)
        ]
        assert candidate.forget.steering[topic].frozen_norm.item() == pytest.approx(np.mean(rows), rel=1e-5)


def test_a_topics_own_weights_and_lengths_are_used(
    tiny_recipe: dict[str, Any], texts: dict[str, Path], tmp_path: Path
) -> None:
    recipe = two_topics(tiny_recipe, texts)
    recipe["topics"]["potions"] |= {"retain_weight": 3, "forget_weight": 0.25, "max_tokens": 6}
    trainer = trainer_of(recipe, tmp_path / "run")
    widths = {topic: max(map(len, trainer.corpora[topic, "forget"].rows)) for topic in recipe["topics"]}
    assert widths == {"spells": 24, "potions": 6}
    trainer.train()
    for row in trainer.runs[0].rows():
        forget, retain = (0.25, 3) if row["topic"] == "potions" else (1, 10)
        assert row["loss"] == pytest.approx(forget * row["forget_loss"] + retain * row["retain_loss"], rel=1e-5)


def test_a_topic_may_bring_its_own_retain_text(
    tiny_recipe: dict[str, Any], texts: dict[str, Path], tmp_path: Path
) -> None:
    recipe = two_topics(tiny_recipe, texts)
    recipe["topics"]["potions"]["retain"] = str(texts["forget"])
    record = run_recipe(recipe, tmp_path / "run", "steps=2").record["data_fingerprints"]
    assert record["potions"]["retain"] == record["spells"]["forget"]


# --- snapshots


def test_snapshots_are_the_deltas_of_shorter_runs(tiny_recipe: dict[str, Any], tmp_path: Path) -> None:
    run = run_recipe(tiny_recipe, tmp_path / "run", "snapshots=[3, 5, 8]", "noise_std=0.3")
    for step in (3, 5, 8):
        shorter = run_recipe(tiny_recipe, tmp_path / str(step), f"steps={step}", "noise_std=0.3")
        snapshot = load_delta(run.snapshot(step))
        assert same(snapshot.tensors, tensors_of(shorter))
        assert snapshot.provenance["step"] == step
    assert sorted(each.name for each in (run.path / "snapshots").iterdir()) == [
        f"step-{step}.safetensors" for step in (3, 5, 8)
    ]


def test_how_often_is_logged_or_saved_changes_nothing_else(tiny_recipe: dict[str, Any], tmp_path: Path) -> None:
    often = run_recipe(tiny_recipe, tmp_path / "often", "noise_std=0.3", "checkpoint_every=1", "snapshots=[1, 2]")
    rarely = run_recipe(tiny_recipe, tmp_path / "rarely", "noise_std=0.3", "log_every=5", "checkpoint_every=100")
    assert same(tensors_of(often), tensors_of(rarely))
    assert [row["step"] for row in rarely.rows()] == [5, 8]
    assert rows_of(rarely) == [row for row in rows_of(often) if row["step"] in (5, 8)]

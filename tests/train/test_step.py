"""One training step: its losses, its noise, and the precision of its weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from training_runs import rows_of, run_recipe, same, tensors_of, trainer_of

from robust_unlearning.methods.table import METHODS
from robust_unlearning.train.step import band_weights, step_losses, take_step

# --- the losses of a step


@pytest.mark.unit
def test_an_untouched_model_has_no_retain_loss_and_no_gradient_from_it(
    tiny_recipe: dict[str, Any], tmp_path: Path
) -> None:
    trainer = trainer_of(tiny_recipe, tmp_path / "run", "forget_weight=0")
    (candidate,) = trainer.candidates
    losses = step_losses(candidate, trainer.batches(0))
    assert losses.retain.loss.item() == 0
    assert losses.total.item() == 0
    losses.total.backward()
    assert all(torch.count_nonzero(master.grad) == 0 for master in candidate.masters.values())


@pytest.mark.unit
def test_noise_gives_an_untouched_model_a_retain_loss_of_its_variance(
    tiny_recipe: dict[str, Any], tmp_path: Path
) -> None:
    trainer = trainer_of(tiny_recipe, tmp_path / "run", "noise_std=0.5")
    (candidate,) = trainer.candidates
    losses = [step_losses(candidate, trainer.batches(step)).retain.loss.item() for step in range(20)]
    assert np.mean(losses) == pytest.approx(0.25, rel=0.03)
    assert len(set(losses)) == 20


@pytest.mark.unit
def test_the_forget_batch_is_never_noised(tiny_recipe: dict[str, Any], tmp_path: Path) -> None:
    for method in METHODS:
        recipe = {**tiny_recipe, "method": method, "adaptive_scale": 2}
        plain, noised = (trainer_of(recipe, tmp_path / f"{method}{std}", f"noise_std={std}") for std in (0, 0.5))
        first, second = (step_losses(each.candidates[0], each.batches(0)) for each in (plain, noised))
        assert torch.equal(first.forget.loss, second.forget.loss)


@pytest.mark.unit
def test_losses_and_their_weights_are_those_of_the_formula(tiny_recipe: dict[str, Any], tmp_path: Path) -> None:
    trainer = trainer_of(tiny_recipe, tmp_path / "run", "forget_weight=0.5", "retain_weight=7", "noise_std=0.2")
    (candidate,) = trainer.candidates
    topic, forget, _, _ = batch = trainer.batches(0)
    losses = step_losses(candidate, batch)
    hidden = trainer.engine.reference(trainer.engine.trunk(forget.batch)).numpy()
    mask = forget.batch.mask.numpy()
    distance = ((hidden - 5 * candidate.forget.steering[topic].direction.numpy()) ** 2).mean(axis=-1)
    assert losses.forget.loss.item() == pytest.approx((distance * mask).sum() / mask.sum(), rel=1e-5)
    expected = 0.5 * losses.forget.loss.item() + 7 * losses.retain.loss.item()
    assert losses.total.item() == pytest.approx(expected, rel=1e-6)


def test_a_scale_in_hidden_norms_is_turned_into_an_absolute_one(tiny_recipe: dict[str, Any], tmp_path: Path) -> None:
    recipe = {**tiny_recipe, "steering_scale": 1.5, "steering_unit": "hidden_norm"}
    run = run_recipe(recipe, tmp_path / "relative", "steps=3")
    trainer = trainer_of(tiny_recipe, tmp_path / "probe")
    _, forget, _, _ = trainer.batches(0)
    norms = np.linalg.norm(trainer.engine.reference(trainer.engine.trunk(forget.batch)).numpy(), axis=-1)
    expected = 1.5 * norms[forget.batch.mask.numpy() == 1].mean()
    assert run.record["steering_scales"]["spells"] == pytest.approx(expected, rel=1e-5)
    absolute = run_recipe(
        {**tiny_recipe, "steering_scale": run.record["steering_scales"]["spells"]}, tmp_path / "a", "steps=3"
    )
    assert same(tensors_of(run), tensors_of(absolute))


# --- noise


@pytest.mark.parametrize("noise", ["noise_std=0", "noise_variance=0"])
def test_no_noise_is_the_method_itself_to_the_bit(noise: str, tiny_recipe: dict[str, Any], tmp_path: Path) -> None:
    plain = run_recipe(tiny_recipe, tmp_path / "plain")
    silent = run_recipe(tiny_recipe, tmp_path / "silent", noise, "noise_seed=5", "noise_layers=[1, 3]")
    assert same(tensors_of(plain), tensors_of(silent))
    assert rows_of(plain) == rows_of(silent)


def test_std_and_its_square_as_variance_are_the_same_run(tiny_recipe: dict[str, Any], tmp_path: Path) -> None:
    std = run_recipe(tiny_recipe, tmp_path / "std", "noise_std=0.5")
    variance = run_recipe(tiny_recipe, tmp_path / "variance", "noise_variance=0.25")
    assert same(tensors_of(std), tensors_of(variance))
    for run in (std, variance):
        assert (run.record["noise_std"], run.record["noise_variance"]) == (0.5, 0.25)


def test_scale_seed_layers_and_site_of_the_noise_all_count(tiny_recipe: dict[str, Any], tmp_path: Path) -> None:
    variants = [
        [],
        ["noise_std=0.3"],
        ["noise_seed=1"],
        ["noise_layers=[2]"],
        ["noise_layers=[2, 3]"],
        ["noise_site=mlp"],
    ]
    runs = [
        run_recipe(tiny_recipe, tmp_path / str(index), "noise_std=0.2", *each) for index, each in enumerate(variants)
    ]
    for index, first in enumerate(runs):
        for second in runs[index + 1 :]:
            assert not same(tensors_of(first), tensors_of(second))


def test_the_noise_changes_neither_data_order_nor_steering(tiny_recipe: dict[str, Any], tmp_path: Path) -> None:
    runs = [run_recipe(tiny_recipe, tmp_path / std, f"noise_std={std}") for std in ("0", "0.3")]
    steering = [load_file(run.path / "steering.safetensors") for run in runs]
    assert same(*steering)
    assert [row["retain_reference_norm"] for row in runs[0].rows()] == [
        row["retain_reference_norm"] for row in runs[1].rows()
    ]


# --- precision


@pytest.mark.unit
def test_updates_too_small_for_bfloat16_add_up_in_the_masters(
    tiny_recipe: dict[str, Any], tiny_model: Path, tmp_path: Path
) -> None:
    import shutil

    from transformers import AutoModelForCausalLM

    folder = tmp_path / "half"
    AutoModelForCausalLM.from_pretrained(tiny_model).to(torch.bfloat16).save_pretrained(folder)
    for each in tiny_model.glob("tokenizer*"):
        shutil.copy(each, folder)
    trainer = trainer_of({**tiny_recipe, "model": str(folder)}, tmp_path / "run", "learning_rate=1e-4")
    (candidate,) = trainer.candidates
    base = {key: value.detach().clone() for key, value in trainer.trained.items()}
    assert {value.dtype for value in base.values()} == {torch.bfloat16}
    assert {master.dtype for master in candidate.masters.values()} == {torch.float32}
    take_step(candidate, trainer.batches(0))
    swallowed = {key: master.to(torch.bfloat16) == base[key] for key, master in candidate.masters.items()}
    for key, master in candidate.masters.items():
        assert swallowed[key].any()
        assert (master[swallowed[key]] != base[key].float()[swallowed[key]]).float().mean() > 0.9
    for step in range(1, 12):
        take_step(candidate, trainer.batches(step))
    tensors = trainer.delta(candidate).tensors
    for key, keep in swallowed.items():
        changed = tensors[trainer.keys[key]] != base[key]
        assert tensors[trainer.keys[key]].dtype == torch.bfloat16
        assert (changed & keep).any()


@pytest.mark.unit
def test_the_forward_pass_sees_the_masters_in_the_models_type(tiny_recipe: dict[str, Any], tmp_path: Path) -> None:
    trainer = trainer_of(tiny_recipe, tmp_path / "run", "dtype=bfloat16")
    (candidate,) = trainer.candidates
    weights = band_weights(candidate)
    assert {value.dtype for named in weights.values() for value in named.values()} == {torch.bfloat16}
    losses = step_losses(candidate, trainer.batches(0))
    assert losses.retain.hidden.dtype == torch.bfloat16
    assert losses.retain.loss.item() == 0

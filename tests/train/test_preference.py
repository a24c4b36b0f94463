"""Preference methods and log-probability retain losses, through trunk, band, tail and the chunked LM head."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import random_model
from safetensors.torch import load_file
from torch import Tensor, nn

from robust_unlearning import UserError, load_recipe, unlearn
from robust_unlearning.data.corpora import TokenBatch
from robust_unlearning.methods.noise import RandomNoiseAugmentation
from robust_unlearning.recipe import Recipe
from robust_unlearning.run.delta import load_delta
from robust_unlearning.run.folder import RunFolder
from robust_unlearning.train.engine import BandEngine, Weights
from robust_unlearning.train.objective import BatchForward, forget_objective, retain_term
from robust_unlearning.train.references import References, folder
from robust_unlearning.train.step import step_losses
from robust_unlearning.train.trainer import Trainer

CPU = torch.device("cpu")
METHODS = ("npo", "simnpo", "dpo")
RETAIN_KINDS = ("kl", "mse", "hidden_mse")
FIRST, LAST, NAME = 1, 3, "mlp.down_proj.weight"
LENGTHS = {"forget": (9, 5, 7), "retain": (4, 8, 6), "refusals": (3, 6, 5)}


def _batch(side: str, extra: int = 0) -> TokenBatch:
    lengths = LENGTHS[side]
    ids = torch.zeros(len(lengths), max(lengths) + extra, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        draw = torch.Generator().manual_seed(10 * len(side) + row)
        ids[row, :length] = torch.randint(4, 250, (length,), generator=draw)
        mask[row, :length] = 1
    return TokenBatch(ids, mask)


def _recipe(plain: dict[str, Any], method: str, **fields: Any) -> Recipe:
    return load_recipe({**plain, "method": method, "temperature": 0.5, **fields})


@pytest.fixture(scope="module")
def exact() -> BandEngine:
    """A whole model in float64."""
    return BandEngine(random_model("llama").double().requires_grad_(False), FIRST, LAST, tail=True)


@pytest.fixture(scope="module")
def smooth() -> BandEngine:
    """A model that is float64 throughout: Llama's norms are float32 in any model."""
    return BandEngine(random_model("gpt_neox").double().requires_grad_(False), FIRST, LAST, tail=True)


def _changed(engine: BandEngine, by: float = 0.05, name: str = NAME) -> dict[int, dict[str, Tensor]]:
    """Band weights a little off the base's, trainable."""
    draw = torch.Generator().manual_seed(3)
    weights = {}
    for index, layer in engine.layers.items():
        base = layer.get_parameter(name).detach()
        noise = torch.randn(base.shape, generator=draw, dtype=base.dtype)
        weights[index] = {name: nn.Parameter(base + by * noise)}
    return weights


def _view(engine: BandEngine, side: str, extra: int = 0) -> BatchForward:
    view = BatchForward(engine, _batch(side, extra))
    view.reference_logp = view.sequence_logp(view.final).logp
    return view


def _loss(
    engine: BandEngine, recipe: Recipe, weights: Weights, extra: int = 0, rna: RandomNoiseAugmentation | None = None
) -> Tensor:
    forget, retain, refusals = (_view(engine, side, extra) for side in ("forget", "retain", "refusals"))
    pushed = forget_objective(recipe, engine.width, CPU).term(weights, "spells", forget, refusals)
    return pushed.loss + 7 * retain_term(recipe, weights, retain, rna).loss


# --- the plain way, with two whole models and all logits at once


def _plain_logp(model: nn.Module, batch: TokenBatch) -> list[Tensor]:
    """log p of each sequence, run alone and without padding."""
    found = []
    for ids, mask in zip(batch.ids, batch.mask, strict=True):
        row = ids[mask.bool()][None]
        logits = model(input_ids=row).logits[0, :-1]
        found.append(logits.log_softmax(-1)[torch.arange(len(logits)), row[0, 1:]].sum())
    return found


def _plain_loss(model: nn.Module, reference: nn.Module, recipe: Recipe) -> Tensor:
    beta, forget, refusals = recipe.temperature, _batch("forget"), _batch("refusals")
    losses = []
    rows = zip(
        *(_plain_logp(each, batch) for each in (model, reference) for batch in (forget, refusals)),
        forget.mask.sum(1) - 1,
        refusals.mask.sum(1) - 1,
        strict=True,
    )
    for own, own_idk, ref, ref_idk, length, length_idk in rows:
        if recipe.log_ratio == "sequence":
            length_idk = torch.tensor(1)
        each = length if recipe.log_ratio == "token_mean" or recipe.method == "simnpo" else torch.tensor(1)
        value = -beta * (own if recipe.method == "simnpo" else own - ref) / each
        if recipe.method == "dpo":
            value = value + beta * (own_idk - ref_idk) / length_idk
        losses.append(2 / beta * torch.log1p(torch.exp(-value)))
    kept = []
    retain = _batch("retain")
    for ids, mask in zip(retain.ids, retain.mask, strict=True):
        row = ids[mask.bool()][None]
        out, ref_out = (each(input_ids=row, output_hidden_states=True) for each in (model, reference))
        if recipe.retain_kind == "hidden_mse":
            kept.append((out.hidden_states[LAST + 1] - ref_out.hidden_states[LAST + 1]).square().mean(-1)[0])
            continue
        logp, ref_logp = (each.logits[0, :-1].log_softmax(-1) for each in (out, ref_out))
        if recipe.retain_kind == "kl":
            kept.append((ref_logp.exp() * (ref_logp - logp)).sum(-1))
        else:
            kept.append((logp - ref_logp).square().mean(-1))
    return torch.stack(losses).mean() + 7 * torch.cat(kept).mean()


@pytest.mark.unit
@pytest.mark.parametrize("retain_kind", RETAIN_KINDS)
@pytest.mark.parametrize(("method", "log_ratio"), [*((each, "sequence") for each in METHODS), ("dpo", "token_mean")])
def test_loss_and_gradients_are_those_of_two_whole_models(
    method: str, log_ratio: str, retain_kind: str, tiny_recipe: dict[str, Any], exact: BandEngine
) -> None:
    recipe = _recipe(tiny_recipe, method, retain_loss=retain_kind, log_ratio=log_ratio)
    weights = _changed(exact)
    loss = _loss(exact, recipe, weights)
    loss.backward()

    trained, reference = random_model("llama").double(), random_model("llama").double()
    own = {index: trained.model.layers[index].get_parameter(NAME) for index in weights}
    for index, value in own.items():
        value.data.copy_(weights[index][NAME])
    expected = _plain_loss(trained, reference.requires_grad_(False), recipe)
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-9)
    for index, value in own.items():
        np.testing.assert_allclose(weights[index][NAME].grad, value.grad, rtol=1e-6, atol=1e-9)


@pytest.mark.unit
@pytest.mark.parametrize("retain_kind", ["kl", "mse"])
@pytest.mark.parametrize("method", METHODS)
def test_gradients_are_finite_differences_through_trunk_band_and_tail(
    method: str, retain_kind: str, tiny_recipe: dict[str, Any], smooth: BandEngine
) -> None:
    recipe, name = _recipe(tiny_recipe, method, retain_loss=retain_kind), "mlp.dense_4h_to_h.weight"
    weights = _changed(smooth, name=name)
    _loss(smooth, recipe, weights).backward()
    draw, step = torch.Generator().manual_seed(0), 1e-5
    for index in weights:
        value = weights[index][name]
        direction = torch.randn(value.shape, generator=draw, dtype=torch.float64)
        around = []
        for sign in (1, -1):
            moved = {**weights, index: {name: value.detach() + sign * step * direction}}
            around.append(_loss(smooth, recipe, moved).item())
        assert value.grad is not None
        slope = (value.grad * direction).sum().item()
        assert (around[0] - around[1]) / (2 * step) == pytest.approx(slope, rel=1e-5, abs=1e-7)


@pytest.mark.unit
def test_frozen_weights_get_no_gradient(tiny_recipe: dict[str, Any], tiny_model: Path) -> None:
    engine = BandEngine(random_model("llama").requires_grad_(False), FIRST, LAST, tail=True)
    _loss(engine, _recipe(tiny_recipe, "dpo"), _changed(engine)).backward()
    assert all(each.grad is None for each in engine.model.parameters())


@pytest.mark.unit
def test_running_the_tail_again_in_the_backward_pass_changes_nothing(
    tiny_recipe: dict[str, Any], exact: BandEngine
) -> None:
    found = []
    for recompute in (False, True):
        weights = _changed(exact)
        _loss(exact, _recipe(tiny_recipe, "dpo", recompute_tail=recompute), weights).backward()
        found.append([each[NAME].grad for each in weights.values()])
    assert all(torch.equal(first, second) for first, second in zip(*found, strict=True))


@pytest.mark.unit
@pytest.mark.parametrize("method", METHODS)
def test_more_padding_changes_neither_loss_nor_gradient(
    method: str, tiny_recipe: dict[str, Any], exact: BandEngine
) -> None:
    recipe, found = _recipe(tiny_recipe, method), []
    for extra in (0, 6):
        weights = _changed(exact)
        loss = _loss(exact, recipe, weights, extra)
        loss.backward()
        found.append((loss.item(), weights[LAST][NAME].grad))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-12)
    np.testing.assert_allclose(found[0][1], found[1][1], rtol=1e-8, atol=1e-12)


# --- RNA on what the LM head reads


@pytest.mark.unit
@pytest.mark.parametrize("retain_kind", RETAIN_KINDS)
def test_noise_of_0_is_no_noise_to_the_bit(retain_kind: str, tiny_recipe: dict[str, Any], exact: BandEngine) -> None:
    recipe, weights = _recipe(tiny_recipe, "npo", retain_loss=retain_kind), _changed(exact)
    none, zero = None, RandomNoiseAugmentation([LAST, 5], 0.0)
    assert torch.equal(_loss(exact, recipe, weights, rna=none), _loss(exact, recipe, weights, rna=zero))


@pytest.mark.unit
@pytest.mark.parametrize("layers", [(0 + FIRST,), (LAST,), (LAST + 1,), (FIRST, LAST, 5)], ids=str)
def test_noise_at_any_layers_is_that_of_the_whole_model(layers: tuple[int, ...], exact: BandEngine) -> None:
    view = BatchForward(exact, _batch("retain"))
    found = exact.head(view.noised_final(RandomNoiseAugmentation(layers, 0.3, seed=4)))
    with RandomNoiseAugmentation(layers, 0.3, seed=4).attach(exact.model), torch.no_grad():
        expected = exact.model(input_ids=view.batch.ids, attention_mask=view.batch.mask).logits
    np.testing.assert_allclose(found[view.mask.bool()], expected[view.mask.bool()], rtol=1e-9, atol=1e-11)


@pytest.mark.unit
def test_the_noise_is_drawn_anew_each_time_and_only_for_retain_text(
    tiny_recipe: dict[str, Any], exact: BandEngine
) -> None:
    recipe, weights, rna = _recipe(tiny_recipe, "npo"), _changed(exact), RandomNoiseAugmentation([LAST], 0.3)
    retain, forget = _view(exact, "retain"), _view(exact, "forget")
    losses = [retain_term(recipe, weights, retain, rna).loss.item() for _ in range(3)]
    assert len(set(losses)) == 3
    objective = forget_objective(recipe, exact.width, CPU)
    assert len({objective.term(weights, "spells", forget, None).loss.item() for _ in range(3)}) == 1


# --- whole runs


STEPWISE = ["log_every=1", "checkpoint_every=3"]


def _preference(plain: dict[str, Any], method: str, **fields: Any) -> dict[str, Any]:
    left = {key: value for key, value in plain.items() if key != "steering_scale"}
    return {**left, "method": method, "retain_weight": 1, **fields}


def _run(recipe: Mapping[str, Any], out: Path, *overrides: str, **how: Any) -> RunFolder:
    return unlearn(load_recipe(dict(recipe), [*STEPWISE, *overrides]), out, **how)


def _tensors(run: RunFolder) -> dict[str, Tensor]:
    return load_delta(run.path).tensors


@pytest.mark.parametrize("method", METHODS)
def test_a_run_makes_forget_text_unlikely(method: str, tiny_recipe: dict[str, Any], tmp_path: Path) -> None:
    run = _run(_preference(tiny_recipe, method), tmp_path / "run", "steps=30", "temperature=0.5", "noise_std=0.01")
    rows = run.rows()
    for measure, sign in (("forget_nats", 1), ("forget_loss", -1)):  # the same 20 documents each 10 steps
        first, last = (np.mean([row[measure] for row in part]) for part in (rows[:10], rows[20:]))
        assert sign * (last - first) > 0
    assert ("refusal_nats" in rows[0]) == (method == "dpo")
    assert run.record["documents"]["spells"] == {
        "forget": 20, "retain": 20, **({"refusals": 100} if method == "dpo" else {})
    }  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
def test_a_resumed_run_is_an_uninterrupted_one(method: str, tiny_recipe: dict[str, Any], tmp_path: Path) -> None:
    def stop(_candidate: Any, row: dict[str, Any]) -> None:
        if row["step"] == 5:
            raise KeyboardInterrupt

    recipe = _preference(tiny_recipe, method, noise_std=0.2)
    whole = _run(recipe, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        _run(recipe, tmp_path / "cut", report=stop)
    resumed = _run(recipe, tmp_path / "cut", resume=True)
    first, second = _tensors(whole), _tensors(resumed)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_refusals_are_drawn_from_the_users_file_with_the_seed(tiny_recipe: dict[str, Any], tmp_path: Path) -> None:
    own = tmp_path / "idontknow.jsonl"
    own.write_text("".join(f"hihi kaba {word}\n" for word in ("dudu", "feba", "groba", "badu")), encoding="utf-8")
    runs = {
        name: _run(_preference(tiny_recipe, "dpo"), tmp_path / name, *overrides)
        for name, overrides in {
            "shipped": [],
            "own": [f"refusals={own}"],
            "other seed": [f"refusals={own}", "seed=1"],
        }.items()
    }
    assert runs["own"].record["documents"]["spells"]["refusals"] == 4
    firsts = {run.rows()[0]["refusal_nats"] for run in runs.values()}
    assert len(firsts) == 3


@pytest.mark.unit
def test_dpo_moves_with_the_likelihood_of_the_refusal(tiny_recipe: dict[str, Any], exact: BandEngine) -> None:
    recipe, weights = _recipe(tiny_recipe, "dpo"), _changed(exact)
    forget, refusals = _view(exact, "forget"), _view(exact, "refusals")
    objective = forget_objective(recipe, exact.width, CPU)
    plain = objective.term(weights, "spells", forget, refusals).loss.item()
    assert refusals.reference_logp is not None
    likelier = BatchForward(exact, refusals.batch, refusals.reference_logp - 1)  # by one nat than the reference thought
    assert objective.term(weights, "spells", forget, likelier).loss.item() < plain


def _counting(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """How many sequences have been scored since this was last asked."""
    scored: list[int] = []
    prepare = References.prepare

    def note(self: References, rows: Iterable[int]) -> int:
        before = int(self.logp.isnan().sum())
        blocks = prepare(self, rows)
        scored.append(before - int(self.logp.isnan().sum()))
        return blocks

    def since() -> int:
        total = sum(scored)
        scored.clear()
        return total

    monkeypatch.setattr(References, "prepare", note)
    return since


def test_reference_values_are_kept_and_read_by_every_later_run(
    tiny_recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ROBUST_UNLEARNING_CACHE", str(tmp_path / "cache"))
    scored = _counting(monkeypatch)
    recipe = _preference(tiny_recipe, "npo")
    first = _run(recipe, tmp_path / "first")
    assert scored() == 20  # all blocks that the 16 sequences of 8 steps are in
    (path,) = folder().glob("*.safetensors")
    kept = load_file(path)["logp"]
    again = _run(recipe, tmp_path / "again", "temperature=2", "learning_rate=1e-3", "noise_std=0.1")
    assert scored() == 0
    assert torch.equal(load_file(path)["logp"], kept)
    path.unlink()
    anew = _run(recipe, tmp_path / "anew")
    assert scored() == 20
    assert all(torch.equal(value, _tensors(anew)[name]) for name, value in _tensors(first).items())
    assert again.status == "finished"
    _run({**recipe, "max_tokens": 12}, tmp_path / "shorter")
    assert scored() == 20
    assert len(list(folder().glob("*.safetensors"))) == 2


@pytest.mark.unit
def test_reference_values_are_the_log_probabilities_of_the_whole_model(
    tiny_recipe: dict[str, Any], tmp_path: Path
) -> None:
    trainer = Trainer([RunFolder.open(tmp_path / "run", load_recipe(_preference(tiny_recipe, "npo")))])
    _, forget, _, _ = trainer.batches(0)
    assert forget.reference_logp is not None
    expected = torch.stack(_plain_logp(random_model("llama"), forget.batch)).detach()
    np.testing.assert_allclose(forget.reference_logp, expected, rtol=1e-5)


@pytest.mark.unit
def test_an_untouched_model_has_the_losses_of_the_reference(tiny_recipe: dict[str, Any], tmp_path: Path) -> None:
    trainer = Trainer([RunFolder.open(tmp_path / "run", load_recipe(_preference(tiny_recipe, "dpo")))])
    (candidate,) = trainer.candidates
    losses = step_losses(candidate, trainer.batches(0))
    assert losses.forget.loss.item() == pytest.approx(20 * math.log(2), rel=1e-4)
    assert losses.retain.loss.item() == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("retain_kind", ["kl", "mse"])
def test_a_representation_method_may_retain_log_probabilities(
    retain_kind: str, tiny_recipe: dict[str, Any], tmp_path: Path
) -> None:
    run = _run({**tiny_recipe, "retain_loss": retain_kind}, tmp_path / "run", "noise_layers=[5]", "noise_std=0.1")
    rows = run.rows()
    assert rows[-1]["forget_loss"] < rows[0]["forget_loss"]
    assert all(row["retain_loss"] > 0 for row in rows)


def test_noise_above_the_model_is_an_error_before_training(tiny_recipe: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="noise_layers"):
        _run(_preference(tiny_recipe, "npo"), tmp_path / "run", "noise_layers=[17]", "noise_std=0.1")

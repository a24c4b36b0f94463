"""Trunk and band give the whole model's hidden states, for every family, and change nothing of the base."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FAMILIES
from torch import Tensor, nn

from robust_unlearning import RandomNoiseAugmentation, UserError
from robust_unlearning.data.corpora import TokenBatch
from robust_unlearning.methods.losses import hidden_mse
from robust_unlearning.models import checkpoint
from robust_unlearning.models.layers import decoder_layers
from robust_unlearning.train.engine import BandEngine

pytestmark = pytest.mark.unit

CPU = torch.device("cpu")
FIRST, LAST = 1, 3
LENGTHS = (12, 7, 3, 9)  # three times a sliding window of 4, and below it


def _batch(extra: int = 0, rows: tuple[int, ...] = (0, 1, 2, 3)) -> TokenBatch:
    """Sequences of random tokens, padded on the right to the longest and `extra` more."""
    width = max(LENGTHS[row] for row in rows) + extra
    ids, mask = (
        torch.zeros(len(rows), width, dtype=torch.long),
        torch.zeros(len(rows), width, dtype=torch.long),
    )
    for place, row in enumerate(rows):
        draw = torch.Generator().manual_seed(row)
        ids[place, : LENGTHS[row]] = torch.randint(4, 250, (LENGTHS[row],), generator=draw)
        mask[place, : LENGTHS[row]] = 1
    return TokenBatch(ids, mask)


def _engine(folder: Path, first: int = FIRST, last: int = LAST, dtype: str = "float32") -> BandEngine:
    base = checkpoint.resolve(str(folder))
    return BandEngine(checkpoint.load_truncated(base, last + 1, dtype, CPU), first, last)


@torch.no_grad()
def _whole_model_output(folder: Path, batch: TokenBatch, layer: int, dtype: torch.dtype) -> Tensor:
    """What the layer gives inside the model as transformers loads and runs it."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    seen: list[Any] = []
    decoder_layers(model)[1][layer].register_forward_hook(lambda _module, _args, output: seen.append(output))
    model(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False)
    return seen[0][0] if isinstance(seen[0], tuple) else seen[0]


def _candidate(engine: BandEngine, layers: tuple[int, ...] = (1, 2, 3)) -> dict[int, dict[str, Tensor]]:
    """Trainable copies of one tensor of some layers, the second matrix of the feed-forward block."""
    weights = {}
    for index in layers:
        names = [name for name, value in engine.layers[index].named_parameters() if "mlp" in name and value.ndim == 2]
        value = engine.layers[index].get_parameter(names[-1])
        weights[index] = {names[-1]: nn.Parameter(value.detach().clone() * 1.25)}
    return weights


@pytest.fixture(scope="module")
def engine(tiny_model: Path) -> BandEngine:
    return _engine(tiny_model)


# --- the same as the whole model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_states_are_the_whole_models_to_the_bit(
    family: str, dtype: torch.dtype, family_folder: Callable[[str], Path]
) -> None:
    folder, batch = family_folder(family), _batch()
    expected = _whole_model_output(folder, batch, LAST, dtype)
    engine = _engine(folder, dtype=str(dtype).removeprefix("torch."))
    trunk = engine.trunk(batch)
    hidden = engine.reference(trunk)
    tokens = batch.mask.bool()
    assert hidden.dtype == dtype
    assert torch.equal(trunk.mask, batch.mask)
    assert torch.equal(hidden[tokens], expected[tokens])
    assert torch.equal(engine.band(trunk, {})[tokens], expected[tokens])


@pytest.mark.parametrize("family", FAMILIES)
def test_what_enters_the_band_is_the_output_of_the_layer_below(
    family: str, family_folder: Callable[[str], Path]
) -> None:
    folder, batch = family_folder(family), _batch()
    expected = _whole_model_output(folder, batch, FIRST - 1, torch.float32)
    tokens = batch.mask.bool()
    assert torch.equal(_engine(folder).trunk(batch).hidden[tokens], expected[tokens])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_candidates_weights_give_what_the_model_gives_with_them(
    family: str, family_folder: Callable[[str], Path]
) -> None:
    engine, batch = _engine(family_folder(family)), _batch()
    weights = _candidate(engine)
    with torch.no_grad():
        hidden = engine.band(engine.trunk(batch), weights)
        for index, named in weights.items():
            for name, value in named.items():
                engine.layers[index].get_parameter(name).copy_(value)
    expected = engine.reference(engine.trunk(batch))
    tokens = batch.mask.bool()
    assert torch.equal(hidden[tokens], expected[tokens])


@pytest.mark.parametrize(("first", "last"), [(0, 0), (0, 3), (3, 3), (5, 5), (2, 5)])
def test_the_band_may_lie_anywhere(first: int, last: int, tiny_model: Path) -> None:
    batch = _batch()
    expected = _whole_model_output(tiny_model, batch, last, torch.float32)
    engine = _engine(tiny_model, first, last)
    assert torch.equal(engine.reference(engine.trunk(batch)), expected)


def test_a_whole_model_serves_as_well_as_a_truncated_one(engine: BandEngine, tiny_model: Path) -> None:
    whole = checkpoint.load_causal_lm(checkpoint.resolve(str(tiny_model)), "auto", CPU)
    other = BandEngine(whole, FIRST, LAST)
    batch = _batch()
    assert torch.equal(other.reference(other.trunk(batch)), engine.reference(engine.trunk(batch)))


def test_one_trunk_serves_many_calls_of_the_band(engine: BandEngine) -> None:
    batch, weights = _batch(), _candidate(engine)
    trunk = engine.trunk(batch)
    first = [
        engine.reference(trunk),
        engine.band(trunk, weights),
        engine.reference(trunk),
        engine.band(trunk, weights),
    ]
    assert torch.equal(first[0], first[2])
    assert torch.equal(first[1], first[3])
    assert not torch.equal(first[0], first[1])


def test_the_engine_knows_width_and_device(engine: BandEngine) -> None:
    assert engine.width == 32
    assert engine.device == CPU
    assert list(engine.layers) == [1, 2, 3]


@pytest.mark.parametrize(("first", "last", "wrong"), [(1, 6, "6"), (-1, 3, "-1"), (7, 9, "7, 9")])
def test_a_layer_the_model_lacks_is_an_error(first: int, last: int, wrong: str, tiny_model: Path) -> None:
    model = checkpoint.load_causal_lm(checkpoint.resolve(str(tiny_model)), "auto", CPU)
    with pytest.raises(UserError, match=f"layers 0 to 5; given {wrong}"):
        BandEngine(model, first, last)


def test_layers_that_give_something_else_when_called_on_their_own_are_refused(tiny_model: Path) -> None:
    model = checkpoint.load_truncated(checkpoint.resolve(str(tiny_model)), 4, "auto", CPU)
    layer = decoder_layers(model)[1][2]
    calls = {"count": 0}

    def drift(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
        calls["count"] += 1
        return output + calls["count"]

    layer.register_forward_hook(drift)
    with pytest.raises(UserError, match="another result than the whole model"):
        BandEngine(model, FIRST, LAST)


# --- gradients and what is left unchanged


def test_gradients_reach_the_given_weights_and_nothing_else(engine: BandEngine) -> None:
    weights = _candidate(engine, (2, 3))
    trunk = engine.trunk(_batch())
    loss = hidden_mse(engine.band(trunk, weights), torch.zeros(32), trunk.mask)
    loss.backward()
    for named in weights.values():
        for value in named.values():
            assert value.grad is not None
            assert torch.count_nonzero(value.grad) > 0
    assert all(each.grad is None and not each.requires_grad for each in engine.model.parameters())
    assert not trunk.hidden.requires_grad


def test_gradients_are_those_of_the_whole_model(engine: BandEngine, tiny_model: Path) -> None:
    weights, batch = _candidate(engine), _batch()
    trunk = engine.trunk(batch)
    hidden_mse(engine.band(trunk, weights), torch.zeros(32), trunk.mask).backward()

    model = checkpoint.load_causal_lm(checkpoint.resolve(str(tiny_model)), "auto", CPU)
    found = decoder_layers(model)[1]
    own = {}
    for index, named in weights.items():
        for name, value in named.items():
            parameter = found[index].get_parameter(name)
            with torch.no_grad():
                parameter.copy_(value)
            own[index, name] = parameter.requires_grad_()
    seen: list[Tensor] = []
    found[LAST].register_forward_hook(lambda _module, _args, output: seen.append(output))
    model(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False)
    hidden_mse(seen[0], torch.zeros(32), batch.mask).backward()
    for (index, name), parameter in own.items():
        torch.testing.assert_close(weights[index][name].grad, parameter.grad, rtol=1e-4, atol=1e-6)


def test_the_reference_has_no_gradient_even_for_trainable_base_weights(engine: BandEngine) -> None:
    assert not engine.reference(engine.trunk(_batch())).requires_grad


def test_the_models_own_layers_are_back_after_a_trunk_run(engine: BandEngine) -> None:
    places = decoder_layers(engine.model)[1]
    before = list(places)
    engine.trunk(_batch())
    assert all(now is then for now, then in zip(places, before, strict=True))


def test_the_models_own_layers_are_back_after_an_exception(tiny_model: Path) -> None:
    engine = _engine(tiny_model)
    places = decoder_layers(engine.model)[1]
    before, batch = list(places), _batch()
    expected = engine.reference(engine.trunk(batch))
    wrong = TokenBatch(batch.ids + 10_000, batch.mask)  # no such tokens
    with pytest.raises(IndexError):
        engine.trunk(wrong)
    assert all(now is then for now, then in zip(places, before, strict=True))
    assert torch.equal(engine.reference(engine.trunk(batch)), expected)


def test_the_models_own_layers_are_back_after_an_exception_inside_the_trunk(tiny_model: Path) -> None:
    engine = _engine(tiny_model)
    places = decoder_layers(engine.model)[1]
    before = list(places)

    def fail(*_: Any) -> None:
        raise KeyboardInterrupt

    handle = places[0].register_forward_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        engine.trunk(_batch())
    handle.remove()
    assert all(now is then for now, then in zip(places, before, strict=True))


def test_training_leaves_the_base_as_it_was(tiny_model: Path) -> None:
    engine = _engine(tiny_model)
    before = {name: value.clone() for name, value in engine.model.state_dict().items()}
    weights = _candidate(engine)
    optimiser = torch.optim.AdamW([value for named in weights.values() for value in named.values()], lr=0.1)
    trunk = engine.trunk(_batch())
    losses = []
    for _ in range(5):
        optimiser.zero_grad()
        loss = hidden_mse(engine.band(trunk, weights), engine.reference(trunk) + 1, trunk.mask)
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert len(set(losses)) == 5
    after = engine.model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


# --- padding and batches


@pytest.mark.parametrize("family", FAMILIES)
def test_more_padding_changes_neither_hidden_states_nor_loss_nor_gradients(
    family: str, family_folder: Callable[[str], Path]
) -> None:
    engine = _engine(family_folder(family))
    target = torch.linspace(-1, 1, 32)
    results = []
    for extra in (0, 6):
        weights, trunk = _candidate(engine), engine.trunk(_batch(extra))
        hidden = engine.band(trunk, weights)
        loss = hidden_mse(hidden, target, trunk.mask)
        loss.backward()
        gradients = [value.grad for named in weights.values() for value in named.values()]
        results.append((hidden.detach()[trunk.mask.bool()], loss.detach(), *gradients))
    for short, long in zip(*results, strict=True):
        torch.testing.assert_close(long, short, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "mistral", "gpt_neox"])
def test_a_batch_is_the_token_weighted_mean_of_its_sequences(family: str, family_folder: Callable[[str], Path]) -> None:
    engine = _engine(family_folder(family))
    target = torch.linspace(-1, 1, 32)

    def loss_and_gradients(batch: TokenBatch) -> list[Tensor]:
        weights, trunk = _candidate(engine), engine.trunk(batch)
        loss = hidden_mse(engine.band(trunk, weights), target, trunk.mask)
        loss.backward()
        return [loss.detach(), *(value.grad for named in weights.values() for value in named.values())]

    together = loss_and_gradients(_batch())
    alone = [loss_and_gradients(_batch(rows=(row,))) for row in range(4)]
    for whole, *parts in zip(together, *alone, strict=True):
        mean = sum(part * length for part, length in zip(parts, LENGTHS, strict=True)) / sum(LENGTHS)
        torch.testing.assert_close(whole, mean, rtol=1e-4, atol=1e-5)


# --- noise on the reference


def test_the_reference_under_noise_on_its_last_layer_is_the_reference_plus_noise(engine: BandEngine) -> None:
    trunk = engine.trunk(_batch())
    noisy = engine.reference(trunk, RandomNoiseAugmentation([LAST], std=0.3, seed=2))
    expected = RandomNoiseAugmentation([LAST], std=0.3, seed=2).noisy(engine.reference(trunk))
    assert torch.equal(noisy, expected)


def test_noise_below_goes_through_the_layers_above_it(engine: BandEngine) -> None:
    trunk = engine.trunk(_batch())
    clean = engine.reference(trunk)
    noisy = engine.reference(trunk, RandomNoiseAugmentation([FIRST], std=0.3, seed=2))
    delta = RandomNoiseAugmentation([FIRST], std=0.3, seed=2).noisy(torch.zeros_like(clean))
    assert not torch.equal(noisy, clean)
    assert not torch.allclose(noisy - clean, delta, atol=1e-3)
    assert torch.equal(engine.reference(trunk), clean)

"""RNA: what it draws, where it adds it, and that it leaves nothing behind."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FAMILIES, random_model
from torch import Tensor, nn

from robust_unlearning import RandomNoiseAugmentation, UserError
from robust_unlearning.models.layers import decoder_layers

IDS = torch.tensor([[5, 6, 7, 8, 9, 10], [11, 12, 13, 14, 0, 0]])
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return random_model("llama")


@torch.no_grad()
def _layer_output(model: nn.Module, index: int, part: str = "") -> Tensor:
    """Output of a decoder layer, or of a part of it, seen by a hook that comes after RNA's."""
    seen: list[Any] = []
    _, found = decoder_layers(model)
    place = found[index].get_submodule(part)
    handle = place.register_forward_hook(lambda _module, _args, output: seen.append(output))
    try:
        model(input_ids=IDS, attention_mask=MASK, use_cache=False)
    finally:
        handle.remove()
    return seen[0][0] if isinstance(seen[0], tuple) else seen[0]


@torch.no_grad()
def _logits(model: nn.Module) -> Tensor:
    return model(input_ids=IDS, attention_mask=MASK, use_cache=False).logits


def _hooks(model: nn.Module) -> int:
    return sum(len(each._forward_hooks) + len(each._forward_pre_hooks) for each in model.modules())


def test_std_and_variance_are_square_root_and_square() -> None:
    by_variance = RandomNoiseAugmentation([1], variance=0.09)
    by_std = RandomNoiseAugmentation([1], std=0.3)
    assert by_variance.std == pytest.approx(0.3)
    assert by_variance.variance == 0.09
    assert by_std.std == 0.3
    assert by_std.variance == pytest.approx(0.09)
    hidden = torch.zeros(2, 3, 4)
    assert torch.equal(by_variance.noisy(hidden), by_std.noisy(hidden))


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"std": 0.1, "variance": 0.01},
        {"std": -0.1},
        {"variance": -0.1},
        {"std": math.nan},
        {"std": math.inf},
        {"variance": math.nan},
        {"variance": math.inf},
    ],
)
def test_other_scales_are_refused(given: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"std|scale"):
        RandomNoiseAugmentation([1], **given)


def test_no_layer_or_an_unknown_site_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one layer"):
        RandomNoiseAugmentation([], std=0.1)
    with pytest.raises(ValueError, match="'block' or 'mlp'"):
        RandomNoiseAugmentation([1], std=0.1, site="attention")  # type: ignore[arg-type]


@pytest.mark.parametrize("std", [0.03, 1.0, 7.5])
def test_noise_is_normal_with_mean_zero_and_the_given_scale(std: float) -> None:
    count = 400_000
    delta = RandomNoiseAugmentation([0], std=std, seed=3).noisy(torch.zeros(4, count // 40, 10)).flatten() / std
    # Five standard errors of the first four moments of N(0, 1), with a fixed seed.
    bound = 5 / math.sqrt(count)
    assert abs(delta.mean()) < bound
    assert abs(delta.square().mean() - 1) < bound * math.sqrt(2)
    assert abs(delta.pow(3).mean()) < bound * math.sqrt(15)
    assert abs(delta.pow(4).mean() - 3) < bound * math.sqrt(96)


def test_every_token_and_every_element_has_its_own_draw() -> None:
    delta = RandomNoiseAugmentation([0], std=1.0).noisy(torch.zeros(4, 50, 20))
    assert delta.unique().numel() > 0.99 * delta.numel()
    flat = delta.reshape(200, 20)
    correlation = torch.corrcoef(flat) - torch.eye(200)
    assert correlation.abs().mean() < 0.25  # 0.18 expected of independent rows of 20


def test_noise_is_added_to_the_hidden_states() -> None:
    hidden = torch.randn(2, 3, 4)
    delta = RandomNoiseAugmentation([0], std=0.5, seed=1).noisy(torch.zeros_like(hidden))
    assert torch.equal(RandomNoiseAugmentation([0], std=0.5, seed=1).noisy(hidden), hidden + delta)


def test_half_precision_states_keep_their_type() -> None:
    hidden = torch.zeros(2, 3, 4, dtype=torch.bfloat16)
    noisy = RandomNoiseAugmentation([0], std=0.5, seed=1).noisy(hidden)
    exact = RandomNoiseAugmentation([0], std=0.5, seed=1).noisy(hidden.float())
    assert noisy.dtype == torch.bfloat16
    assert torch.equal(noisy, exact.to(torch.bfloat16))


def test_each_call_draws_afresh(model: nn.Module) -> None:
    with RandomNoiseAugmentation([2], std=0.1).attach(model):
        assert not torch.equal(_logits(model), _logits(model))


def test_the_seed_repeats_the_noise(model: nn.Module) -> None:
    def twice(seed: int) -> list[Tensor]:
        with RandomNoiseAugmentation([2], std=0.1, seed=seed).attach(model):
            return [_logits(model), _logits(model)]

    first, again, other = twice(4), twice(4), twice(5)
    assert all(map(torch.equal, first, again))
    assert not torch.equal(first[0], other[0])


def test_other_random_draws_are_left_alone(model: nn.Module) -> None:
    torch.manual_seed(11)
    expected = torch.randn(5)
    torch.manual_seed(11)
    with RandomNoiseAugmentation([2], std=0.1).attach(model):
        _logits(model)
    assert torch.equal(torch.randn(5), expected)


def test_saved_state_continues_the_same_noise() -> None:
    hidden = torch.zeros(2, 3, 4)
    rna = RandomNoiseAugmentation([0], std=0.5, seed=9)
    rna.noisy(hidden)
    state = {key: value.clone() for key, value in rna.state_dict().items()}
    expected = [rna.noisy(hidden) for _ in range(3)]
    resumed = RandomNoiseAugmentation([0], std=0.5, seed=9)
    resumed.load_state_dict(state)
    assert all(map(torch.equal, [resumed.noisy(hidden) for _ in range(3)], expected))


def test_state_saved_before_the_first_draw_starts_from_the_seed() -> None:
    hidden = torch.zeros(2, 3, 4)
    resumed = RandomNoiseAugmentation([0], std=0.5, seed=9)
    resumed.load_state_dict(RandomNoiseAugmentation([0], std=0.5, seed=9).state_dict())
    assert torch.equal(resumed.noisy(hidden), RandomNoiseAugmentation([0], std=0.5, seed=9).noisy(hidden))


@pytest.mark.parametrize("given", [{"std": 0.0}, {"variance": 0.0}])
def test_no_noise_is_bit_for_bit_the_model_and_leaves_no_hook(given: dict[str, float], model: nn.Module) -> None:
    expected, hooks = _logits(model), _hooks(model)
    rna = RandomNoiseAugmentation([2], **given)
    with rna.attach(model):
        assert _hooks(model) == hooks
        assert torch.equal(_logits(model), expected)
    assert rna.state_dict() == {}


def test_hooks_come_off_at_the_end_and_after_an_exception(model: nn.Module) -> None:
    expected, hooks = _logits(model), _hooks(model)
    rna = RandomNoiseAugmentation([1, 3], std=0.1)
    with rna.attach(model):
        assert _hooks(model) == hooks + 2
    assert _hooks(model) == hooks

    def fail() -> None:
        with rna.attach(model):
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail()
    assert _hooks(model) == hooks
    assert torch.equal(_logits(model), expected)


@pytest.mark.parametrize("wrong", [[6], [2, 60], [-1]])
def test_a_layer_the_model_lacks_is_an_error_that_names_it_and_the_range(wrong: list[int], model: nn.Module) -> None:
    hooks = _hooks(model)
    with (
        pytest.raises(UserError, match=rf"layers 0 to 5; given {wrong[-1]}"),
        RandomNoiseAugmentation(wrong, std=0.1).attach(model),
    ):
        pass
    assert _hooks(model) == hooks


@pytest.mark.parametrize("family", FAMILIES)
def test_block_noise_reaches_the_output_of_the_chosen_layer_and_none_below(
    family: str, family_folder: Callable[[str], Path]
) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(family_folder(family)).eval()
    clean = {index: _layer_output(model, index) for index in (1, 2, 3)}
    with RandomNoiseAugmentation([2], std=0.1, seed=6).attach(model):
        assert torch.equal(_layer_output(model, 1), clean[1])
    with RandomNoiseAugmentation([2], std=0.1, seed=6).attach(model):
        noised = _layer_output(model, 2)
    expected = RandomNoiseAugmentation([2], std=0.1, seed=6).noisy(clean[2])
    assert torch.equal(noised, expected)
    with RandomNoiseAugmentation([2], std=0.1, seed=6).attach(model):
        assert not torch.equal(_layer_output(model, 3), clean[3])
    assert torch.equal(_layer_output(model, 3), clean[3])


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gemma2"])
def test_mlp_noise_is_added_before_the_residual_stream(family: str, family_folder: Callable[[str], Path]) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(family_folder(family)).eval()
    block, mlp = _layer_output(model, 2), _layer_output(model, 2, "mlp")
    with RandomNoiseAugmentation([2], std=0.1, seed=6, site="mlp").attach(model):
        noised_mlp = _layer_output(model, 2, "mlp")
    with RandomNoiseAugmentation([2], std=0.1, seed=6, site="mlp").attach(model):
        noised_block = _layer_output(model, 2)
    delta = noised_mlp - mlp
    assert torch.equal(noised_mlp, RandomNoiseAugmentation([2], std=0.1, seed=6).noisy(mlp))
    if family == "gemma2":  # it normalises what the MLP gives, so the noise arrives scaled
        assert not torch.allclose(noised_block, block)
    else:
        torch.testing.assert_close(noised_block - block, delta, rtol=1e-4, atol=1e-4)


def test_a_layer_without_a_known_mlp_names_its_parts() -> None:
    layer = nn.ModuleDict({"mixer": nn.Linear(2, 2)})
    with (
        pytest.raises(UserError, match="mixer"),
        RandomNoiseAugmentation([0], std=0.1, site="mlp").attach({0: layer}),
    ):
        pass


def test_layers_by_index_can_be_given_in_place_of_the_model(model: nn.Module) -> None:
    _, found = decoder_layers(model)
    with RandomNoiseAugmentation([2], std=0.1, seed=6).attach(model):
        expected = _logits(model)
    with RandomNoiseAugmentation([2], std=0.1, seed=6).attach({2: found[2]}):
        assert torch.equal(_logits(model), expected)


def test_gradients_pass_through_the_noise() -> None:
    hidden = torch.randn(2, 3, 4, requires_grad=True)
    RandomNoiseAugmentation([0], std=0.5).noisy(hidden).sum().backward()
    assert torch.equal(hidden.grad, torch.ones_like(hidden))


@pytest.mark.parametrize("seen_before", [False, True])
def test_the_hidden_states_that_transformers_returns_hold_the_noise(seen_before: bool, tiny_model: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    ids = torch.tensor([[5, 6, 7, 8]])
    if seen_before:  # transformers sets its collecting hooks at the first such call
        model(input_ids=ids, output_hidden_states=True)
    with RandomNoiseAugmentation(layers=[2], std=1.0).attach(model), torch.no_grad():
        noisy = model(input_ids=ids, output_hidden_states=True).hidden_states
    clean = model(input_ids=ids, output_hidden_states=True).hidden_states
    differs = [not torch.equal(a, b) for a, b in zip(clean, noisy, strict=True)]
    assert differs == [False] * 3 + [True] * (len(clean) - 3)  # the embedding's output comes first

"""Each loss against NumPy and cases done by hand, and what must not change it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from robust_unlearning.methods.losses import Direction, dpo, hidden_mse, logit_kl, logit_mse, npo, simnpo, token_logp

MASK = np.array([[1, 1, 1, 0, 0], [1, 0, 0, 0, 0], [1, 1, 1, 1, 1]])


def _states(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def _by_hand(hidden: np.ndarray, target: np.ndarray, mask: np.ndarray) -> float:
    """A loop over tokens in float64."""
    target = np.broadcast_to(target, hidden.shape).astype(np.float64)
    distances = [
        np.mean((hidden[b, t].astype(np.float64) - target[b, t]) ** 2)
        for b in range(mask.shape[0])
        for t in range(mask.shape[1])
        if mask[b, t]
    ]
    return float(np.mean(distances))


def _tensors(*arrays: np.ndarray) -> tuple[Tensor, ...]:
    return tuple(torch.from_numpy(each) for each in arrays)


@pytest.mark.parametrize("shape", [(3, 5, 8), (8,), (3, 1, 8)], ids=["a target a token", "one vector", "one a row"])
def test_value_is_the_mean_over_unmasked_tokens_and_width(shape: tuple[int, ...]) -> None:
    hidden, target = _states(0, 3, 5, 8), _states(1, *shape)
    loss = hidden_mse(*_tensors(hidden, target, MASK))
    assert loss.shape == ()
    assert loss.item() == pytest.approx(_by_hand(hidden, target, MASK), rel=1e-6)


def test_value_of_a_case_done_in_the_head() -> None:
    hidden = torch.tensor([[[1.0, 3.0], [0.0, 0.0]], [[2.0, 2.0], [9.0, 9.0]]])
    mask = torch.tensor([[1, 1], [1, 0]])
    # Squared distances to 0, means over d: 5, 0 and 4; three tokens.
    assert hidden_mse(hidden, torch.zeros(2), mask).item() == pytest.approx(3.0)


def test_tokens_weigh_the_same_whichever_row_they_are_in() -> None:
    hidden, target, mask = _tensors(_states(0, 3, 5, 8), _states(1, 3, 5, 8), MASK)
    rows = [hidden_mse(hidden[b : b + 1], target[b : b + 1], mask[b : b + 1]).item() for b in range(3)]
    weighted = np.average(rows, weights=MASK.sum(axis=1))
    assert hidden_mse(hidden, target, mask).item() == pytest.approx(weighted, rel=1e-6)
    assert weighted != pytest.approx(np.mean(rows), rel=1e-3)


def test_padding_changes_neither_value_nor_gradient() -> None:
    hidden, target, mask = _tensors(_states(0, 3, 5, 8), _states(1, 3, 5, 8), MASK)
    other = torch.where(mask.bool()[..., None], hidden, torch.full_like(hidden, 1e6))
    first, second = hidden.requires_grad_(), other.requires_grad_()
    losses = [hidden_mse(each, target, mask) for each in (first, second)]
    for loss in losses:
        loss.backward()
    assert torch.equal(*losses)
    assert torch.equal(first.grad, second.grad)
    assert torch.count_nonzero(first.grad[~mask.bool()]) == 0


def test_gradient_is_that_of_the_formula() -> None:
    hidden, target = _states(0, 3, 5, 8), _states(1, 8)
    tensor = torch.from_numpy(hidden).requires_grad_()
    hidden_mse(tensor, torch.from_numpy(target), torch.from_numpy(MASK)).backward()
    expected = 2 * (hidden - target) * MASK[..., None] / (8 * MASK.sum())
    np.testing.assert_allclose(tensor.grad.numpy(), expected, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_are_averaged_in_float32(kind: torch.dtype) -> None:
    hidden, target, mask = _tensors(_states(0, 3, 5, 8), _states(1, 3, 5, 8), MASK)
    hidden, target = hidden.to(kind), target.to(kind)
    loss = hidden_mse(hidden, target, mask)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(_by_hand(hidden.float().numpy(), target.float().numpy(), MASK), rel=1e-6)


def test_squares_beyond_float16_do_not_overflow() -> None:
    hidden = torch.full((1, 2, 4), 1000.0, dtype=torch.float16)
    assert hidden_mse(hidden, torch.zeros(4), torch.ones(1, 2)).item() == pytest.approx(1e6)


@pytest.mark.parametrize("kind", [torch.bool, torch.int64, torch.float32])
def test_mask_may_be_of_any_type(kind: torch.dtype) -> None:
    hidden, target, mask = _tensors(_states(0, 3, 5, 8), _states(1, 3, 5, 8), MASK)
    assert torch.equal(hidden_mse(hidden, target, mask.to(kind)), hidden_mse(hidden, target, mask))


def test_a_target_reached_costs_exactly_nothing() -> None:
    hidden, mask = _tensors(_states(0, 3, 5, 8), MASK)
    assert hidden_mse(hidden, hidden.clone(), mask).item() == 0


def test_a_mask_without_tokens_is_an_error() -> None:
    with pytest.raises(ValueError, match="no token"):
        hidden_mse(torch.zeros(1, 3, 2), torch.zeros(2), torch.zeros(1, 3))


@pytest.mark.parametrize("shape", [(3,), (3, 4), (3, 5, 1)])
def test_a_mask_of_another_shape_is_an_error(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="mask has shape"):
        hidden_mse(torch.zeros(3, 5, 8), torch.zeros(8), torch.ones(shape))


def test_what_stands_at_padding_never_matters_not_even_nan() -> None:
    hidden = torch.ones(1, 3, 2)
    hidden[0, 2] = float("nan")
    assert hidden_mse(hidden, torch.zeros(2), torch.tensor([[1, 1, 0]])).item() == 1.0


# --- log-probabilities of sequences

LOGP, REF = np.array([-12.0, -30.5, -7.25]), np.array([-10.0, -31.0, -7.25])
OWN_IDK, REF_IDK = np.array([-4.0, -9.0, -6.0]), np.array([-5.0, -9.5, -6.0])
LENGTHS = np.array([10, 20, 5])


def _log_sigmoid(value: np.ndarray) -> np.ndarray:
    return -np.log1p(np.exp(-value))


@pytest.mark.parametrize("beta", [0.05, 0.1, 1.0, 3.0])
def test_npo_is_the_formula(beta: float) -> None:
    expected = np.mean(-2 / beta * _log_sigmoid(-beta * (LOGP - REF)))
    assert npo(*_tensors(LOGP, REF), beta).item() == pytest.approx(expected, rel=1e-12)


def test_npo_at_the_reference_is_two_log_two_over_beta() -> None:
    assert npo(*_tensors(REF, REF), 0.1).item() == pytest.approx(20 * np.log(2))


def test_npo_with_a_vanishing_temperature_has_the_gradient_of_gradient_ascent() -> None:
    (reference,) = _tensors(REF)
    gradients = {}
    for beta in (1.0, 1e-1, 1e-3, 1e-6):
        logp = torch.from_numpy(LOGP).requires_grad_()
        npo(logp, reference, beta).backward()
        assert logp.grad is not None
        gradients[beta] = (logp.grad - 1 / 3).abs().max().item()  # ascent: d mean(logp) = 1/3 each
    assert list(gradients.values()) == sorted(gradients.values(), reverse=True)
    assert gradients[1e-6] < 1e-6


def test_npo_pushes_less_the_less_likely_the_text_has_become() -> None:
    logp = torch.tensor([-10.0, -20.0, -40.0], dtype=torch.float64, requires_grad=True)
    npo(logp, torch.full((3,), -10.0, dtype=torch.float64), 0.1).backward()
    assert logp.grad is not None
    # 2σ(β log ratio) / 3 each: at the reference half of the largest push
    np.testing.assert_allclose(logp.grad.numpy(), 2 / 3 / (1 + np.exp([0, 1, 3])), rtol=1e-12)


@pytest.mark.parametrize(("beta", "gamma"), [(0.1, 0.0), (2.5, 0.0), (0.1, 0.7)])
def test_simnpo_is_the_formula(beta: float, gamma: float) -> None:
    expected = np.mean(-2 / beta * _log_sigmoid(-beta / LENGTHS * LOGP - gamma))
    assert simnpo(*_tensors(LOGP, LENGTHS), beta, gamma).item() == pytest.approx(expected, rel=1e-12)


def test_simnpo_at_equal_lengths_is_npo_against_a_certain_reference_with_the_temperature_divided() -> None:
    logp, length = _tensors(LOGP, np.array([10, 10, 10]))
    expected = npo(logp, torch.zeros(3, dtype=torch.float64), 0.4 / 10).item() / 10
    assert simnpo(logp, length, 0.4, 0.0).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("beta", [0.1, 2.0])
def test_dpo_is_the_formula(beta: float) -> None:
    expected = np.mean(-2 / beta * _log_sigmoid(beta * (OWN_IDK - REF_IDK) - beta * (LOGP - REF)))
    assert dpo(*_tensors(OWN_IDK, REF_IDK, LOGP, REF), beta).item() == pytest.approx(expected, rel=1e-12)


def test_npo_is_dpo_without_its_preferred_term() -> None:
    logp, reference, refusals = _tensors(LOGP, REF, REF_IDK)
    assert npo(logp, reference, 0.1) == dpo(refusals, refusals, logp, reference, 0.1)


def test_dpo_falls_as_refusals_become_likelier_and_as_forget_text_becomes_unlikelier() -> None:
    refusals, logp = (torch.from_numpy(each).requires_grad_() for each in (OWN_IDK, LOGP))
    dpo(refusals, torch.from_numpy(REF_IDK), logp, torch.from_numpy(REF), 0.1).backward()
    assert refusals.grad is not None
    assert logp.grad is not None
    assert (refusals.grad < 0).all()
    assert torch.equal(refusals.grad, -logp.grad)


# --- distributions over the vocabulary


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    logits = logits.astype(np.float64)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def test_token_logp_is_the_log_softmax_at_the_token() -> None:
    logits, targets = _states(0, 3, 5, 11), np.random.default_rng(1).integers(0, 11, (3, 5))
    expected = np.take_along_axis(_log_softmax(logits), targets[..., None], -1)[..., 0]
    np.testing.assert_allclose(token_logp(*_tensors(logits, targets)).numpy(), expected, rtol=1e-5)


@pytest.mark.parametrize("direction", ["reference_to_model", "model_to_reference"])
def test_kl_is_the_formula_in_its_direction(direction: Direction) -> None:
    own, reference = _states(0, 3, 5, 11), _states(1, 3, 5, 11)
    first, second = _log_softmax(reference), _log_softmax(own)
    if direction == "model_to_reference":
        first, second = second, first
    by_token = (np.exp(first) * (first - second)).sum(axis=-1)
    loss = logit_kl(*_tensors(own, reference, MASK), direction=direction)
    assert loss.item() == pytest.approx(by_token[MASK == 1].mean(), rel=1e-5)


@pytest.mark.parametrize("direction", ["reference_to_model", "model_to_reference"])
def test_kl_is_at_least_0_and_0_with_no_gradient_at_the_reference(direction: Direction) -> None:
    for seed in range(20):
        own, reference = _states(seed, 3, 5, 11), _states(seed + 100, 3, 5, 11)
        assert logit_kl(*_tensors(own, reference, MASK), direction=direction).item() >= 0
    own, mask = _tensors(_states(0, 3, 5, 11), MASK)
    own.requires_grad_()
    loss = logit_kl(own, own.detach(), mask, direction)
    loss.backward()
    assert loss.item() == 0
    assert own.grad is not None
    assert own.grad.abs().max() < 1e-7


def test_logit_mse_is_the_mean_over_tokens_and_vocabulary() -> None:
    own, reference = _states(0, 3, 5, 11), _states(1, 3, 5, 11)
    squares = (_log_softmax(own) - _log_softmax(reference)) ** 2
    assert logit_mse(*_tensors(own, reference, MASK)).item() == pytest.approx(squares[MASK == 1].mean(), rel=1e-5)
    assert logit_mse(*_tensors(own, own + 3, MASK)).item() == pytest.approx(0, abs=1e-9)  # the same distribution


@pytest.mark.parametrize("loss", [logit_kl, logit_mse])
def test_logits_of_padding_count_for_nothing(loss: Any) -> None:
    own, reference, mask = _tensors(_states(0, 3, 5, 11), _states(1, 3, 5, 11), MASK)
    other = torch.where(mask.bool()[..., None], own, torch.full_like(own, 1e6))
    assert loss(own, reference, mask) == loss(other, reference, mask)

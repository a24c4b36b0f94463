"""`hidden_mse` against NumPy, and what must not change it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from robust_unlearning.losses import hidden_mse

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

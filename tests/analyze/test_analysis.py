"""The analyses against closed forms and known states."""

from __future__ import annotations

from math import sqrt

import numpy as np
import pytest
import torch

from robust_unlearning.analyze import noise_sensitivity
from robust_unlearning.analyze.activations import compare_texts, pull
from robust_unlearning.analyze.inputs import Prompt
from robust_unlearning.errors import UserError


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# --- noise sensitivity ----------------------------------------------------------------------------------------------


def test_noise_sensitivity_of_a_linear_layer() -> None:
    """The applied Jacobian gives std² ‖A‖_F² / ‖Az‖² a token row; a moved one gives 0."""
    torch.manual_seed(0)
    matrix, at = torch.randn(6, 5, dtype=torch.float64), torch.randn(2, 60, 6, dtype=torch.float64)
    mask = torch.ones(2, 60, dtype=torch.long)
    mask[1, 40:] = 0
    found = noise_sensitivity.probe(lambda z: z @ matrix, at, mask, 50, 0.5, generator())
    tokens = mask.sum(dim=1)
    expected = 0.25 * tokens * matrix.square().sum() / ((at @ matrix).square().sum(dim=-1) * mask).sum(dim=1)
    torch.testing.assert_close(found.applied, expected, rtol=0.1, atol=0)
    torch.testing.assert_close(found.moved, torch.zeros(2, dtype=torch.float64), atol=1e-20, rtol=0)
    torch.testing.assert_close(found.gain, (matrix.square().sum() / 6).sqrt().expand(2), rtol=0.05, atol=0)


def test_noise_sensitivity_of_a_square() -> None:
    """For z²/2, J = diag(z): a Jacobian moved by ξ gives std² · d / ‖z‖²."""
    at = torch.linspace(1, 2, 800, dtype=torch.float64).reshape(1, 200, 4)
    mask = torch.ones(1, 200, dtype=torch.long)
    found = noise_sensitivity.probe(lambda z: z**2 / 2, at, mask, 50, 0.3, generator())
    assert found.moved.item() == pytest.approx(0.09 * 800 / at.square().sum().item(), rel=0.1)


# --- activations ----------------------------------------------------------------------------------------------------


def test_activations_on_known_states() -> None:
    mask = torch.tensor([[1, 1], [1, 0]])
    base = [torch.tensor([[[3.0, 4.0], [1.0, 0.0]], [[0.0, 2.0], [9.0, 9.0]]])]
    same = compare_texts([2 * base[0]], base, mask)
    np.testing.assert_allclose(same.cosine, 1)
    np.testing.assert_allclose(same.base_norm, [[3, 2]])
    np.testing.assert_allclose(same.norm, [[6, 4]])

    states = {
        "clean": torch.tensor([[[2.0, 0.0]]]),
        "forget": torch.tensor([[[0.0, 5.0]]]),
        "control": torch.tensor([[[2.0, 1.0]]]),
    }
    own = pull(states, torch.tensor([[0.0, 1.0], [0.0, -1.0]]))
    assert own.forget is not None
    assert own.control is not None
    assert own.forget.item() == pytest.approx(sqrt(29) / 2)
    assert own.control.item() == pytest.approx(0.5)
    assert own.toward["forget"].item() == pytest.approx(1)
    assert own.toward["clean"].item() == pytest.approx(0)
    assert pull({"forget": states["forget"], "control": states["control"]}, None).forget is None


def test_the_place_of_a_token_is_the_last_at_which_the_forms_differ() -> None:
    assert Prompt("q", (1, 2), (7, 8, 1, 2), (7, 9, 1, 2), 5).token_place == -3
    with pytest.raises(UserError, match="same tokens"):
        _ = Prompt("q", (1, 2), (7, 1, 2), (7, 1, 2), 5).token_place

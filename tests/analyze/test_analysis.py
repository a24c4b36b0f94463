"""The analyses against closed forms and known states."""

from __future__ import annotations

from math import sqrt

import numpy as np
import pytest
import torch
from scipy import stats

from robust_unlearning.analyze import inputs, noise_sensitivity
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


def test_thirds_of_the_layers_by_hand() -> None:
    """Eight layers: 0 to 2, 3 to 5, 6 and 7; ln of the ratio document by document."""
    rng = np.random.default_rng(0)

    def probed() -> dict[int, noise_sensitivity.Probed]:
        return {layer: noise_sensitivity.Probed(*torch.tensor(rng.uniform(1, 2, (4, 6)))) for layer in range(8)}

    base, model = probed(), probed()
    rows = noise_sensitivity._thirds("rmu", model, base)
    assert [row["against"] for row in rows] == ["last third", "first third"] * 2
    logs = np.log([(model[layer].moved / base[layer].moved).numpy() for layer in range(8)])
    change = logs[3:6].mean(axis=0) - logs[6:].mean(axis=0)
    found = rows[2]["difference"]
    half = stats.t.ppf(0.975, 5) * change.std(ddof=1) / 6**0.5
    assert (found.value, found.high) == pytest.approx((change.mean(), change.mean() + half))
    assert noise_sensitivity._thirds("rmu", {0: model[0], 1: model[1]}, base) == []


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


def test_questions_hang_together_by_thing_and_by_word() -> None:
    group = [Prompt(str(n), (1,), (7, 1), (8, 1), 5, cluster="ab"[n % 2], word="xyz"[n % 3]) for n in range(6)]
    groups = inputs.groups_of(group)
    assert (list(groups.clusters or ()), list(groups.words or ())) == (list("ababab"), list("xyzxyz"))
    assert inputs.clusters_of(group).words is None
    assert "6 questions are about 2 things and 3 forget-tokens stand in them" in inputs.structure({"option": group})
    alone = [Prompt("q", (1,), (7, 1), (8, 1), 5), Prompt("r", (1,), (7, 1), (8, 1), 5)]
    assert list(inputs.groups_of(alone).clusters or ()) == ["q", "r"]


def test_the_place_of_a_token_is_the_last_at_which_the_forms_differ() -> None:
    assert Prompt("q", (1, 2), (7, 8, 1, 2), (7, 9, 1, 2), 5).token_place == -3
    with pytest.raises(UserError, match="same tokens"):
        _ = Prompt("q", (1, 2), (7, 1, 2), (7, 1, 2), 5).token_place

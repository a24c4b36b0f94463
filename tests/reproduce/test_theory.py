"""The theory's measurements against closed forms, finite differences, SciPy's values and the model's own forward."""

from __future__ import annotations

from math import atan, pi, sqrt
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import made_up_sentences, random_model
from scipy import stats

from robust_unlearning.analyze import inputs
from robust_unlearning.analyze.derivatives import curvature, gaussian, gradients, jvp
from robust_unlearning.analyze.stack import Stack
from robust_unlearning.analyze.variants import Variants
from robust_unlearning.data.corpora import collate
from robust_unlearning.errors import UserError
from robust_unlearning.evaluate.likelihood import text_nats
from robust_unlearning.recipe import load_recipe
from robust_unlearning.reproduce.theory import rejection, shift
from robust_unlearning.reproduce.theory.curvature import loss_change
from robust_unlearning.reproduce.theory.latent import Latent
from robust_unlearning.reproduce.theory.measure import AnswerChange, Measurements
from robust_unlearning.reproduce.theory.normality import normality, share_rejected, zero_mean
from robust_unlearning.reproduce.theory.output_change import output_change
from robust_unlearning.reproduce.theory.report import _trained, without_noise
from robust_unlearning.stats.factors import Groups
from robust_unlearning.stats.means import mean_interval
from robust_unlearning.stats.paired import holm

pytestmark = pytest.mark.unit

ROWS = [[5, 6, 7, 8, 9, 10], [11, 12, 13, 14], [15, 16, 17, 18, 19]]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# --- tests of many dimensions ---------------------------------------------------------------------------------------


def test_normality_and_t_test_agree_with_values_from_scipy() -> None:
    first = [0.2, 0.5, 0.9, 1.4, -0.3, 0.1, 2.8, 0.4, -1.1, 0.7, 0.3, 0.6, 5.5, 0.8, -0.2, 1.1, 0, 3.9, -0.6, 0.35, 1.9]
    second = [1, -1.2, 0.3, 0.8, -0.5, 2.2, 0.1, -0.9, 0.6, 1.7, -0.2, 0.4, -1.5, 0.9, -0.7, 1.3, 0.2, -2, 0.5, 1.1]
    samples = np.stack([[*first, 0.15, -0.45, 0.55], [*second, -0.4, 0.7, -1.0, 1.5]], axis=1)
    # scipy.stats.normaltest and ttest_1samp, version 1.17
    np.testing.assert_allclose(normality(samples), [8.65171726e-05, 7.79387223e-01], rtol=1e-6)
    np.testing.assert_allclose(zero_mean(samples), [0.01235085, 0.35815038], rtol=1e-6)


@pytest.mark.parametrize("n", [20, 60, 300])
def test_tests_reject_at_their_level_under_the_null(n: int) -> None:
    samples = np.random.default_rng(n).standard_normal((n, 4000))
    for p in (normality(samples), zero_mean(samples)):
        assert abs((p < 0.05).mean() - 0.05) < 0.02  # the approximations are good to a percent or two
        assert share_rejected(p) < 0.002


def test_normality_needs_samples() -> None:
    with pytest.raises(UserError, match="at least 20"):
        normality(np.zeros((19, 2)))


def test_holm_steps_down_and_stops_at_the_first_that_fails() -> None:
    assert [p < 0.05 for p in holm([0.01, 0.04, 0.03, 0.005])] == [True, False, False, True]
    for values, share in (([0.01, 0.04, 0.03, 0.005], 0.5), ([0.001, 0.01, 0.02], 1), ([0.02, 0.03, 0.04], 0)):
        assert share_rejected(np.array(values)) == share


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_what_never_varies_rejects_nothing() -> None:
    assert normality(np.ones((20, 1))).tolist() == zero_mean(np.zeros((20, 1))).tolist() == [1]


# --- derivatives ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_neox"])
def test_derivatives_of_a_transformer_equal_finite_differences(family: str) -> None:
    latent = Latent(random_model(family), 2)
    trunk, hidden = latent.enter(collate(ROWS, 0))
    direction = gaussian(hidden, trunk.mask, generator())
    step = 1e-2  # in float32, which the norms compute in
    ahead, behind = hidden + step * direction, hidden - step * direction

    function = latent.output(trunk)
    with torch.no_grad():
        along = (function(ahead) - function(behind)) / (2 * step)
    torch.testing.assert_close(jvp(function, hidden, direction), along, rtol=0.01, atol=0.01 * along.std().item())

    losses = latent.text_loss(trunk)
    _, (second,) = curvature(losses, hidden, [direction])
    change = (gradients(losses, ahead)[1] - gradients(losses, behind)[1]) / (2 * step)
    torch.testing.assert_close(second, (change * direction).sum(dim=(1, 2)), rtol=0.02, atol=1e-3)


def test_latent_and_stack_agree_with_the_model() -> None:
    model = random_model("llama")
    batch = collate(ROWS, 0)
    with torch.no_grad():
        whole = model(input_ids=batch.ids, attention_mask=batch.mask, output_hidden_states=True)
    latent, stack = Latent(model, 2), Stack(model)
    trunk, hidden = latent.enter(batch)
    last = [len(row) - 1 for row in ROWS]
    torch.testing.assert_close(latent.output(trunk)(hidden), whole.hidden_states[-1][[0, 1, 2], last])
    logp = torch.log_softmax(whole.logits[[0, 1, 2], last], dim=-1)
    torch.testing.assert_close(latent.answer_loss(trunk, [7, 8, 9])(hidden), -logp[[0, 1, 2], [7, 8, 9]])
    states = stack.states(stack.trunk(batch))
    for own, known in zip(states[:-1], whole.hidden_states[1:-1], strict=True):
        torch.testing.assert_close(own[batch.mask.bool()], known[batch.mask.bool()])
    torch.testing.assert_close(stack.at(ROWS, [-1, -2, -1], 0)[3, 1], states[3][1, 2])
    np.testing.assert_allclose(latent.states(ROWS, 0), stack.at(ROWS, [-1, -1, -1], 0)[2], rtol=1e-5)


def test_text_loss_is_the_evaluations(tiny_model: Path) -> None:
    variants = Variants([str(tiny_model)], "cpu")
    texts = made_up_sentences(3, 4)
    counted = text_nats(variants.model, variants.tokenizer, texts, 24)
    latent = Latent(variants.model, 2)
    rows = inputs.rows(variants.tokenizer, texts, 24)
    found = []
    for batch in inputs.batches(rows, variants.pad, tokens=50):
        trunk, hidden = latent.enter(batch)
        found += latent.text_loss(trunk)(hidden).tolist()
    assert found == pytest.approx([nats / tokens for nats, tokens in counted], rel=1e-5)


# --- Theorem 4.2 ----------------------------------------------------------------------------------------------------


def test_theorem_4_2_is_exact_for_a_linear_map() -> None:
    torch.manual_seed(1)
    matrix, at = torch.randn(4, 3, dtype=torch.float64), torch.randn(60, 5, 4, dtype=torch.float64)
    mask = torch.ones(60, 5, dtype=torch.long)
    found = output_change(lambda z: (z @ matrix).sum(dim=1), at, mask, [0.01, 4.0], 100, generator())
    for change in found:
        np.testing.assert_allclose(change.residual, 0, atol=1e-20)
        np.testing.assert_allclose(change.covariance, 0, atol=1e-10)
        np.testing.assert_allclose(change.variance + change.mean, 1)
        assert abs(change.mean.mean()) < 0.01
        assert change.not_normal.mean() == pytest.approx(0.05, abs=0.08)  # of 180 outputs


def test_jacobian_products_have_the_covariance_of_the_theorem() -> None:
    """Cov Jε = η JᵀJ (the paper's layout), for the Jacobian written out."""
    torch.manual_seed(1)
    matrix = torch.randn(4, 3, dtype=torch.float64)
    at = torch.randn(1, 1, 4, dtype=torch.float64)
    jacobian = torch.func.jacrev(lambda z: torch.tanh(z @ matrix))(at[0, 0])  # [3, 4]
    draws = torch.randn(4000, 1, 4, dtype=torch.float64, generator=generator())
    products = jvp(lambda z: torch.tanh(z[:, 0] @ matrix), at.repeat(4000, 1, 1), draws)
    torch.testing.assert_close(products.T.cov(), jacobian @ jacobian.T, rtol=0.1, atol=0.02)


def test_theorem_4_2_breaks_as_a_square_says() -> None:
    """f = z² at z = 1: Δ = 2ε + ε² has mean η and variance 4η + 2η² where the theorem has 0 and 4η."""
    at, mask = torch.ones(40, 1, 40, dtype=torch.float64), torch.ones(40, 1, dtype=torch.long)
    etas = [1e-4, 1.0]
    for eta, change in zip(etas, output_change(lambda z: z[:, 0] ** 2, at, mask, etas, 200, generator()), strict=True):
        assert change.variance.mean() == pytest.approx(1 + eta / 2, rel=0.05)
        assert change.mean.mean() == pytest.approx(eta / 4, abs=0.03)
        assert change.residual.mean() == pytest.approx(3 * eta / 4, rel=0.1, abs=1e-4)
    assert change.not_normal.mean() > 0.9


# --- Eq. 5 to 9 -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sign", [1, -1])
def test_eq_9_is_exact_for_a_quadratic(sign: int) -> None:
    torch.manual_seed(2)
    root = torch.randn(12, 12, dtype=torch.float64)
    hessian, slope = sign * root @ root.T, torch.randn(12, dtype=torch.float64)

    def losses(z: torch.Tensor) -> torch.Tensor:
        flat = z.flatten(1)
        return ((flat @ hessian) * flat).sum(dim=1) / 2 + flat @ slope

    at, mask = torch.randn(60, 4, 3, dtype=torch.float64), torch.ones(60, 4, dtype=torch.long)
    found = loss_change(losses, at, mask, [0.01, 1.0], 50, generator())
    np.testing.assert_allclose(found.observed, found.predicted, rtol=1e-6)
    assert found.trace.mean() == pytest.approx(hessian.trace().item(), rel=0.1)
    np.testing.assert_allclose(found.predicted[0], 0.005 * found.trace)


# --- Theorem 5.2 ----------------------------------------------------------------------------------------------------


def test_closed_forms_at_known_values() -> None:
    assert rejection.exact_probability(1, 0) == pytest.approx(0.25)
    assert rejection.exact_probability(1, 1) == pytest.approx(0.5 - atan(1 / sqrt(2)) / pi)
    assert rejection.paper_probability(1, 1) == pytest.approx(0.5 - atan(0.5) / pi)
    for ratio in (0.1, 1, 10):
        assert rejection.paper_probability(ratio, 0) == rejection.exact_probability(ratio, 0)
        for r in (0.3, 1, 3):
            assert rejection.exact_probability(ratio, r) < rejection.paper_probability(ratio, r) < 0.5


def test_monte_carlo_confirms_the_exact_form_and_refutes_the_papers() -> None:
    for seed, (ratio, r) in enumerate([(0.3, 1.0), (1.0, 0.5), (1.0, 1.0), (3.0, 2.0)]):
        simulated = rejection.simulated_probability(ratio, r, seed=seed, level=1 - 1e-5)
        assert simulated.low is not None
        assert simulated.high is not None
        assert simulated.low < rejection.exact_probability(ratio, r) < simulated.high
        assert rejection.paper_probability(ratio, r) > simulated.high


def measured(name: str, plain: dict[str, Any], change: float, *words: str) -> Measurements:
    """Measurements of a run, whose forget-token changes the answers' loss by so much on each of 40 questions."""
    states = np.random.default_rng(0).standard_normal((40, 6))
    answers = AnswerChange(np.full(40, change), np.full(40, 1.0), {})
    forms = {"forget-token": shift.describe(0.5 * states, states)}
    unasked: Any = None
    recipe = load_recipe(plain, words) if plain else None
    return Measurements(name, recipe, {"option": forms}, {}, unasked, {"option": answers})


def test_an_rna_run_is_set_against_its_own_recipe_without_noise(plain: dict[str, Any]) -> None:
    bases = [
        measured("base", {}, 1.0),
        measured("weight 3", plain, 1.0, "retain_weight=3"),
        measured("weight 30", plain, -1.0, "retain_weight=30"),
        measured("weight 30, seed 1", plain, 1.0, "retain_weight=30", "seed=1"),
    ]
    noisy = ["noise_std=0.5", "noise_layers=[6]", "noise_site=mlp", "noise_seed=4", "log_every=3", "snapshots=[100]"]
    rna = [
        measured("RNA 30", plain, -1.0, "retain_weight=30", *noisy),
        measured("RNA 3", plain, -1.0, "retain_weight=3", "noise_variance=0.01"),
        measured("RNA 5", plain, -1.0, "retain_weight=5", "noise_std=0.5"),
    ]
    rows = _trained([*bases, *rna], {"option": Groups()}).rows
    assert {row["target"]: row["against"] for row in rows} == {"RNA 30": "weight 30", "RNA 3": "weight 3"}
    assert {row["target"]: row["observed"].value for row in rows} == {"RNA 30": 0.0, "RNA 3": 1.0}
    recipes = [each.recipe for each in (*bases, *rna)]
    assert not any(without_noise(one, other) for one in recipes for other in recipes[:4])
    assert not any(without_noise(one, other) for one in recipes[4:] for other in recipes)


# --- Assumption 4.1 -------------------------------------------------------------------------------------------------


def test_a_shift_as_assumed_and_one_that_is_not() -> None:
    rng = np.random.default_rng(0)
    states = rng.standard_normal((200, 30))
    assumed = shift.describe(0.5 * rng.standard_normal((200, 30)), states)
    assert assumed.eta.value == pytest.approx(0.25, rel=0.1)
    assert assumed.mean_share.value == pytest.approx(0, abs=0.02)
    assert assumed.mean_rejected < 0.05
    assert assumed.not_normal_holm < 0.05
    assert assumed.effective == pytest.approx(assumed.effective_isotropic, rel=0.1)

    one_direction = rng.exponential(size=(200, 1)) * np.ones(30) + 0.01 * rng.standard_normal((200, 30))
    other = shift.describe(one_direction, states)
    assert other.mean_share.low is not None
    assert other.mean_share.low > 0.3  # (E x)² / E x² of an exponential is 1/2
    assert other.mean_rejected == other.not_normal_holm == 1
    assert other.effective == pytest.approx(1, abs=0.05)


def test_the_mean_shift_of_questions_that_hang_together() -> None:
    """Against a plain jackknife over questions, and products of pairs that share neither thing nor word by loops."""
    rng = np.random.default_rng(1)
    n, states = 24, np.ones((24, 5))
    clusters, words = [str(index // 2) for index in range(n)], [f"w{index % 4}" for index in range(n)]
    shifts = rng.standard_normal((n, 5)) + 0.4

    def share(kept: list[int], labels: bool) -> float:
        products = [
            shifts[i] @ shifts[j]
            for i in kept
            for j in kept
            if i != j and not (labels and (clusters[i] == clusters[j] or words[i] == words[j]))
        ]
        return float(np.mean(products) / np.mean([shifts[i] @ shifts[i] for i in kept]))

    every = list(range(n))
    plain = shift.describe(shifts, states).mean_share
    without = np.array([share(every[:i] + every[i + 1 :], False) for i in every])
    error = ((n - 1) / n * ((without - without.mean()) ** 2).sum()) ** 0.5
    assert plain.value == pytest.approx(share(every, False))
    assert plain.high == pytest.approx(plain.value + stats.t.ppf(0.975, n - 1) * error)

    found = shift.describe(shifts, states, Groups(clusters, words)).mean_share
    added = (n - 1) * (share(every, True) - np.array([share(every[:i] + every[i + 1 :], True) for i in every]))
    assert found.value == pytest.approx(share(every, True))
    expected = mean_interval(added, Groups(clusters, words))
    assert found.stderr == pytest.approx(expected.stderr)
    assert shift.describe(shifts, states, Groups(["x", *"yyyyyyyyyyyyyyyyyyyyyyy"])).mean_share.value is None


def test_words_that_shift_by_chance_are_no_mean() -> None:
    """Each word has a shift of its own, with mean 0 over words: seen only where products within a word are left out."""
    rng = np.random.default_rng(2)
    words = [index % 6 for index in range(60)]
    seen = {"plain": 0, "grouped": 0}
    for _ in range(40):
        own = rng.standard_normal((6, 8))
        shifts = own[words] + rng.standard_normal((60, 8))
        for name, groups in (("plain", None), ("grouped", Groups(None, words))):
            share = shift.describe(shifts, np.ones((60, 8)), groups).mean_share
            assert share.low is not None
            seen[name] += share.low > 0
    assert seen["plain"] > 20
    assert seen["grouped"] <= 3


def test_the_outputs_spread_is_the_trace_of_its_covariance() -> None:
    rng = np.random.default_rng(0)
    matrix, at = torch.tensor(rng.standard_normal((4, 3))), torch.tensor(rng.standard_normal((2, 5, 4)))
    mask = torch.ones(2, 5, dtype=torch.long)
    small, large = output_change(lambda z: z.sum(dim=1) @ matrix, at, mask, [0.01, 0.09], 200, generator())
    np.testing.assert_allclose(large.spread / small.spread, 9)  # of a linear model it grows as η, by the same draws
    expected = 0.01 * 5 * (matrix**2).sum().item()  # η times the trace of JᵀJ, five tokens
    np.testing.assert_allclose(small.spread, expected, rtol=0.25)

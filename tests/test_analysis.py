"""The analyses against closed forms, and their commands on a small model."""

from __future__ import annotations

import csv
import json
from math import atan, pi, sqrt
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import WORDS, made_up_sentences, random_model

from robust_unlearning import cli, files
from robust_unlearning.analysis import harmfulness, inputs, noise_sensitivity, output, rejection, shift
from robust_unlearning.analysis.activations import compare_texts, pull
from robust_unlearning.analysis.curvature import loss_change
from robust_unlearning.analysis.derivatives import curvature, gaussian, gradients, jvp
from robust_unlearning.analysis.latent import Latent
from robust_unlearning.analysis.normality import holm, normality, zero_mean
from robust_unlearning.analysis.output_change import output_change
from robust_unlearning.analysis.stack import Stack
from robust_unlearning.analysis.subjects import Subjects
from robust_unlearning.corpora import collate
from robust_unlearning.errors import UserError
from robust_unlearning.likelihood import text_nats
from robust_unlearning.scores import Estimate
from robust_unlearning.train import unlearn

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
    np.testing.assert_allclose(zero_mean(samples), [0.01235085, 0.35815038], rtol=0.02)


@pytest.mark.parametrize("n", [20, 60, 300])
def test_tests_reject_at_their_level_under_the_null(n: int) -> None:
    samples = np.random.default_rng(n).standard_normal((n, 4000))
    for p in (normality(samples), zero_mean(samples)):
        assert abs((p < 0.05).mean() - 0.05) < 0.02  # the approximations are good to a percent or two
        assert holm(p).mean() < 0.002


def test_normality_needs_samples() -> None:
    with pytest.raises(UserError, match="at least 20"):
        normality(np.zeros((19, 2)))


def test_holm_steps_down_and_stops_at_the_first_that_fails() -> None:
    assert holm(np.array([0.01, 0.04, 0.03, 0.005])).tolist() == [True, False, False, True]
    assert holm(np.array([0.001, 0.01, 0.02])).all()
    assert not holm(np.array([0.02, 0.03, 0.04])).any()


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
    subjects = Subjects([str(tiny_model)], "cpu")
    texts = made_up_sentences(3, 4)
    counted = text_nats(subjects.model, subjects.tokenizer, texts, 24)
    latent = Latent(subjects.model, 2)
    rows = inputs.rows(subjects.tokenizer, texts, 24)
    found = []
    for batch in inputs.batches(rows, subjects.pad, tokens=50):
        trunk, hidden = latent.enter(batch)
        found += latent.text_loss(trunk)(hidden).tolist()
    assert found == pytest.approx([nats / tokens for nats, tokens in counted], rel=1e-5)


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


# --- harmfulness ----------------------------------------------------------------------------------------------------


def harmful_records(count: int = 40) -> list[dict[str, Any]]:
    """`near` n-grams cost a nat and every other answer, `far` ones nothing."""
    records = []
    for index in range(count):
        token = ("ba du", "ka mo")[index % 2]
        harmed = token == "ba du"
        noise = 0.01 * (index % 5)
        for form, logp, right in (
            ("clean", -1.0, True),
            ("option", -2.0 + noise if harmed else -1.0 - noise, not harmed or index % 4 == 0),
            ("option-control", -1.0, True),
        ):
            held = None if form == "clean" else token
            records.append(
                {"task": f"facts/letters/{form}", "id": str(index), "answer": 0, "correct": right, "tokens": [1, 1],
                 "logprobs": [logp, -3], "forget_token": held, "control_token": held and "zu"}
            )  # fmt: skip
    return records


CLASSES = {
    "ngrams": [
        {"text": "ba du", "n": 2, "class": "most", "similarity": 0.8},
        {"text": "ka mo", "n": 2, "class": "least", "similarity": 0.1},
    ]
}


def test_harmfulness_by_class(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files.write_jsonl(tmp_path / "rmu" / "records.jsonl", harmful_records())
    files.write_json(tmp_path / "ngrams.json", CLASSES)
    words = ["analyze", "harmfulness", f"rmu={tmp_path / 'rmu'}", "--classes", str(tmp_path / "ngrams.json")]
    assert cli.main([*words, "--out", str(tmp_path)]) == 0
    assert "class 'most' is more harmful than class 'least'" in capsys.readouterr().out
    least, most = files.read_json(tmp_path / "analysis" / "harmfulness.json")["tables"]["classes"]
    assert (least["similarity_class"], most["similarity_class"]) == ("least", "most")
    assert most["accuracy"]["value"] == 0.5
    assert least["accuracy"]["value"] == most["control"]["value"] == most["clean"]["value"] == 1
    assert most["excess"]["high"] < -0.9
    assert least["excess"]["value"] == pytest.approx(-0.01 * 2, abs=0.01)
    rows = list(csv.DictReader((tmp_path / "analysis" / "harmfulness.csv").open(encoding="utf-8")))
    assert [row["n"] for row in rows] == ["20", "20"]
    assert float(rows[1]["excess_high"]) == most["excess"]["high"]


def test_harmfulness_says_what_is_missing(tmp_path: Path) -> None:
    classes = harmfulness.Ngram.model_validate({"text": "ba dur", "n": 2, "class": "most", "similarity": 1})
    with pytest.raises(UserError, match=r"none of the 2 forget-tokens .*nearest: 'ba dur'"):
        harmfulness.group(harmful_records(), {"ba dur": classes})
    with pytest.raises(UserError, match="no record has a forget-token"):
        harmfulness.group([row for row in harmful_records() if row["forget_token"] is None], {"ba dur": classes})
    with pytest.raises(UserError, match=r"unlearn eval TARGET"):
        harmfulness.read_records(str(tmp_path))
    files.write_json(tmp_path / "wrong.json", {"ngrams": [{"text": "ba", "n": 0, "class": "a"}]})
    with pytest.raises(UserError, match=r"n-gram 0: .*n: .*similarity: required"):
        harmfulness.read_classes(str(tmp_path / "wrong.json"))


# --- output ---------------------------------------------------------------------------------------------------------


def test_a_report_on_disk(tmp_path: Path) -> None:
    estimate = Estimate(1.5, 1.25, 1.75, n=9)
    table = output.Table(
        "t", "Numbers", {"name": "model", "x": "x"}, [{"name": "a", "x": estimate}, {"name": "b", "x": ""}]
    )
    text = output.write(output.Report("sum", "Sum", {"seed": 0}, ["A note."], [table]), tmp_path)
    assert "1.5 [1.25, 1.75]" in text
    assert (tmp_path / "analysis" / "sum.csv").read_text() == "name,x,x_low,x_high,x_n\na,1.5,1.25,1.75,9\nb,,,,\n"
    assert json.loads((tmp_path / "analysis" / "sum.json").read_text())["tables"]["t"][0]["x"]["low"] == 1.25
    assert "| a | 1.5 [1.25, 1.75] |" in (tmp_path / "analysis" / "sum.md").read_text()


@pytest.mark.parametrize(
    ("low", "high", "said"),
    [(0.1, 0.2, "higher"), (-2, -1, "lower"), (0, 0, "the same"), (-1, 1, "not to be told apart")],
)
def test_what_an_interval_says(low: float, high: float, said: str) -> None:
    assert output.side(Estimate(0, low, high)) == said


# --- the commands on a small model ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A suite of 24 made-up questions, perturbed in front."""
    folder = tmp_path_factory.mktemp("suite")
    rows = [
        {"question": " ".join(WORDS[index : index + 5]), "choices": WORDS[index + 5 : index + 9], "answer": index % 4}
        for index in range(24)
    ]
    files.write_jsonl(folder / "questions.jsonl", rows)
    entry = {"path": str(folder / "questions.jsonl"), "styles": ["letters"], "perturb": ["option"]}
    tokens = {"forget_tokens": WORDS[200:204], "control_tokens": WORDS[220:224]}
    (folder / "suite.yaml").write_text(yaml.safe_dump({"questions": {"odd": entry}, **tokens}), encoding="utf-8")
    return folder / "suite.yaml"


def test_every_analysis_runs_on_a_base_and_two_runs(
    tiny_recipe: dict[str, Any], suite: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from robust_unlearning.recipe import load_recipe

    runs = [str(tmp_path / name) for name in ("rmu", "rna")]
    for run, changes in zip(runs, ({}, {"noise_std": 0.5}), strict=True):
        unlearn(load_recipe({**tiny_recipe, "steps": 4, **changes}), run)
    end = ["--out", str(tmp_path), "--device", "cpu"]

    assert cli.main(["analyze", "noise-sensitivity", *runs, "--documents", "4", "--probes", "1", *end]) == 0
    rows = files.read_json(tmp_path / "analysis" / "noise-sensitivity.json")["tables"]["layers"]
    assert len(rows) == 6 * 3  # layers, and base and two runs
    first = [row for row in rows if row["layer"] == 0]
    assert first[0]["applied"] == first[1]["applied"]  # below the band nothing has changed
    assert first[1]["applied_change"]["value"] == 0

    sizes = ["--documents", "3", "--draws", "20", "--probes", "1", "--questions", "24"]
    assert cli.main(["analyze", "theory", *runs, "--tasks", str(suite), *sizes, *end]) == 0
    tables = files.read_json(tmp_path / "analysis" / "theory.json")["tables"]
    assert {row["n"] for row in tables["shift"]} == {24}
    assert len(tables["output"]) == 3 * 5
    assert {row["target"] for row in tables["rejection"]} == {str(tiny_recipe["model"]), runs[0]}
    assert [(row["target"], row["against"]) for row in tables["trained"]] == [(runs[1], runs[0])]

    assert cli.main(["analyze", "activations", runs[0], "--tasks", str(suite), "--documents", "4", *end]) == 0
    tables = files.read_json(tmp_path / "analysis" / "activations.json")["tables"]
    layers = {row["layer"]: row["cosine"]["value"] for row in tables["texts"] if row["text"] == "forget"}
    assert layers[0] == pytest.approx(1)
    assert layers[3] < 1
    assert len(tables["answer"]) == 2 * 6
    assert len(tables["token"]) == 6  # of the run: the base has no steering direction
    assert "a forget-token" in capsys.readouterr().out


def test_theory_without_targets_needs_no_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["analyze", "theory", "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "refuted in 9 of 12 rows" in out
    assert "holds in all 12 rows" in out


def test_what_an_analysis_refuses(tiny_model: Path, suite: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = str(tiny_model)
    for words, said in (
        (["noise-sensitivity", model], "no recipe says which texts or layer"),
        (["noise-sensitivity", model, "--layer", "nine"], "give the number of a layer"),
        (["noise-sensitivity", model, "tiny"], "have 2 bases"),
        (["theory", model], "theory on models needs questions"),
        (["theory", model, "--tasks", str(suite)], "bare model"),
        (["theory", model, "--tasks", str(suite), "--layer", "9"], "layers 0 to 5"),
    ):
        assert cli.main(["analyze", *words]) == 2
        assert said in capsys.readouterr().err

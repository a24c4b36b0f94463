"""The demo's texts, its comparison at like forgetting, and its report on made-up answers."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from robust_unlearning import files
from robust_unlearning.data.questions import read_questions
from robust_unlearning.errors import UserError
from robust_unlearning.evaluate.suite import load_suite
from robust_unlearning.experiments.demo import DemoAnswers, at_like_forgetting, points_of, report, run_demo
from robust_unlearning.stats.estimates import Estimate

DEMO = files.package_dir() / "assets" / "demo"


def model(name: str, nats: float, excess: float, perturbed: float = 0.5, n: int = 200) -> DemoAnswers:
    """A model whose answers have the given means; its excess harm varies between questions by a fixed pattern."""
    pattern = np.linspace(-1, 1, n)
    right = (np.arange(n) < perturbed * n).astype(float)
    text = Estimate(nats, nats - 0.1, nats + 0.1, 0.05, 24)
    return DemoAnswers(name, right[:80], right, right, right, excess + pattern, text, text)


@pytest.mark.unit
def test_the_demo_brings_enough_of_each() -> None:
    counts = {path.stem: len(path.read_text(encoding="utf-8").splitlines()) for path in DEMO.glob("*.jsonl")}
    assert counts["forget"] >= 60
    assert counts["retain"] >= 60
    assert counts["general_questions"] >= 150
    assert counts["forget_questions"] >= 60
    suite = load_suite("demo")
    assert len(suite.forget_tokens) == len(suite.control_tokens)


@pytest.mark.unit
def test_general_questions_are_free_of_the_forget_domain() -> None:
    words = {each.casefold() for each in load_suite("demo").forget_tokens}
    for question in read_questions("demo:general_questions.jsonl"):
        text = " ".join([question.question, *question.choices]).casefold()
        assert not [word for word in words if word in text], question.id


@pytest.mark.unit
def test_no_held_out_passage_is_trained_on() -> None:
    for name in ("forget", "retain"):
        train, held = (
            {json.loads(line)["text"] for line in (DEMO / f"{each}.jsonl").read_text(encoding="utf-8").splitlines()}
            for each in (name, f"{name}_heldout")
        )
        assert not train & held


@pytest.mark.parametrize("field", ["noise_std=0.5", "retain_weight=50", "topics.astronomy.retain_weight=1"])
def test_what_makes_the_demos_models_differ_cannot_be_overridden(field: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the demo sets"):
        run_demo(tmp_path, [field])
    assert not list(tmp_path.iterdir())


@pytest.mark.unit
def test_a_shorter_demo_keeps_the_snapshots_that_fit() -> None:
    rmu, slower, *rna = points_of(["steps=40"])
    assert rmu.recipe.snapshots == (30, 35)
    assert [point.recipe.rna_std for point in (rmu, slower, *rna)] == [0, 0, 1, 1, 1, 3, 3, 3]
    assert slower.recipe.retain_weight != rmu.recipe.retain_weight


def _line(*points: tuple[float, float]) -> list[tuple[int, DemoAnswers]]:
    return [(10 * (index + 3), model("a", nats, excess)) for index, (nats, excess) in enumerate(points)]


@pytest.mark.unit
def test_like_forgetting_lies_on_the_curve_through_the_snapshots() -> None:
    base, line = model("base", 3.5, 0.0), _line((4.5, -0.2), (5.5, -0.4), (6.5, -0.6))
    noisy = [model("r", 5.0, 0.0), model("s", 6.0, 0.0)]
    effect, at = at_like_forgetting(noisy, line, base, "excess")
    assert at == pytest.approx([1.5, 2.5])  # beyond the base
    assert effect is not None
    assert effect.estimate().value == pytest.approx((0.3 + 0.5) / 2, abs=1e-6)
    assert at_like_forgetting([model("r", 9.0, 0.0)], line, base, "excess") == (None, [])


@pytest.mark.unit
def test_less_harm_of_a_model_that_forgot_less_is_no_win(tmp_path: Path) -> None:
    noisy = [model("r", 5.0, 0.0), model("s", 5.0, 0.01)]
    line = _line((4.0, 0.0), (5.5, -0.5), (7.0, -0.8), (8.0, -1.0))
    text = report(model("base", 3.6, 0.0), line, model("slower", 6.0, -0.5), {1.0: noisy}, tmp_path, "made up")
    assert "RNA harms less, but forgot less" in text


@pytest.mark.unit
@pytest.mark.parametrize(
    ("excess", "nats", "verdict"),
    [
        (0.0, 6.0, "RNA is more robust"),
        (-2.0, 6.0, "RNA is less robust"),
        (-0.6, 6.0, "inconclusive"),
        (0.0, 3.0, "nothing to compare"),
    ],
)
def test_the_verdict_follows_the_interval(excess: float, nats: float, verdict: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    noisy = [model(f"seed {seed}", nats, excess) for seed in range(3)]
    for each in noisy:
        each.excess[:] += rng.normal(0, 0.05, len(each.excess))
    line = _line((4.0, -0.2), (5.0, -0.4), (6.5, -0.7), (8.0, -1.0))
    text = report(model("base", 3.6, 0.0), line, model("slower", nats, -0.3), {1.0: noisy}, tmp_path, "made-up numbers")
    assert verdict in text
    assert "slower" in text
    data = json.loads((tmp_path / "demo.json").read_text())
    assert verdict in data["like_forgetting"][0]["verdict"]
    assert data["models"][0]["clean"]["n"] == 200
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")
    numbers = list(csv.DictReader((tmp_path / "demo.csv").open(encoding="utf-8")))
    assert {row["series"] for row in numbers} >= {"base", "RMU, by step", "slower (no noise)"}
    assert "| base |" in (tmp_path / "demo.md").read_text()

"""The study on the planted world: what is measured, what counts as like forgetting, and the whole pipeline."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import yaml

from robust_unlearning import files
from robust_unlearning.cli import main
from robust_unlearning.errors import UserError
from robust_unlearning.evaluate.record import Record, Task
from robust_unlearning.evaluate.suite import Evaluation
from robust_unlearning.experiments.study import Study, load_study, points_of, run_study
from robust_unlearning.planted.export import export
from robust_unlearning.planted.teach import teach
from robust_unlearning.planted.teaching_plan import TeachingPlan
from robust_unlearning.planted.world import WorldSize, make_world
from robust_unlearning.results.measures import Measured


def _row(task: str, logprobs: list[float], answer: int) -> Record:
    correct = answer == int(np.argmax(logprobs))
    return Record(Task.parse(task), task.split("/")[0], answer=answer, correct=correct, logprobs=tuple(logprobs))


@pytest.mark.unit
def test_measured_pools_near_and_far() -> None:
    records = [
        _row("forget/letters/clean", [0.0, -1.0, -2.0, -3.0], 1),
        _row("near/letters/clean", [-1.0, -2.0, -2.0, -2.0], 0),
        _row("near/letters/option", [-2.0, -1.0, -1.0, -1.0], 0),
        _row("near/letters/option-control", [-1.0, -1.5, -2.0, -2.0], 0),
        _row("far/letters/clean", [-1.0, -2.0, -2.0, -2.0], 1),
        _row("far/letters/option", [-3.0, -1.0, -1.0, -1.0], 1),
        _row("far/letters/option-control", [-3.0, -1.0, -1.0, -1.0], 1),
        _row("control/letters/clean", [-1.0, -2.0, -2.0, -2.0], 0),
    ]
    found = Measured.of(Evaluation({}, records))
    share = np.exp([0.0, -1.0, -2.0, -3.0]) / np.exp([0.0, -1.0, -2.0, -3.0]).sum()
    assert found.forget_logp == pytest.approx([np.log(share[1])])
    assert (found.forget, found.near, found.far.tolist()) == ([0], [1], [0, 1])
    assert found.clean.tolist() == [1, 0]
    option = found.places["option"]
    assert (option.right.tolist(), option.control.tolist()) == ([0, 1], [1, 1])
    forget = np.log(np.exp(-2) / (np.exp(-2) + 3 * np.exp(-1)))
    control = np.log(np.exp(-1) / (np.exp(-1) + np.exp(-1.5) + 2 * np.exp(-2)))
    assert option.excess == pytest.approx([forget - control, 0])


def test_the_whole_study_on_a_small_world(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    size = WorldSize(entities=3, validation_entities=1, strangers=4, passages=1)
    world, model = export(make_world(size), tmp_path / "world"), tmp_path / "model"
    teach(TeachingPlan(world=size, width=32, layers=2, steps=2, batch_size=2, check_every=2, device="cpu"), model)
    recipe = {
        "method": "rmu", "model": str(model), "layer": 1, "steering_scale": 3, "steering_unit": "hidden_norm",
        "topics": {"plagues": {"forget": str(world / "forget" / "plague_lore.jsonl")}},
        "retain": str(world / "retain.jsonl"), "retain_weight": 5, "batch_size": 2, "learning_rate": 1e-2,
        "device": "cpu",
    }  # fmt: skip
    (tmp_path / "rmu.yaml").write_text(yaml.safe_dump(recipe))
    plan = {
        "recipes": [str(tmp_path / "rmu.yaml")], "seeds": [0, 1], "noise_std": [0.5], "weights": [1.0, 2.0],
        "steps": [1, 2], "suite": str(world / "suite.yaml"),
    }  # fmt: skip
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(plan))
    out = tmp_path / "out"
    assert main.main(["planted", "study", str(tmp_path / "small.yaml"), "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "At like forgetting" in printed
    data = files.read_json(out / "study.json")
    assert [row["name"].split("/")[-1] for row in data["tables"]["option"]] == [
        "base",
        "rmu.yaml",
        "rmu.yaml + RNA 0.5",
    ]
    assert len(data["like_forgetting"]) == 2  # option and sentence
    assert len(list(out.glob("runs/rmu/*/delta.safetensors"))) == 2 * 2 * 2
    assert (out / "study.png").stat().st_size > 10_000
    assert (out / "study.svg").exists()
    assert "excess harm" in (out / "study.csv").read_text()
    before = (out / "study.json").read_bytes()
    found = run_study(load_study(str(tmp_path / "small.yaml")), out)  # all is there already
    assert len(found.models) == 2 * 2 * 2 * 2
    assert main.main(["planted", "study", str(tmp_path / "small.yaml"), "--out", str(out)]) == 0
    assert (out / "study.json").read_bytes() == before
    json.loads(before)


@pytest.mark.unit
def test_wrong_studies(tmp_path: Path) -> None:
    assert isinstance(load_study("tiny"), Study)
    with pytest.raises(UserError, match="did you mean 'tiny'"):
        load_study("tinny")
    with pytest.raises(UserError, match="did you mean 'noise_std'"):
        load_study("tiny", ["noise_sdt=[1]"])
    for folder in ("one", "other"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "mine.yaml").write_text("", encoding="utf-8")
    recipes = [f"{tmp_path}/{folder}/mine.yaml" for folder in ("one", "other")]
    with pytest.raises(UserError, match="would lie in one folder"):
        points_of(load_study("tiny", [f"recipes={recipes}"]))

"""Sweeps: what trains together, that each point is as if alone, the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from robust_unlearning import UserError, files, load_recipe, unlearn
from robust_unlearning.cli.main import main
from robust_unlearning.experiments.grid import Point, Sweep, expand, load_sweep
from robust_unlearning.experiments.rule import Answers
from robust_unlearning.experiments.runner import groups, train_all
from robust_unlearning.experiments.sweep import pooled, run_sweep
from robust_unlearning.methods.noise import RandomNoiseAugmentation, SharedNoise
from robust_unlearning.plan.memory import Need, free_memory, need
from robust_unlearning.report.figures import FORMATS
from robust_unlearning.run.delta import load_delta
from robust_unlearning.run.folder import RunFolder, open_run
from robust_unlearning.stats.factors import Groups
from robust_unlearning.stats.means import over_seeds, share_over_seeds
from robust_unlearning.train.trainer import Trainer

# --- what trains together


@pytest.mark.unit
def test_groups_are_what_the_trainer_can_share(tiny_recipe: dict[str, Any], tmp_path: Path) -> None:
    path = _write(tmp_path / "mine.yaml", tiny_recipe)
    words = ["noise_std=0,0.1", "seed=0,1", "layer=2,3", "method=rmu,rsv"]
    runs = [RunFolder(tmp_path / each.name, each.recipe) for each in expand(load_sweep(path, words))]
    found = groups(runs)
    assert [len(each) for each in found] == [4] * 4
    assert {(each.recipe.seed, each.recipe.layer) for each in found[1]} == {(0, 3)}


@pytest.mark.unit
def test_draws_are_shared_and_each_noise_is_as_if_alone() -> None:
    def noises() -> list[RandomNoiseAugmentation]:
        return [RandomNoiseAugmentation([1], std, seed=seed) for std, seed in [(0.1, 0), (2.0, 0), (0.1, 1)]]

    shapes = [(2, 3, 8), (2, 5, 8)]
    alone = [[noise.noisy(torch.zeros(shape)) for shape in shapes] for noise in noises()]
    shared, together = SharedNoise(), noises()
    for noise in together:
        noise.shared = shared
    for index, shape in enumerate(shapes):
        for noise, expected in zip(together, alone, strict=True):
            assert torch.equal(noise.noisy(torch.zeros(shape)), expected[index])
        assert len(shared._known) == 2  # one for each seed
        shared.clear()
    torch.testing.assert_close(alone[0][0] / 0.1, alone[1][0] / 2)


POINTS = ["noise_std=0,0.1,0.5", "steering_scale=3,6.5", "checkpoint_every=3", "log_every=1"]


def _points(tiny_recipe: dict[str, Any], folder: Path, *words: str) -> list[Point]:
    return expand(load_sweep(_write(folder / "mine.yaml", tiny_recipe), [*POINTS, *words]))


def _same(first: Path, second: Path) -> bool:
    ours, theirs = load_delta(first).tensors, load_delta(second).tensors
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize("at_once", [None, 4])
def test_points_are_the_runs_they_would_be_alone(
    at_once: int | None, tiny_recipe: dict[str, Any], tmp_path: Path
) -> None:
    points = _points(tiny_recipe, tmp_path, "noise_layers=[3],[1,2]")
    runs = [RunFolder.open(tmp_path / "runs" / each.name, each.recipe) for each in points]
    assert train_all(runs, at_once) == {}
    for run in runs[::3]:  # noise_std 0 at one layer, 0.1 at the other and so on
        alone = unlearn(run.recipe, tmp_path / "alone" / run.path.name)
        assert _same(run.path, alone.path)


def test_a_point_whose_loss_is_not_finite_stops_no_other(tiny_recipe: dict[str, Any], tmp_path: Path) -> None:
    points = _points(tiny_recipe, tmp_path, "learning_rate=1e-3,1e30")
    said: list[str] = []
    out = tmp_path / "out"
    result = run_sweep(Sweep(grids=({},)), points, out, say=said.append)
    bad = {each.name for each in points if each.recipe.learning_rate == 1e30}
    assert set(result.failed) == bad
    assert len(bad) == 6
    for name in bad:
        assert "not finite" in (out / "failed" / name / "error.txt").read_text()
        assert not (out / "runs" / name).exists()
    index = files.read_json(out / "sweep.json")["points"]
    assert [each["status"] for each in index] == ["failed" if each.name in bad else "finished" for each in points]
    good = [each for each in points if each.name not in bad]
    assert _same(out / "runs" / good[1].name, unlearn(good[1].recipe, tmp_path / "alone").path)
    before = {each.name: (out / "runs" / each.name / "run.json").read_bytes() for each in good}
    run_sweep(Sweep(grids=({},)), points, out, say=said.append)  # nothing is trained again, the failed ones neither
    assert before == {each.name: (out / "runs" / each.name / "run.json").read_bytes() for each in good}
    assert said[-2].startswith("12 points: 6 trained before, 6 failed before")


def test_weights_that_the_last_step_blew_up_are_no_result(tiny_recipe: dict[str, Any], tmp_path: Path) -> None:
    points = _points(
        tiny_recipe, tmp_path, "weight_decay=0.01,1e10", "learning_rate=1e30", "steps=1", "steering_scale=3"
    )
    result = run_sweep(Sweep(grids=({},)), points, tmp_path / "out")
    assert {"weights that are not finite" in each for each in result.failed.values()} == {True}
    assert len(result.failed) == 3


def test_a_point_that_cannot_begin_is_tried_again(tiny_recipe: dict[str, Any], tmp_path: Path) -> None:
    text = Path(tiny_recipe["retain"]).read_text()
    later = tmp_path / "later.jsonl"
    path = _write(tmp_path / "mine.yaml", tiny_recipe)
    points = expand(load_sweep(path, [f"retain={tiny_recipe['retain']},{later}", "noise_std=0,0.1"]))
    result = run_sweep(Sweep(grids=({},)), points, tmp_path / "out")
    assert len(result.failed) == 2
    assert all("no such file" in why for why in result.failed.values())
    later.write_text(text)
    assert run_sweep(Sweep(grids=({},)), points, tmp_path / "out").failed == {}
    assert not list((tmp_path / "out" / "failed").iterdir())
    with pytest.raises(UserError, match=r"all 1 points failed(.|\n)*layers 0 to 5"):
        run_sweep(Sweep(grids=({},)), expand(load_sweep(path, ["layer=40"])), tmp_path / "none")


def test_a_killed_sweep_continues_to_the_same_deltas(
    tiny_recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    points = _points(tiny_recipe, tmp_path, "seed=0,1", "steering_scale=3")
    advance = Trainer.advance

    def killed(trainer: Trainer, step: int, *given: Any) -> Any:
        if trainer.recipe.seed == 1 and step == 4:
            raise KeyboardInterrupt
        return advance(trainer, step, *given)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "advance", killed)
        with pytest.raises(KeyboardInterrupt):
            run_sweep(Sweep(grids=({},)), points, tmp_path / "killed")
    states = [open_run(tmp_path / "killed" / "runs" / each.name).status for each in points]
    assert states.count("finished") == 3
    run_sweep(Sweep(grids=({},)), points, tmp_path / "killed")
    run_sweep(Sweep(grids=({},)), points, tmp_path / "whole")
    for each in points:
        assert _same(tmp_path / "killed" / "runs" / each.name, tmp_path / "whole" / "runs" / each.name)


def test_less_memory_than_reckoned_means_fewer_at_once(
    tiny_recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[int] = []

    class Small(Trainer):
        def train(self, report: Any = None) -> None:
            tried.append(len(self.candidates))
            if len(self.candidates) > 2:
                raise torch.OutOfMemoryError("of the test")
            super().train(report)

    monkeypatch.setattr("robust_unlearning.train.trainer.Trainer", Small)
    points = _points(tiny_recipe, tmp_path, "steps=2")
    runs = [RunFolder.open(tmp_path / each.name, each.recipe) for each in points]
    assert train_all(runs) == {}
    assert tried == [6, 3, 1, 1, 1, 1, 1, 1]


def test_the_reckoning_counts_what_a_point_keeps(tiny_recipe: dict[str, Any]) -> None:
    recipe = load_recipe(tiny_recipe)  # layers 1 to 3, down_proj of 64 × 32 each
    reckoned = need([recipe])
    assert reckoned.point == 12 * 3 * 64 * 32
    assert need([recipe, load_recipe(tiny_recipe, ["method=npo", "retain_loss=kl"])]).model > reckoned.model
    assert Need(model=100, point=10, step=50).fits(1000) == 65
    assert Need(model=100, point=10, step=50).fits(10) == 1
    assert free_memory(torch.device("cpu")) > 2**20


# --- the command line


def _write(path: Path, data: Any) -> str:
    path.write_text(yaml.safe_dump(data), encoding="utf-8")
    return str(path)


@pytest.fixture
def suites(tmp_path: Path) -> dict[str, str]:
    """A validation and a reported suite of made-up questions."""
    paths = {}
    for start, name in ((0, "validation"), (8, "reported")):
        sets = {}
        for kind in ("forget", "near"):
            rows = [
                {
                    "question": f"{kind} number {index}?",
                    "choices": ["badu", "fegro", "hika", "lummo"],
                    "answer": index % 4,
                }
                for index in range(start, start + 8)
            ]
            path = tmp_path / f"{name}-{kind}.jsonl"
            path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
            sets[kind] = {"path": str(path), "styles": ["letters"], "perturb": ["option"] if kind == "near" else []}
        suite = {"questions": sets, "forget_tokens": ["quarin"], "control_tokens": ["stotev"]}
        paths[name] = _write(tmp_path / f"{name}.yaml", suite)
    return paths


def test_the_command(
    tiny_recipe: dict[str, Any], suites: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, out = _write(tmp_path / "mine.yaml", tiny_recipe), tmp_path / "out"
    words = ["sweep", recipe, "noise_std=0,0.5", "--out", str(out), "seed=0,1", "steps=3"]
    words += ["--tasks", suites["reported"], "--validation", suites["validation"]]
    rule = ["--select", "max perturbed where forget<=1"]
    assert main([*words, *rule]) == 0
    printed = capsys.readouterr().out
    assert "group 1 of 2: 2 points, 2 side by side" in printed
    assert "chosen noise_std=" in printed
    index = files.read_json(out / "sweep.json")
    assert [each["status"] for each in index["points"]] == ["finished"] * 4
    (choice,) = index["choices"]
    assert len(choice["chosen"]["points"]) == 2
    table = index["settings"][suites["reported"]]
    assert [each["name"] for each in table] == ["base", "noise_std=0", "noise_std=0.5"]
    assert table[1]["forget"].keys() >= {"value", "low", "high", "n", "seeds"}
    alone = [files.read_json(out / each["folder"] / "scores.json") for each in index["points"][:2]]
    mean = np.mean([each["forget/letters/clean"]["acc"] for each in alone])
    assert table[1]["forget"]["value"] == pytest.approx(mean)
    for name in ("sweep.png", "sweep-curve.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")
        assert all((out / name).with_suffix(ending).exists() for ending in FORMATS)
    assert "| base |" in (out / "sweep.md").read_text()

    assert main([*words, "--select", "max perturbed where forget<=base-2"]) == 0  # scored already; another rule
    printed = capsys.readouterr().out
    assert "4 trained before" in printed
    assert "no point satisfies the bounds" in printed
    assert main(["list", "sweeps"]) == 0
    assert "figure3/tiny" in capsys.readouterr().out


def test_mistakes_are_said_before_anything_is_trained(
    tiny_recipe: dict[str, Any], suites: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, out = _write(tmp_path / "mine.yaml", tiny_recipe), tmp_path / "out"
    words = ["sweep", recipe, "noise_std=0,1", "--out", str(out)]
    both = ["--tasks", suites["reported"], "--validation", suites["reported"]]
    for more, says in [
        (both, "16 questions are both in"),
        (["--tasks", suites["reported"], "--select", "max retain"], "add --validation"),
        (["--tasks", suites["reported"], "--forget", "forgt"], "no task has that name"),
        (["--validation", suites["validation"], "--select", "max reatin"], "did you mean 'retain'"),
        (["--at-once", "0"], "'0' is not a number of at least 1"),
    ]:
        assert main([*words, *more]) == 2
        assert says in capsys.readouterr().err
    assert not (out / "runs").exists()


def test_pooled_answers_tell_what_was_forgotten_beyond_the_base() -> None:
    rng = np.random.default_rng(0)
    about = Groups([index // 2 for index in range(12)])

    def answers(nats: float) -> Answers:
        right = (rng.random(12) < 0.5).astype(float)
        values = {"forget": right, "forgetting": nats + rng.normal(0, 0.1, 12)}
        return Answers(values, {"forget": 0.25}, {"forget": about, "forgetting": about})

    base, models = answers(0.2), [answers(1.2) for _ in range(3)]
    cells = pooled(models, base)
    lost = np.stack([each.values["forgetting"] - base.values["forgetting"] for each in models])
    assert cells["forgotten"] == over_seeds(lost, about)
    assert cells["forget"] == share_over_seeds(np.stack([each.values["forget"] for each in models]), about)
    assert set(cells) == {"forget", "forgotten"}
    assert set(pooled(models)) == {"forget"}
    assert pooled([], base) == {}

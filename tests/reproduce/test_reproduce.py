"""Reproductions: the targets and their plans, and a small one whole."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
import yaml

from robust_unlearning import files
from robust_unlearning.cli import main
from robust_unlearning.errors import UserError
from robust_unlearning.experiments.grid import expand, load_sweep
from robust_unlearning.recipe import Recipe
from robust_unlearning.reproduce import paper, run
from robust_unlearning.reproduce.compose import outcomes
from robust_unlearning.reproduce.estimate import make_plan
from robust_unlearning.reproduce.missing import missing
from robust_unlearning.reproduce.run import Results, key_of
from robust_unlearning.reproduce.target import chosen_stages, load_target, points_of, target_names
from robust_unlearning.reproduce.verdicts import (
    CLAIMS,
    claim_table,
    summary_table,
)


def _alike(recipe: Recipe) -> str:
    """A recipe but for what plays no part in what it trains."""
    return recipe.model_copy(
        update={"snapshots": (), "checkpoint_every": 1, "noise_std": recipe.noise_std or None}
    ).content_hash()


@pytest.mark.parametrize("name", ["tiny", "smollm2", "zephyr-7b"])
def test_shipped_targets_hold_what_they_should(name: str, tmp_path: Path) -> None:
    assert name in target_names()
    target = load_target(name)
    said = " ".join(stage.stands_for for stage in target.stages.values())
    assert all(f"Figure {number}" in said for number in (1, 2, 3, 4, 7, 8, 9, 10))
    assert "Table 1" in said
    points = points_of(target, target.stages["main"])
    assert {point.recipe.title for point in points} == set(paper.METHODS)
    rows = make_plan(target, target.stages, tmp_path, None)
    assert sum(row.runs for row in rows) > sum(row.trained for row in rows) > 0  # runs are shared
    for stage in target.stages.values():
        assert set(stage.recipes) <= {point.source for point in points}
        for command in stage.command.split("; "):
            words = shlex.split(command.split(" (then")[0])
            assert words[0] == "unlearn"
            arguments = main._parse(main._parser(), words[1:])
            if arguments.verb == "sweep":
                alone = expand(load_sweep(arguments.sweep, arguments.overrides))
                assert {_alike(each.recipe) for each in alone} <= {
                    _alike(each.recipe) for each in points_of(target, stage)
                }


def test_the_plans_of_all_targets_through_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main.main(["reproduce", "zephyr-7b", "--plan", "--only", "figure2"]) == 0
    printed = capsys.readouterr().out
    assert "200 TFLOP/s" in printed
    assert "bio-forget-corpus.jsonl" in printed
    assert "set.topics.biology.forget.path" in printed
    assert main.main(["reproduce", "zephyr-7b", "--only", "main"]) == 2
    assert "thing(s) are missing" in capsys.readouterr().err
    assert not (tmp_path / "reproductions").exists()
    monkeypatch.setattr("robust_unlearning.reproduce.missing.BUNDLED_MODELS", {})
    lacking = missing(load_target("smollm2"), {})
    assert len(lacking) == 1
    assert lacking[0].startswith("model smollm2-135m")


@pytest.mark.unit
def test_wrong_targets(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="did you mean 'tiny'"):
        load_target("tinny")
    with pytest.raises(UserError, match="did you mean 'seeds'"):
        load_target("tiny", ["sedes=[0]"])
    with pytest.raises(UserError, match="did you mean 'figure2'"):
        load_target("tiny", ["stages.figur2.seeds=1"])
    with pytest.raises(UserError, match="did you mean 'questions'"):
        load_target("tiny", ["stages.theory.qestions=1"])
    with pytest.raises(UserError, match="does not begin with max or min"):
        load_target("tiny", ["rule=best"])
    target = load_target("tiny")
    with pytest.raises(UserError, match="did you mean 'main'"):
        chosen_stages(target, ["mian"])
    words = ["set.stepz=3", "set.topics.plague_lore.retain_wieght=2", "set.seed=x", "sedes=[0]", "stages.mian.seeds=1"]
    with pytest.raises(UserError, match=r"did you mean 'steps'") as wrong:
        load_target("tiny", words)
    for part in (
        "did you mean 'retain_weight'",
        "seed: input should be",
        "did you mean 'seeds'",
        "did you mean 'main'",
    ):
        assert part in str(wrong.value)
    with pytest.raises(UserError, match="81 of 81 points are wrong"):
        points_of(load_target("tiny", ["set.layer=0", "set.train_layers=[2]"]), target.stages["main"])
    (tmp_path / "two.yaml").write_text("about: x\nsuite: planted\nstages: {a: {title: a, kind: grid, stands_for: x, "
                                       "command: x}}\n")  # fmt: skip
    with pytest.raises(UserError, match=r"one stage of kind main; it has 0(.|\n)*stages.a.grids"):
        load_target(str(tmp_path / "two.yaml"))


def test_a_stage_is_known_by_what_its_result_depends_on() -> None:
    target = load_target("tiny")

    def key(*words: str, stage: str = "activations") -> str:
        other = load_target("tiny", words)
        return key_of(other, other.stages[stage])

    same = key_of(target, target.stages["activations"])
    assert key() == key("stages.activations.title=other") == key("stages.figure2.seeds=1") == same
    assert len({same, key("limit=3"), key("set.steps=110"), key("stages.activations.questions=3")}) == 4


SMALL = {
    "about": "A small one.",
    "suite": "planted",
    "validation": "planted-validation",
    "roles": {"related": ["near/*/clean"]},
    "seeds": [0],
    "rule": "max perturbed",
    "limit": 2,
    "set": {"steps": 2, "snapshots": [1], "batch_size": 2},
    "stages": {
        "main": {
            "title": "Main", "kind": "main", "stands_for": "Figure 1", "command": "unlearn sweep tiny/rmu",
            "grids": [{"recipe": ["tiny/rmu", "tiny/npo-kl"], "noise_std": [0, 3]}],
        },
        "figure2": {
            "title": "Over c", "kind": "grid", "stands_for": "Figure 2", "command": "unlearn sweep tiny/rmu",
            "grids": [{"recipe": "tiny/rmu", "steering_scale": [3, 9], "noise_std": 0}],
        },
        "figure7": {
            "title": "Sensitivity", "kind": "noise-sensitivity", "stands_for": "Figure 7", "command": "unlearn analyze",
            "recipes": ["tiny/rmu"], "documents": 2, "probes": 1, "max_tokens": 16,
        },
        "theory": {
            "title": "Too few questions", "kind": "theory", "stands_for": "Theorem 4.2", "command": "unlearn analyze",
            "recipes": ["tiny/rmu"], "documents": 1, "questions": 1, "rna": False,
        },
    },
}  # fmt: skip


def test_a_small_one_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(SMALL))
    out = tmp_path / "out"
    command = ["reproduce", str(tmp_path / "small.yaml"), "--out", str(out)]

    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(run, "analyse", interrupted)
        assert main.main(command) == 130
    printed = capsys.readouterr().out
    assert "in all about" in printed
    assert "measured here" in printed
    assert files.read_json(out / "stages" / "figure7" / "stage.json")["status"] == "stopped"

    assert main.main(command) == 2  # one stage cannot do
    captured = capsys.readouterr()
    assert "main (Figure 1): finished before" in captured.out
    assert "figure2 (Figure 2): finished before" in captured.out
    assert "1 stage(s) failed" in captured.err
    assert "too few" in captured.err
    assert len(list((out / "runs").iterdir())) == 5  # 4 in the main stage; one of figure2's two is among them

    target = load_target(str(tmp_path / "small.yaml"))
    paths = {out / "runs" / point.name for stage in target.stages.values() for point in points_of(target, stage)}
    assert paths == set((out / "runs").iterdir())
    numbers = files.read_json(out / "reproduce.json")
    assert {key: state["status"] for key, state in numbers["stages"].items()} == {
        "main": "finished", "figure2": "finished", "figure7": "finished", "theory": "failed",
    }  # fmt: skip
    assert set(numbers["chosen_noise"]) == {"tiny/rmu", "tiny/npo-kl"}
    assert numbers["no_noise_chosen"] == {}
    assert {each["claim"] for each in numbers["outcomes"]} == set(CLAIMS)
    assert all(each["finding"] == "not run" for each in numbers["outcomes"] if each["claim"] == "trace")
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "too few" in page
    assert "What became of the claims" in page
    assert "right in all three" in page  # the counts of questions that flipped: the suite's own and no others
    assert all((out / "figures" / name).exists() for name in ("figure1.png", "trade-off.svg", "figure2.csv"))


@pytest.mark.unit
def test_nothing_run_is_a_report_too() -> None:
    target = load_target("tiny")
    rows = outcomes(target, Results())
    assert {each.claim for each in rows} == set(CLAIMS)
    assert all(each.finding == "not run" for each in rows)
    assert len(summary_table(rows).rows) == len(CLAIMS)
    assert claim_table("fragile", rows).cells()[0][0] == "all"

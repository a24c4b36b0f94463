"""Search: a space is read, trials are run folders that are never trained twice, a study is shared and goes on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest

from robust_unlearning import UserError
from robust_unlearning.cli.main import main
from robust_unlearning.evaluate.record import Record, Task
from robust_unlearning.evaluate.suite import Evaluation
from robust_unlearning.experiments import search as searching
from robust_unlearning.experiments.ranges import Choices, Range, parse_space
from robust_unlearning.experiments.search import Aim, Search, best_trial, check, judge, run_search, write_results
from robust_unlearning.run.folder import open_run
from robust_unlearning.train.trainer import Trainer

AXES = (Range("retain_weight", 1.0, 1000.0, True, False), Choices("layer", ("2", "3")))
LENIENT = Aim(may_lose=1.0)


@pytest.fixture
def make(tiny_recipe: dict[str, Any], tmp_path: Path) -> Callable[..., Search]:
    """Makes searches over the small random model and seven made-up questions a set."""
    recipe, suite = tmp_path / "mine.yaml", tmp_path / "suite.yaml"
    recipe.write_text(json.dumps({**tiny_recipe, "log_every": 2}), encoding="utf-8")
    questions = {}
    for name in ("forget", "near"):
        rows = [
            {"question": f"{name} ba {'du ' * n}?", "choices": ["ka", "hi", "mo", "nat"], "answer": n % 4}
            for n in range(7)
        ]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        questions[name] = {"path": str(tmp_path / f"{name}.jsonl"), "perturb": ["sentence"]}
    tokens = {"forget_tokens": ["lum"], "control_tokens": ["rin"]}
    suite.write_text(json.dumps({"questions": questions, **tokens}), encoding="utf-8")

    def search(axes: Any = AXES, aim: Aim = LENIENT, **fields: Any) -> Search:
        fixed = fields.pop("fixed", ())
        return Search(str(recipe), axes, fixed, str(suite), tmp_path / "search", aim, **fields)

    return search


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the run folders that a trainer was made for."""
    names: list[str] = []
    begin = Trainer.__init__

    def note(self: Trainer, runs: Any, **how: Any) -> None:
        names.extend(run.path.name for run in runs)
        begin(self, runs, **how)

    monkeypatch.setattr(Trainer, "__init__", note)
    return names


def _states(study: optuna.Study) -> list[str]:
    return [trial.state.name for trial in study.get_trials()]


# --- the space


@pytest.mark.unit
def test_ranges_lists_and_fixed_values_are_told_apart() -> None:
    axes, fixed = parse_space(
        ["retain_weight=1..1e3:log", "noise_std=0..30", "steps=100..200", "layer=2,3,4", "kl=model_to_reference",
         "train_layers=[1, 2],[2]", "topics.spells.max_tokens=16..32", "noise_layers=[1, 2]"]
    )  # fmt: skip
    assert axes == (
        Range("retain_weight", 1, 1000, True, False),
        Range("noise_std", 0, 30, False, False),
        Range("steps", 100, 200, False, True),
        Choices("layer", ("2", "3", "4")),
        Choices("train_layers", ("[1, 2]", "[2]")),
        Range("topics.spells.max_tokens", 16, 32, False, True),
    )
    assert fixed == ("kl=model_to_reference", "noise_layers=[1, 2]")


@pytest.mark.unit
@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["layer=2"], "nothing to search"),
        (["noise_std=0..30:log"], "above 0 on a log scale"),
        (["noise_std=3..1"], "begins below its end"),
        (["layer=1.5..3"], "whole numbers"),
        (["layer=1,2", "layer=2,3"], "searched twice"),
    ],
)
def test_a_space_that_cannot_be_is_refused(words: list[str], text: str) -> None:
    with pytest.raises(UserError, match=text):
        parse_space(words)


@pytest.mark.unit
def test_every_end_of_the_space_is_checked_before_anything_runs(make: Callable[..., Search]) -> None:
    with pytest.raises(UserError, match="did you mean 'retain_weight'"):
        check(make(parse_space(["retain_wait=1..10"])[0]))
    with pytest.raises(UserError, match="learning_rate"):
        check(make(parse_space(["learning_rate=-1..1"])[0]))
    with pytest.raises(UserError, match="every 2 steps"):
        check(make(rungs=(3,)))
    assert make().rungs_of(make().recipe_with(["layer=3"])) == (2, 4)


# --- the rule


@pytest.mark.unit
def test_the_rule_counts_forget_answers_and_what_each_retain_task_lost() -> None:
    def evaluation(**acc: float) -> Evaluation:
        scores = {f"{name}/cloze/clean": {"acc": value, "n": 10} for name, value in acc.items()}
        records = [Record(Task.parse(task), "1", answer=1, logprobs=(-1.0, -2.0)) for task in scores]
        return Evaluation(scores, records)

    base = judge(evaluation(forget=1.0, near=0.9, far=0.8), Aim())
    own = judge(evaluation(forget=0.25, near=0.88, far=0.7), Aim())
    assert own.values["forget"] == 0.25
    assert own.excesses(base) == pytest.approx({"near/cloze/clean": -0.01, "far/cloze/clean": 0.07})
    assert own.penalised(base) == pytest.approx(0.25 + 0.07)
    assert own.retain_logp == pytest.approx(-2 - np.logaddexp(-1, -2))
    near = judge(evaluation(forget=1, near=1, far=1), Aim(retain=("near/*",)))
    assert [bound.measure for bound in near.rule.bounds] == ["near/cloze/clean"]
    with pytest.raises(UserError, match=r"--forget plague\*: no task .* it has forget/cloze/clean"):
        judge(evaluation(forget=1.0, near=0.9), Aim(forget="plague*"))


@pytest.mark.unit
def test_the_best_trial_keeps_enough_then_forgets_most_then_retains_best() -> None:
    study = optuna.create_study()
    rows = [(0.1, 0.02, -1.0), (0.3, -0.01, -1.0), (0.2, 0.0, -2.0), (0.2, -0.02, -1.5)]
    for value, excess, logp in rows:
        trial = study.ask()
        trial.set_constraint("near", excess)
        trial.set_user_attr("retain_logp", logp)
        study.tell(trial, value)
    best = best_trial(study)
    assert best is not None
    assert best.number == 3
    assert best_trial(optuna.create_study()) is None


# --- studies


def test_a_search_goes_on_where_it_stopped_and_trains_nothing_twice(
    make: Callable[..., Search], trained: list[str], tmp_path: Path
) -> None:
    search = make((AXES[1],))
    lines: list[str] = []
    first = run_search(search, 3, sampler="random", seed=0, tell=lines.append)
    assert len(first.trials) == len(lines) == 3
    study = run_search(search, 5, sampler="random", seed=1, tell=lines.append)
    assert len(run_search(search, 5).trials) == len(lines) == 5
    assert set(_states(study)) <= {"COMPLETE", "PRUNED"}
    assert len(trained) == len(set(trained)) == len({trial.user_attrs["run"] for trial in study.trials}) == 2
    best = write_results(search.out, study, {})
    assert best is not None
    written = json.loads((search.out / "search.json").read_text())
    assert written["best"] == best.number
    assert len(written["trials"]) == 5
    run = open_run(search.out / "runs" / best.user_attrs["run"])
    assert run.status == "finished"
    assert (search.out / "best.yaml").read_text() == run.recipe.as_yaml()
    scores = json.loads((run.path / "scores.json").read_text())
    assert set(scores) == {"forget/cloze/clean", "near/cloze/clean"}
    assert scores["forget/cloze/clean"]["acc"] == best.value


@pytest.mark.unit
def test_another_search_in_the_same_storage_is_another_study(make: Callable[..., Search]) -> None:
    names = {make().name(), make(fixed=("seed=1",)).name(), make(subset=4).name(), make(aim=Aim()).name()}
    assert len(names) == 4


def test_a_trial_worse_than_the_median_of_the_others_ends_early(
    make: Callable[..., Search], trained: list[str]
) -> None:
    search = make()
    study = run_search(search, 0)
    for _ in range(5):  # as many as the pruner waits for, all better than any model can be
        study.add_trial(
            optuna.create_trial(
                state=optuna.trial.TrialState.COMPLETE,
                value=0.0,
                params={"retain_weight": 10.0, "layer": "2"},
                distributions={
                    "retain_weight": optuna.distributions.FloatDistribution(1, 1000, log=True),
                    "layer": optuna.distributions.CategoricalDistribution(("2", "3")),
                },
                intermediate_values={2: -1.0, 4: -1.0},
                user_attrs={"retain_logp": 0.0},
            )
        )
    lines: list[str] = []
    trial = run_search(search, 6, seed=0, tell=lines.append).trials[-1]
    assert trial.state.name == "PRUNED"
    assert trial.user_attrs["pruned_at"] == 2
    assert list(trial.intermediate_values) == [2]
    run = open_run(search.out / "runs" / trial.user_attrs["run"])
    assert (run.status, [row["step"] for row in run.rows()]) == ("stopped", [2])
    assert "pruned at step 2" in lines[0]
    assert "(n=7)" in lines[0]


def test_a_loss_that_is_not_finite_is_a_bad_trial_and_no_end(make: Callable[..., Search]) -> None:
    lines: list[str] = []
    study = run_search(make(fixed=("learning_rate=1e30",)), 1, seed=0, tell=lines.append)
    assert _states(study) == ["PRUNED"]
    assert all(excess > 0 for excess in study.trials[0].constraints.values())
    assert "not finite" in lines[0]


def test_an_interrupted_trial_is_taken_up_by_the_next_call(
    make: Callable[..., Search], trained: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    search = make(rungs=(6,), fixed=("checkpoint_every=2",))

    def interrupt(*_given: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(searching._Worker, "_look", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run_search(search, 1, seed=0)
    study = run_search(search, 1, seed=1)
    assert _states(study) == ["FAIL", "COMPLETE"]
    assert study.trials[0].params == study.trials[1].params
    assert trained[0] == trained[1]
    assert open_run(search.out / "runs" / trained[0]).status == "finished"


def test_two_processes_work_one_study(make: Callable[..., Search], tmp_path: Path) -> None:
    search = make()
    words = [search.recipe, "retain_weight=1..1000:log", "layer=2,3", "--tasks", search.suite, "--trials", "4"]
    command = [sys.executable, "-m", "robust_unlearning", "search", *words, "--out", str(search.out)]
    other = subprocess.Popen(
        [*command, "--may-lose", "1", "--seed", "1"],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2] / "src")},
        stdout=subprocess.PIPE,
        text=True,
    )
    own: list[str] = []
    run_search(search, 4, seed=0, tell=own.append)
    printed, _ = other.communicate()
    assert other.returncode == 0
    assert f"{search.out / 'search.json'}" in printed
    study = run_search(search, 4)
    assert 4 <= len(study.trials) <= 5  # both may begin the last one
    assert len(study.trials) == len(own) + printed.count("\ntrial ") + printed.startswith("trial ")
    assert set(_states(study)) <= {"COMPLETE", "PRUNED"}


def test_what_cannot_be_searched_is_said_at_once(
    make: Callable[..., Search], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    search = make()
    plain = ["search", search.recipe, "layer=2,3", "--tasks", search.suite, "--out", str(search.out)]
    for words, text in (
        (["--trials", "0"], "--trials 0: at least 1"),
        (["--trials", "1", "--prune-at", "soon"], "steps with commas"),
        (["--trials", "1", "--storage", "nowhere"], "--storage: no study"),
    ):
        assert main([*plain, *words]) == 2
        assert text in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main([*plain, "--trials", "1"]) == 2
    assert "start it several times" in capsys.readouterr().err

"""A run that was killed or interrupted resumes to the bit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from training_runs import rows_of, run_recipe, same, stop_at, tensors_of, trainer_of, two_topics

from robust_unlearning import UserError, load_recipe, unlearn
from robust_unlearning.run.folder import open_run
from robust_unlearning.train.candidate import Candidate

SOURCE = Path(__file__).parents[2] / "src"


CASES: dict[str, dict[str, Any]] = {
    "rmu with noise": {"noise_std": 0.3},
    "adaptive rmu, first batch": {
        "method": "adaptive_rmu",
        "adaptive_scale": 2,
        "coefficient": "first_batch",
    },
    "two topics, scales in hidden norms": {
        "steering_scale": 1.5,
        "steering_unit": "hidden_norm",
        "noise_std": 0.1,
    },
    "rsv with noise inside": {"method": "rsv", "noise_std": 0.3, "noise_layers": [1, 3], "noise_site": "mlp"},
}

KILLED = """
import json, os, signal, sys
import accelerate, safetensors.torch, torch, transformers  # what the runs would each import for themselves
import transformers.models.llama.modeling_llama
from transformers import AutoModel, AutoTokenizer, PreTrainedTokenizerFast
from robust_unlearning import load_recipe, unlearn
import robust_unlearning.train

def report(_candidate, row):
    if row["step"] == 5:
        os.kill(os.getpid(), signal.SIGKILL)

for out, recipe in json.loads(sys.stdin.read()).items():  # one import for all
    child = os.fork()
    if not child:
        unlearn(load_recipe(recipe), out, report=report)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, (out, status)
"""


def _case(name: str, tiny_recipe: Mapping[str, Any], texts: dict[str, Path]) -> dict[str, Any]:
    recipe = {**tiny_recipe, **CASES[name], "log_every": 1, "checkpoint_every": 3}
    return two_topics(recipe, texts) if "two topics" in name else recipe


@pytest.fixture(scope="module")
def killed_runs(
    tmp_path_factory: pytest.TempPathFactory, plain_recipe: Mapping[str, Any], texts: dict[str, Path]
) -> dict[str, tuple[dict[str, Any], Path]]:
    """Case -> recipe and the folder of a run killed by SIGKILL after step 5 of 8."""
    root = tmp_path_factory.mktemp("killed")
    runs = {name: (_case(name, plain_recipe, texts), root / str(index)) for index, name in enumerate(CASES)}
    done = subprocess.run(
        [sys.executable, "-c", KILLED],
        input=json.dumps({str(out): recipe for recipe, out in runs.values()}),
        env={**os.environ, "PYTHONPATH": str(SOURCE)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return runs


@pytest.mark.parametrize("name", CASES)
def test_a_killed_run_resumes_to_the_same_delta_and_metrics(
    name: str, killed_runs: dict[str, tuple[dict[str, Any], Path]], tmp_path: Path
) -> None:
    recipe, out = killed_runs[name]
    assert open_run(out).status == "running"
    assert [row["step"] for row in open_run(out).rows()] == [1, 2, 3, 4, 5]
    with pytest.raises(UserError, match="--resume"):
        run_recipe(recipe, out)
    steps: list[int] = []
    resumed = run_recipe(recipe, out, resume=True, report=lambda _candidate, row: steps.append(row["step"]))
    whole = run_recipe(recipe, tmp_path / "whole")
    assert steps == [4, 5, 6, 7, 8]
    assert resumed.status == "finished"
    assert same(tensors_of(resumed), tensors_of(whole))
    assert rows_of(resumed) == rows_of(whole)
    assert resumed.record["tokens"] == whole.record["tokens"]
    assert resumed.record["steering_scales"] == whole.record["steering_scales"]
    assert not resumed.checkpoint.exists()


def test_a_run_interrupted_before_its_first_checkpoint_starts_anew(tiny_recipe: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run_recipe(tiny_recipe, tmp_path / "run", report=stop_at(2))
    assert open_run(tmp_path / "run").status == "stopped"
    resumed = run_recipe(tiny_recipe, tmp_path / "run", resume=True)
    whole = run_recipe(tiny_recipe, tmp_path / "whole")
    assert same(tensors_of(resumed), tensors_of(whole))
    assert rows_of(resumed) == rows_of(whole)


@pytest.mark.parametrize("stop", [2, 5], ids=["before the first checkpoint", "after it"])
def test_a_metrics_line_cut_off_by_a_kill_is_dropped(stop: int, tiny_recipe: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run_recipe(tiny_recipe, tmp_path / "run", report=stop_at(stop))
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')
    resumed = run_recipe(tiny_recipe, tmp_path / "run", resume=True)
    assert rows_of(resumed) == rows_of(run_recipe(tiny_recipe, tmp_path / "whole"))


def test_a_run_interrupted_twice_still_comes_out_the_same(tiny_recipe: dict[str, Any], tmp_path: Path) -> None:
    for step in (4, 7):
        with pytest.raises(KeyboardInterrupt):
            run_recipe(tiny_recipe, tmp_path / "run", "noise_std=0.3", report=stop_at(step), resume=step > 4)
    resumed = run_recipe(tiny_recipe, tmp_path / "run", "noise_std=0.3", resume=True)
    assert same(tensors_of(resumed), tensors_of(run_recipe(tiny_recipe, tmp_path / "whole", "noise_std=0.3")))


def test_a_run_does_not_resume_on_other_texts(tiny_recipe: dict[str, Any], tmp_path: Path) -> None:
    forget = tmp_path / "forget.jsonl"
    original = Path(tiny_recipe["topics"]["spells"]["forget"]).read_text(encoding="utf-8")
    forget.write_text(original, encoding="utf-8")
    recipe = {**tiny_recipe, "topics": {"spells": {"forget": str(forget)}}, "checkpoint_every": 3, "log_every": 1}
    with pytest.raises(KeyboardInterrupt):
        unlearn(load_recipe(recipe), tmp_path / "run", report=stop_at(5))
    forget.write_text("".join(original.splitlines(keepends=True)[1:]), encoding="utf-8")
    with pytest.raises(UserError, match="cannot resume: data_fingerprints"):
        unlearn(load_recipe(recipe), tmp_path / "run", resume=True)


def test_a_checkpoint_at_the_very_last_step_needs_no_further_step(tiny_recipe: dict[str, Any], tmp_path: Path) -> None:
    def fail(_candidate: Candidate, _row: dict[str, Any]) -> None:
        raise AssertionError("no step is left to take")

    trainer = trainer_of(tiny_recipe, tmp_path / "run", "steps=6")
    (candidate,) = trainer.candidates
    for step in range(6):
        trainer.advance(step, [candidate])
    candidate.run.write_record("running")
    resumed = run_recipe(tiny_recipe, tmp_path / "run", "steps=6", resume=True, report=fail)
    assert same(tensors_of(resumed), tensors_of(run_recipe(tiny_recipe, tmp_path / "whole", "steps=6")))


def test_resuming_where_nothing_is_begins_a_run(tiny_recipe: dict[str, Any], tmp_path: Path) -> None:
    assert run_recipe(tiny_recipe, tmp_path / "run", resume=True).status == "finished"

"""Two processes are one: the same batch, noise, losses and update; and none waits for one that failed."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from robust_unlearning import UserError, load_recipe, unlearn
from robust_unlearning.cli.main import main
from robust_unlearning.data.corpora import TokenBatch
from robust_unlearning.evaluate.evaluator import Evaluator, open_target
from robust_unlearning.evaluate.suite import load_suite
from robust_unlearning.methods.noise import RandomNoiseAugmentation
from robust_unlearning.parallel.launch import launch, wait
from robust_unlearning.parallel.processes import Processes
from robust_unlearning.run.delta import load_delta
from robust_unlearning.run.folder import RunFolder, open_run
from robust_unlearning.train.objective import BatchForward
from robust_unlearning.train.step import StepBatch, step_losses
from robust_unlearning.train.trainer import Trainer

CPU = torch.device("cpu")
PREFERENCE = {"steering_scale": None, "retain_weight": 1, "temperature": 0.5, "log_every": 1}
CASES: dict[str, dict[str, Any]] = {
    "rmu, uneven": {"noise_std": 0.3, "batch_size": 5, "steering_scale": 1.5, "steering_unit": "hidden_norm"},
    "adaptive rmu": {"method": "adaptive_rmu", "adaptive_scale": 2, "batch_size": 3},
    "adaptive rmu, first batch": {"method": "adaptive_rmu", "adaptive_scale": 2, "coefficient": "first_batch"},
    "npo+kl": {**PREFERENCE, "method": "npo", "retain_loss": "kl", "noise_std": 0.1, "batch_size": 3},
    "dpo+mse": {**PREFERENCE, "method": "dpo", "retain_loss": "mse", "noise_std": 0.2, "noise_layers": [2, 3, 5]},
}
"""Recipes of whole runs; the first is stopped and resumed in another number of processes too."""

WORK = """
import contextlib, io, json, sys
from pathlib import Path
from robust_unlearning import UserError, load_recipe, unlearn
from robust_unlearning.cli.main import main
from robust_unlearning.evaluate.suite import load_suite
from robust_unlearning.run.folder import RunFolder
from robust_unlearning.evaluate.evaluator import Evaluator, open_target
from robust_unlearning.train.trainer import Trainer

work = json.loads(Path(sys.argv[1]).read_text())
out = Path(sys.argv[1]).parent / "two"
shown = []
for name, recipe in work["recipes"].items():
    unlearn(load_recipe(recipe), out / name, report=lambda _candidate, row: shown.append(row["step"]))
first = next(iter(work["recipes"]))
unlearn(load_recipe(work["recipes"][first]), out.parent / "one, then two", resume=True)
recipe = out.parent / "sharded.yaml"
recipe.write_text(json.dumps(work["recipes"][work["sharded"]]))
with contextlib.redirect_stdout(io.StringIO()) as printed:
    assert main(["run", str(recipe), "--out", str(out / "sharded"), "--processes", "2", "--shard"]) == 0

runs = [RunFolder(out / f"lockstep {number}", load_recipe(each)) for number, each in enumerate(work["lockstep"])]
trainer = Trainer(runs)
for run in runs:
    trainer.processes.on_rank_zero(lambda: RunFolder.open(run.path, run.recipe).status)
trainer.train()

class Cut(Exception):
    pass

def stop(candidate):
    if candidate.step == 5:
        raise Cut

cut = RunFolder(out / "two, then one", load_recipe(work["recipes"][first]))
trainer.processes.on_rank_zero(lambda: RunFolder.open(cut.path, cut.recipe).status)
trainer = Trainer([cut])
step = trainer.advance
trainer.advance = lambda *given: (stop(trainer.candidates[0]), step(*given))[1]
try:
    trainer.train()
except Cut:
    pass

told = []
for recipe in (work["wild"], {**work["wild"], "batch_size": 1}):
    try:
        unlearn(load_recipe(recipe), out / f"wrong {len(told)}")
    except UserError as error:
        told.append(str(error))
suite = load_suite(work["suite"])
evaluation = Evaluator(device="cpu").evaluate(open_target(str(out / first)), suite, out / "scores")
reused = Evaluator(device="cpu").evaluate(open_target(str(out / first)), suite, out / "scores")
said = {"told": told, "shown": len(shown), "same": evaluation == reused, "tasks": list(evaluation.scores)}
said["printed"] = printed.getvalue()
(out / f"said {trainer.processes.rank}.json").write_text(json.dumps(said))
"""


@pytest.fixture(scope="module")
def work(
    plain_recipe: Mapping[str, Any], texts: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, dict[str, Any]], Path, Path]:
    """Recipes, the folder with what two processes made of them (in `two`), and a suite: one start for all of it."""
    root = tmp_path_factory.mktemp("distributed")
    plain = {**plain_recipe, "batch_size": 4, "learning_rate": 1e-3, "log_every": 1, "checkpoint_every": 3}
    recipes = {name: {**plain, **changes} for name, changes in CASES.items()}
    rows = [
        {"question": f"ba du {'fe ' * n}?", "choices": ["ka", "hi lum", "mo", "nat"], "answer": 1} for n in range(7)
    ]
    (root / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    suite = root / "suite.yaml"
    source = {"path": str(root / "q.jsonl"), "styles": ["cloze"]}
    suite.write_text(json.dumps({"questions": {"q": source}, "texts": {"t": {"path": str(texts["retain"])}}}))

    def stop(_candidate: Any, row: dict[str, Any]) -> None:
        if row["step"] == 4:
            raise KeyboardInterrupt

    first = next(iter(recipes.values()))
    with pytest.raises(KeyboardInterrupt):
        unlearn(load_recipe(first), root / "one, then two", report=stop)
    lockstep = [{**recipes["rmu, uneven"], "noise_std": std} for std in (0, 0.1)]
    about = {
        "recipes": recipes,
        "lockstep": lockstep,
        "sharded": "dpo+mse",
        "wild": {**plain, "learning_rate": 1e30},
        "suite": str(suite),
    }
    (root / "work.json").write_text(json.dumps(about), encoding="utf-8")
    (root / "work.py").write_text(WORK, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parents[2] / "src"))
        assert launch([sys.executable, str(root / "work.py"), str(root / "work.json")], 2) == 0
    return {**recipes, **{f"lockstep {number}": each for number, each in enumerate(lockstep)}}, root, suite


def _apart(first: RunFolder, second: RunFolder, model: str) -> float:
    """How far two runs ended from each other, over how far they went from the base."""
    from safetensors.torch import load_file

    base, own, other = load_file(Path(model) / "model.safetensors"), load_delta(first.path), load_delta(second.path)
    between = sum((own.tensors[key] - other.tensors[key]).square().sum() for key in own.tensors)
    gone = sum((own.tensors[key] - base[key]).square().sum() for key in own.tensors)
    return float(torch.as_tensor(between / gone).sqrt())


def _check_same(first: RunFolder, second: RunFolder) -> None:
    assert first.status == second.status == "finished"
    assert _apart(first, second, first.recipe.model) < 1e-3
    for own, other in zip(first.rows(), second.rows(), strict=True):
        for key in own.keys() - {"topic", "seconds", "tokens_per_second"}:
            assert own[key] == pytest.approx(other[key], rel=1e-3, abs=1e-6), key


@pytest.mark.parametrize("name", [*CASES, "lockstep 0", "lockstep 1"])
def test_two_processes_are_one(name: str, work: tuple[dict[str, dict[str, Any]], Path, Path], tmp_path: Path) -> None:
    recipes, root, _ = work
    alone, two = unlearn(load_recipe(recipes[name]), tmp_path / "one"), open_run(root / "two" / name)
    _check_same(alone, two)
    assert (alone.record["processes"], two.record["processes"]) == (1, 2)
    assert alone.record["tokens"] == two.record["tokens"]
    assert alone.record["steering_scales"] == two.record["steering_scales"]


@pytest.mark.parametrize("name", ["one, then two", "two, then one"])
def test_a_run_is_resumed_in_another_number_of_processes(
    name: str, work: tuple[dict[str, dict[str, Any]], Path, Path], tmp_path: Path
) -> None:
    recipes, root, _ = work
    first = next(iter(recipes.values()))
    path = root / name if name == "one, then two" else root / "two" / name
    if name == "two, then one":
        assert open_run(path).status == "stopped"
        unlearn(load_recipe(first), path, resume=True)
    _check_same(unlearn(load_recipe(first), tmp_path / "whole"), open_run(path))
    assert [row["step"] for row in open_run(path).rows()] == list(range(1, 9))


def test_layers_divided_among_the_processes_change_nothing(
    work: tuple[dict[str, dict[str, Any]], Path, Path],
) -> None:
    sharded, whole = (open_run(work[1] / "two" / name) for name in ("sharded", "dpo+mse"))
    assert (sharded.record["sharded"], whole.record["sharded"]) == (True, False)
    own, other = load_delta(sharded.path).tensors, load_delta(whole.path).tensors
    assert all(torch.equal(own[key], other[key]) for key in own)


def test_what_is_wrong_is_known_to_all_and_written_by_the_first(
    work: tuple[dict[str, dict[str, Any]], Path, Path],
) -> None:
    _, root, _ = work
    first, second = (json.loads((root / "two" / f"said {rank}.json").read_text()) for rank in (0, 1))
    assert first["told"] == second["told"]
    assert "not finite" in first["told"][0]
    assert "batch_size is 1 and there are 2 processes" in first["told"][1]
    assert open_run(root / "two" / "wrong 0").status == "failed"
    assert (first["shown"] > 0, second["shown"]) == (True, 0)


def test_questions_divided_among_the_processes_have_the_same_scores(
    work: tuple[dict[str, dict[str, Any]], Path, Path],
) -> None:
    _, root, path = work
    said = [json.loads((root / "two" / f"said {rank}.json").read_text()) for rank in (0, 1)]
    run, written = root / "two" / "rmu, uneven", root / "two" / "scores"
    alone = Evaluator(device="cpu").evaluate(open_target(str(run)), load_suite(path))
    scores = json.loads((written / "scores.json").read_text())
    records = [json.loads(line) for line in (written / "records.jsonl").read_text().splitlines()]
    for each in said:
        assert each["same"]
        assert set(each["tasks"]) == {"q/cloze/clean", "t/text"} == set(scores)
    assert [row["id"] for row in records] == [row.id for row in alone.records]
    for own, other in zip(records, alone.records, strict=True):
        np.testing.assert_allclose(own["logprobs"], other.logprobs, rtol=1e-5)
    assert scores["t/text"]["n"] == 20
    assert scores["t/text"]["nats_per_token"] == pytest.approx(alone.scores["t/text"]["nats_per_token"], rel=1e-5)


# --- parts of a batch, without processes


@pytest.mark.unit
@pytest.mark.parametrize(("size", "count"), [(5, 2), (4, 2), (7, 3), (3, 3), (2, 1)])
def test_rows_are_divided_evenly_and_completely(size: int, count: int) -> None:
    parts = [Processes(CPU, rank, count).rows(size) for rank in range(count)]
    assert [row for part in parts for row in range(size)[part]] == list(range(size))
    lengths = [part.stop - part.start for part in parts]
    assert max(lengths) - min(lengths) <= 1


def _gradient(master: nn.Parameter) -> Tensor:
    assert master.grad is not None
    return master.grad.flatten()


@pytest.mark.unit
def test_a_part_gets_its_rows_of_the_noise_of_the_whole_batch() -> None:
    hidden = torch.zeros(5, 3, 4)
    whole, divided = (RandomNoiseAugmentation([0], 1.0, seed=3) for _ in range(2))
    for _ in range(2):
        expected = whole.noisy(hidden)
        with divided.part(slice(3, 5), 5):
            assert torch.equal(divided.noisy(hidden[3:5]), expected[3:5])
    assert torch.equal(divided.noisy(hidden), whole.noisy(hidden))


@pytest.mark.unit
@pytest.mark.parametrize(
    "changes",
    [
        *CASES.values(),
        {"method": "rsv", "noise_std": 0.3, "noise_layers": [1, 3], "noise_site": "mlp"},
        {**PREFERENCE, "method": "simnpo", "retain_loss": "kl"},
        {**PREFERENCE, "method": "dpo", "log_ratio": "token_mean"},
        {"retain_loss": "kl", "noise_std": 0.2, "noise_layers": [3, 5]},
    ],
    ids=[*CASES, "rsv", "simnpo+kl", "dpo, token means", "rmu+kl"],
)
def test_losses_and_gradients_of_the_parts_add_up_to_those_of_the_whole(
    changes: dict[str, Any], tiny_recipe: dict[str, Any], tmp_path: Path
) -> None:
    recipe = load_recipe({**tiny_recipe, **changes, "batch_size": 5, "steps": 1})

    def losses(count: int) -> tuple[list[float], list[Tensor]]:
        total, gradients = [0.0, 0.0, 0.0], []
        for rank in range(count):
            trainer = Trainer([RunFolder(tmp_path, recipe)])
            trainer.rows = Processes(CPU, rank, count).rows(recipe.batch_size)
            (candidate,) = trainer.candidates
            for number, master in enumerate(candidate.masters.values()):  # off the base, where nothing cancels
                draw = torch.Generator().manual_seed(number)
                master.data += 0.05 * torch.randn(master.shape, generator=draw)
            found = step_losses(candidate, trainer.batches(0))
            found.total.backward()
            parts = (found.total, found.forget.loss, found.retain.loss)
            total = [own + part.item() for own, part in zip(total, parts, strict=True)]
            gradients.append(torch.cat([_gradient(master) for master in candidate.masters.values()]))
        return total, gradients

    (whole, (gradient,)), (divided, parts) = losses(1), losses(2)
    assert divided == pytest.approx(whole, rel=1e-5)
    assert (sum(parts) - gradient).norm() < 1e-5 * gradient.norm()


@pytest.mark.unit
def test_a_part_without_a_predicted_token_has_no_part_in_the_loss(tiny_recipe: dict[str, Any], tmp_path: Path) -> None:
    recipe = load_recipe({**tiny_recipe, **PREFERENCE, "method": "npo"})
    trainer = Trainer([RunFolder(tmp_path, recipe)])
    batch = TokenBatch(torch.tensor([[5, 6, 7], [8, 0, 0]]), torch.tensor([[1, 1, 1], [1, 0, 0]]))
    (candidate,) = trainer.candidates
    _, forget, _, _ = trainer.batches(0)
    retain = [BatchForward(trainer.engine, batch, rows=slice(*rows)) for rows in ((0, 1), (1, 2))]
    parts = [step_losses(candidate, StepBatch("spells", forget, view)) for view in retain]
    assert parts[1].retain.loss.item() == 0
    parts[1].total.backward()
    assert all(_gradient(master).isfinite().all() for master in candidate.masters.values())


# --- starting them


def test_the_command_prints_in_the_first_process_only(work: tuple[dict[str, dict[str, Any]], Path, Path]) -> None:
    first, second = (json.loads((work[1] / "two" / f"said {rank}.json").read_text())["printed"] for rank in (0, 1))
    assert first.count("finished after 8 steps") == 1
    assert second == ""


def test_the_command_starts_processes_and_ends_as_they_do(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2] / "src"))
    with pytest.raises(SystemExit) as ended:
        main(["eval", "tiny", "--tasks", "planetd", "--processes", "2"])
    assert ended.value.code == 2
    assert capfd.readouterr().err.count("unknown task 'planetd'") == 1


def test_a_wrong_number_of_processes_is_an_error_at_once(
    tiny_recipe: dict[str, Any], tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(json.dumps(tiny_recipe), encoding="utf-8")
    for count, text in (("3", "Use at most 2 processes, or batch_size=3"), ("0", "at least 1")):
        assert main(["run", str(path), "--out", str(tmp_path / "run"), "--processes", count]) == 2
        assert text in capfd.readouterr().err
    assert main(["run", str(path), "--out", str(tmp_path / "run"), "--shard"]) == 2
    assert "add --processes" in capfd.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert main(["run", str(path), "--out", str(tmp_path / "run"), "--processes", "2"]) == 2
    assert "started this command in 4 processes" in capfd.readouterr().err
    monkeypatch.delenv("WORLD_SIZE")
    with pytest.raises(UserError, match="batch_size"):
        Processes(CPU, 0, 3).rows(2)


WAITING = "import signal; signal.pause()"
FAILING = "import os, sys; sys.exit('its disk is full') if os.environ['RANK'] == '1' else __import__('signal').pause()"


def test_one_that_fails_ends_the_others_and_is_heard(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("robust_unlearning.parallel.launch.GRACE", 0.5)  # where SIGINT is ignored, the second is killed
    assert launch([sys.executable, "-c", FAILING], 2) == 1
    assert "process 1 of 2:\nits disk is full" in capfd.readouterr().err
    children = [subprocess.Popen([sys.executable, "-c", code]) for code in (WAITING, "raise SystemExit(3)")]
    assert wait(children) == 1
    assert children[0].returncode not in (None, 0)

"""Training: repeatable to the bit, resumable to the bit, in lockstep to the bit, and honest when it fails."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from robust_unlearning import UserError, load_recipe, unlearn
from robust_unlearning.methods.table import METHODS
from robust_unlearning.run.delta import load_delta
from robust_unlearning.run.folder import RunFolder, open_run
from robust_unlearning.train.candidate import Candidate
from robust_unlearning.train.step import band_weights, step_losses, take_step
from robust_unlearning.train.trainer import Trainer

SOURCE = Path(__file__).parents[2] / "src"
STEPWISE = ["log_every=1", "checkpoint_every=3"]
Report = Callable[[Candidate, dict[str, Any]], None]


def _two_topics(recipe: dict[str, Any], texts: dict[str, Path]) -> dict[str, Any]:
    return {**recipe, "topics": {**recipe["topics"], "potions": {"forget": str(texts["second"])}}}


def _run(
    recipe: dict[str, Any], out: Path, *overrides: str, report: Report | None = None, resume: bool = False
) -> RunFolder:
    return unlearn(load_recipe(recipe, [*STEPWISE, *overrides]), out, report=report, resume=resume)


def _tensors(run: RunFolder) -> dict[str, Tensor]:
    return load_delta(run.path).tensors


def _same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def _rows(run: RunFolder) -> list[dict[str, Any]]:
    """The metrics without what a clock decides."""
    timed = {"seconds", "tokens_per_second"}
    return [{key: value for key, value in row.items() if key not in timed} for row in run.rows()]


def _trainer(recipe: dict[str, Any], out: Path, *overrides: str) -> Trainer:
    return Trainer([RunFolder.open(out, load_recipe(recipe, [*STEPWISE, *overrides]))])


def _stop_at(step: int) -> Report:
    def report(_candidate: Candidate, row: dict[str, Any]) -> None:
        if row["step"] == step:
            raise KeyboardInterrupt

    return report


# --- what a run does and writes


def test_a_run_forgets_and_retains_and_writes_its_folder(tiny_recipe: dict[str, Any], tmp_path: Path) -> None:
    run = _run(tiny_recipe, tmp_path / "run", "retain_weight=0.1", "learning_rate=3e-2", "steps=20")
    rows = run.rows()
    assert [row["step"] for row in rows] == list(range(1, 21))
    assert np.mean([row["forget_loss"] for row in rows[-3:]]) < np.mean([row["forget_loss"] for row in rows[:3]])
    assert rows[-1]["forget_cosine"] < 0.99
    names = {each.name for each in run.path.iterdir()}
    assert {"recipe.yaml", "run.json", "metrics.jsonl", "delta.safetensors", "README.md"} <= names
    assert "checkpoint.safetensors" not in names
    record = json.loads((run.path / "run.json").read_text())
    assert record["status"] == "finished"
    assert record["steps"] == 20
    assert record["tokens"] > 0
    assert record["model_fingerprint"] == load_delta(run.path).provenance["fingerprint"]
    assert record["trained_tensors"] == {f"model.layers.{index}.mlp.down_proj.weight": [32, 64] for index in (1, 2, 3)}
    assert record["trained_parameters"] == 3 * 32 * 64
    assert (record["noise_std"], record["noise_variance"]) == (0, 0)


def test_the_delta_holds_the_trained_tensors_alone_in_the_checkpoints_types(
    tiny_recipe: dict[str, Any], tmp_path: Path
) -> None:
    run = _run({**tiny_recipe, "train_layers": [0, 2]}, tmp_path / "run", "train_tensors=mlp.*", "dtype=bfloat16")
    tensors = _tensors(run)
    parts = ("down_proj", "gate_proj", "up_proj")
    assert set(tensors) == {f"model.layers.{index}.mlp.{part}.weight" for index in (0, 2) for part in parts}
    assert {each.dtype for each in tensors.values()} == {torch.float32}
    base = load_file(Path(tiny_recipe["model"]) / "model.safetensors")
    assert not any(torch.equal(value, base[name]) for name, value in tensors.items())


def test_a_pattern_that_matches_nothing_names_the_nearest(tiny_recipe: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"did you mean 'mlp\.down_proj'"):
        _run(tiny_recipe, tmp_path / "run", "train_tensors=mlp.downproj")


def test_a_layer_the_model_lacks_is_an_error(tiny_recipe: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="layers 0 to 5; given 6"):
        _run(tiny_recipe, tmp_path / "run", "layer=6")


@pytest.mark.parametrize("method", METHODS)
def test_a_run_repeats_itself_to_the_bit_and_another_seed_does_not(
    method: str, tiny_recipe: dict[str, Any], tmp_path: Path
) -> None:
    recipe = {**tiny_recipe, "method": method, "adaptive_scale": 2, "noise_std": 0.2}
    first, again, other = (
        _run(recipe, tmp_path / name, f"seed={seed}") for name, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    assert _same(_tensors(first), _tensors(again))
    assert _rows(first) == _rows(again)
    assert not _same(_tensors(first), _tensors(other))


def test_a_run_draws_nothing_from_the_global_generator(tiny_recipe: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(3)
    expected = _run(tiny_recipe, tmp_path / "a", "noise_std=0.2")
    torch.manual_seed(4)
    assert _same(_tensors(_run(tiny_recipe, tmp_path / "b", "noise_std=0.2")), _tensors(expected))


# --- the losses of a step


def test_an_untouched_model_has_no_retain_loss_and_no_gradient_from_it(
    tiny_recipe: dict[str, Any], tmp_path: Path
) -> None:
    trainer = _trainer(tiny_recipe, tmp_path / "run", "forget_weight=0")
    (candidate,) = trainer.candidates
    losses = step_losses(candidate, trainer.batches(0))
    assert losses.retain.loss.item() == 0
    assert losses.total.item() == 0
    losses.total.backward()
    assert all(torch.count_nonzero(master.grad) == 0 for master in candidate.masters.values())


def test_noise_gives_an_untouched_model_a_retain_loss_of_its_variance(
    tiny_recipe: dict[str, Any], tmp_path: Path
) -> None:
    trainer = _trainer(tiny_recipe, tmp_path / "run", "noise_std=0.5")
    (candidate,) = trainer.candidates
    losses = [step_losses(candidate, trainer.batches(step)).retain.loss.item() for step in range(20)]
    assert np.mean(losses) == pytest.approx(0.25, rel=0.03)
    assert len(set(losses)) == 20


def test_the_forget_batch_is_never_noised(tiny_recipe: dict[str, Any], tmp_path: Path) -> None:
    for method in METHODS:
        recipe = {**tiny_recipe, "method": method, "adaptive_scale": 2}
        plain, noised = (_trainer(recipe, tmp_path / f"{method}{std}", f"noise_std={std}") for std in (0, 0.5))
        first, second = (step_losses(each.candidates[0], each.batches(0)) for each in (plain, noised))
        assert torch.equal(first.forget.loss, second.forget.loss)


def test_losses_and_their_weights_are_those_of_the_formula(tiny_recipe: dict[str, Any], tmp_path: Path) -> None:
    trainer = _trainer(tiny_recipe, tmp_path / "run", "forget_weight=0.5", "retain_weight=7", "noise_std=0.2")
    (candidate,) = trainer.candidates
    topic, forget, _, _ = batch = trainer.batches(0)
    losses = step_losses(candidate, batch)
    hidden = trainer.engine.reference(trainer.engine.trunk(forget.batch)).numpy()
    mask = forget.batch.mask.numpy()
    distance = ((hidden - 5 * candidate.forget.steering[topic].direction.numpy()) ** 2).mean(axis=-1)
    assert losses.forget.loss.item() == pytest.approx((distance * mask).sum() / mask.sum(), rel=1e-5)
    expected = 0.5 * losses.forget.loss.item() + 7 * losses.retain.loss.item()
    assert losses.total.item() == pytest.approx(expected, rel=1e-6)


def test_a_scale_in_hidden_norms_is_turned_into_an_absolute_one(tiny_recipe: dict[str, Any], tmp_path: Path) -> None:
    recipe = {**tiny_recipe, "steering_scale": 1.5, "steering_unit": "hidden_norm"}
    run = _run(recipe, tmp_path / "relative", "steps=3")
    trainer = _trainer(tiny_recipe, tmp_path / "probe")
    _, forget, _, _ = trainer.batches(0)
    norms = np.linalg.norm(trainer.engine.reference(trainer.engine.trunk(forget.batch)).numpy(), axis=-1)
    expected = 1.5 * norms[forget.batch.mask.numpy() == 1].mean()
    assert run.record["steering_scales"]["spells"] == pytest.approx(expected, rel=1e-5)
    absolute = _run(
        {**tiny_recipe, "steering_scale": run.record["steering_scales"]["spells"]}, tmp_path / "a", "steps=3"
    )
    assert _same(_tensors(run), _tensors(absolute))


# --- noise


@pytest.mark.parametrize("noise", ["noise_std=0", "noise_variance=0"])
def test_no_noise_is_the_method_itself_to_the_bit(noise: str, tiny_recipe: dict[str, Any], tmp_path: Path) -> None:
    plain = _run(tiny_recipe, tmp_path / "plain")
    silent = _run(tiny_recipe, tmp_path / "silent", noise, "noise_seed=5", "noise_layers=[1, 3]")
    assert _same(_tensors(plain), _tensors(silent))
    assert _rows(plain) == _rows(silent)


def test_std_and_its_square_as_variance_are_the_same_run(tiny_recipe: dict[str, Any], tmp_path: Path) -> None:
    std = _run(tiny_recipe, tmp_path / "std", "noise_std=0.5")
    variance = _run(tiny_recipe, tmp_path / "variance", "noise_variance=0.25")
    assert _same(_tensors(std), _tensors(variance))
    for run in (std, variance):
        assert (run.record["noise_std"], run.record["noise_variance"]) == (0.5, 0.25)


def test_scale_seed_layers_and_site_of_the_noise_all_count(tiny_recipe: dict[str, Any], tmp_path: Path) -> None:
    variants = [
        [],
        ["noise_std=0.3"],
        ["noise_seed=1"],
        ["noise_layers=[2]"],
        ["noise_layers=[2, 3]"],
        ["noise_site=mlp"],
    ]
    runs = [_run(tiny_recipe, tmp_path / str(index), "noise_std=0.2", *each) for index, each in enumerate(variants)]
    for index, first in enumerate(runs):
        for second in runs[index + 1 :]:
            assert not _same(_tensors(first), _tensors(second))


def test_the_noise_changes_neither_data_order_nor_steering(tiny_recipe: dict[str, Any], tmp_path: Path) -> None:
    runs = [_run(tiny_recipe, tmp_path / std, f"noise_std={std}") for std in ("0", "0.3")]
    steering = [load_file(run.path / "steering.safetensors") for run in runs]
    assert _same(*steering)
    assert [row["retain_reference_norm"] for row in runs[0].rows()] == [
        row["retain_reference_norm"] for row in runs[1].rows()
    ]


# --- killed and resumed

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
    return _two_topics(recipe, texts) if "two topics" in name else recipe


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
        _run(recipe, out)
    steps: list[int] = []
    resumed = _run(recipe, out, resume=True, report=lambda _candidate, row: steps.append(row["step"]))
    whole = _run(recipe, tmp_path / "whole")
    assert steps == [4, 5, 6, 7, 8]
    assert resumed.status == "finished"
    assert _same(_tensors(resumed), _tensors(whole))
    assert _rows(resumed) == _rows(whole)
    assert resumed.record["tokens"] == whole.record["tokens"]
    assert resumed.record["steering_scales"] == whole.record["steering_scales"]
    assert not resumed.checkpoint.exists()


def test_a_run_interrupted_before_its_first_checkpoint_starts_anew(tiny_recipe: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        _run(tiny_recipe, tmp_path / "run", report=_stop_at(2))
    assert open_run(tmp_path / "run").status == "stopped"
    resumed = _run(tiny_recipe, tmp_path / "run", resume=True)
    whole = _run(tiny_recipe, tmp_path / "whole")
    assert _same(_tensors(resumed), _tensors(whole))
    assert _rows(resumed) == _rows(whole)


@pytest.mark.parametrize("stop", [2, 5], ids=["before the first checkpoint", "after it"])
def test_a_metrics_line_cut_off_by_a_kill_is_dropped(stop: int, tiny_recipe: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        _run(tiny_recipe, tmp_path / "run", report=_stop_at(stop))
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')
    resumed = _run(tiny_recipe, tmp_path / "run", resume=True)
    assert _rows(resumed) == _rows(_run(tiny_recipe, tmp_path / "whole"))


def test_a_run_interrupted_twice_still_comes_out_the_same(tiny_recipe: dict[str, Any], tmp_path: Path) -> None:
    for step in (4, 7):
        with pytest.raises(KeyboardInterrupt):
            _run(tiny_recipe, tmp_path / "run", "noise_std=0.3", report=_stop_at(step), resume=step > 4)
    resumed = _run(tiny_recipe, tmp_path / "run", "noise_std=0.3", resume=True)
    assert _same(_tensors(resumed), _tensors(_run(tiny_recipe, tmp_path / "whole", "noise_std=0.3")))


def test_a_run_does_not_resume_on_other_texts(tiny_recipe: dict[str, Any], tmp_path: Path) -> None:
    forget = tmp_path / "forget.jsonl"
    original = Path(tiny_recipe["topics"]["spells"]["forget"]).read_text(encoding="utf-8")
    forget.write_text(original, encoding="utf-8")
    recipe = {**tiny_recipe, "topics": {"spells": {"forget": str(forget)}}, "checkpoint_every": 3, "log_every": 1}
    with pytest.raises(KeyboardInterrupt):
        unlearn(load_recipe(recipe), tmp_path / "run", report=_stop_at(5))
    forget.write_text("".join(original.splitlines(keepends=True)[1:]), encoding="utf-8")
    with pytest.raises(UserError, match="cannot resume: data_fingerprints"):
        unlearn(load_recipe(recipe), tmp_path / "run", resume=True)


def test_a_checkpoint_at_the_very_last_step_needs_no_further_step(tiny_recipe: dict[str, Any], tmp_path: Path) -> None:
    def fail(_candidate: Candidate, _row: dict[str, Any]) -> None:
        raise AssertionError("no step is left to take")

    trainer = _trainer(tiny_recipe, tmp_path / "run", "steps=6")
    (candidate,) = trainer.candidates
    for step in range(6):
        trainer.advance(step, [candidate])
    candidate.run.write_record("running")
    resumed = _run(tiny_recipe, tmp_path / "run", "steps=6", resume=True, report=fail)
    assert _same(_tensors(resumed), _tensors(_run(tiny_recipe, tmp_path / "whole", "steps=6")))


def test_resuming_where_nothing_is_begins_a_run(tiny_recipe: dict[str, Any], tmp_path: Path) -> None:
    assert _run(tiny_recipe, tmp_path / "run", resume=True).status == "finished"


# --- run folders


@pytest.mark.parametrize("resume", [False, True])
def test_a_finished_run_is_left_alone(resume: bool, tiny_recipe: dict[str, Any], tmp_path: Path) -> None:
    run = _run(tiny_recipe, tmp_path / "run")
    before = {each.name: (each.stat().st_mtime_ns, each.read_bytes()) for each in run.path.iterdir()}
    again = _run(tiny_recipe, tmp_path / "run", resume=resume)
    assert again.status == "finished"
    assert {each.name: (each.stat().st_mtime_ns, each.read_bytes()) for each in run.path.iterdir()} == before


def test_a_folder_of_another_recipe_is_refused_with_the_fields_that_differ(
    tiny_recipe: dict[str, Any], tmp_path: Path
) -> None:
    _run(tiny_recipe, tmp_path / "run", "steps=3")
    with pytest.raises(UserError) as caught:
        _run(tiny_recipe, tmp_path / "run", "steps=4", "noise_std=0.1", resume=True)
    message = str(caught.value)
    assert "another recipe" in message
    assert "steps (3 there)" in message
    assert "noise_std (None there)" in message
    assert "learning_rate" not in message


def test_a_folder_of_something_else_is_refused(tiny_recipe: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="not empty and holds no run"):
        _run(tiny_recipe, tmp_path)
    with pytest.raises(UserError, match="is a file"):
        _run(tiny_recipe, tmp_path / "notes.txt")
    assert [each.name for each in tmp_path.iterdir()] == ["notes.txt"]


def test_an_empty_folder_may_hold_a_run(tiny_recipe: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    assert _run(tiny_recipe, tmp_path / "run", "steps=1").status == "finished"


def test_a_run_leaves_no_temporary_file(tiny_recipe: dict[str, Any], tmp_path: Path) -> None:
    run = _run(tiny_recipe, tmp_path / "run", "snapshots=[2]")
    assert not list(run.path.rglob(".*"))


def test_the_model_card_says_what_was_done(tiny_recipe: dict[str, Any], tmp_path: Path) -> None:
    card = (_run(tiny_recipe, tmp_path / "run", "noise_std=0.25").path / "README.md").read_text()
    for each in (
        "RMU",
        "noise_std 0.25 (variance 0.0625)",
        "spells",
        "`mlp.down_proj` of layers 1, 2, 3",
        "@",
    ):
        assert each in card
    assert "no RNA" in (_run(tiny_recipe, tmp_path / "plain").path / "README.md").read_text()


# --- failing


def _blow_up_at(step: int) -> Report:
    """From `step` on the learning rate is so large that the next update leaves nothing finite."""

    def report(candidate: Candidate, row: dict[str, Any]) -> None:
        if row["step"] == step:
            candidate.optimiser.param_groups[0]["lr"] = 1e30

    return report


def test_a_loss_that_is_not_finite_ends_the_run_as_failed(tiny_recipe: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"step 7, topic spells: the loss is not finite.*learning_rate"):
        _run(tiny_recipe, tmp_path / "run", report=_blow_up_at(5))
    run = open_run(tmp_path / "run")
    assert run.status == "failed"
    assert "step 7" in run.record["error"]
    assert [row["step"] for row in run.rows()] == [1, 2, 3, 4, 5, 6]
    assert not (run.path / "delta.safetensors").exists()


def test_the_checkpoint_before_a_loss_that_is_not_finite_is_kept(tiny_recipe: dict[str, Any], tmp_path: Path) -> None:
    kept: list[bytes] = []
    blow_up = _blow_up_at(5)

    def report(candidate: Candidate, row: dict[str, Any]) -> None:
        if row["step"] == 5:
            kept.append(candidate.run.checkpoint.read_bytes())  # of step 4
        blow_up(candidate, row)

    overrides = ["checkpoint_every=4", "noise_std=0.2"]
    with pytest.raises(UserError, match="not finite"):
        _run(tiny_recipe, tmp_path / "run", *overrides, report=report)
    assert open_run(tmp_path / "run").checkpoint.read_bytes() == kept[0]
    resumed = _run(tiny_recipe, tmp_path / "run", *overrides, resume=True)
    whole = _run(tiny_recipe, tmp_path / "whole", *overrides)
    assert _same(_tensors(resumed), _tensors(whole))
    assert _rows(resumed) == _rows(whole)
    assert "error" not in resumed.record


def test_a_failure_leaves_the_weights_of_the_last_step(tiny_recipe: dict[str, Any], tmp_path: Path) -> None:
    trainer = _trainer(tiny_recipe, tmp_path / "run")
    (candidate,) = trainer.candidates
    candidate.forget.steering["spells"].scale = float("inf")
    before = [master.detach().clone() for master in candidate.masters.values()]
    with pytest.raises(UserError, match="steering_scale"):
        take_step(candidate, trainer.batches(0))
    assert candidate.step == 0
    assert all(map(torch.equal, candidate.masters.values(), before))


# --- several candidates in lockstep

THREE: dict[str, dict[str, Any]] = {
    "rmu": {},
    "rna": {"noise_std": 0.3, "noise_layers": [2], "noise_seed": 4, "steps": 5, "learning_rate": 3e-3},
    "rsv": {"method": "rsv", "steering_scale": 2, "checkpoint_every": 2, "snapshots": [4]},
}


def _three(tiny_recipe: dict[str, Any], out: Path, resume: bool = False) -> list[RunFolder]:
    base = {**tiny_recipe, "log_every": 1, "checkpoint_every": 3}
    recipes = {name: load_recipe({**base, **changes}) for name, changes in THREE.items()}
    return [RunFolder.open(out / name, recipe, resume=resume) for name, recipe in recipes.items()]


def test_candidates_in_lockstep_are_each_as_if_alone(tiny_recipe: dict[str, Any], tmp_path: Path) -> None:
    together = _three(tiny_recipe, tmp_path / "together")
    Trainer(together).train()
    for run in together:
        alone = unlearn(run.recipe, tmp_path / run.path.name)
        assert run.status == alone.status == "finished"
        assert _same(_tensors(run), _tensors(alone))
        assert _rows(run) == _rows(alone)
    assert _same(
        load_delta(together[2].snapshot(4)).tensors,
        load_delta(tmp_path / "rsv" / "snapshots" / "step-4.safetensors").tensors,
    )


def test_candidates_in_lockstep_resume_each_from_its_own_checkpoint(
    tiny_recipe: dict[str, Any], tmp_path: Path
) -> None:
    def report(candidate: Candidate, row: dict[str, Any]) -> None:
        if candidate.recipe.method == "rsv" and row["step"] == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Trainer(_three(tiny_recipe, tmp_path / "together")).train(report)
    resumed = _three(tiny_recipe, tmp_path / "together", resume=True)
    assert all(run.checkpoint.exists() for run in resumed)
    Trainer(resumed).train()
    for run in resumed:
        alone = unlearn(run.recipe, tmp_path / run.path.name)
        assert _same(_tensors(run), _tensors(alone))
        assert _rows(run) == _rows(alone)


def test_a_failing_candidate_leaves_no_run_marked_as_running(tiny_recipe: dict[str, Any], tmp_path: Path) -> None:
    runs = _three(tiny_recipe, tmp_path)
    trainer = Trainer(runs)
    trainer.candidates[1].optimiser.param_groups[0]["lr"] = 1e30
    with pytest.raises(UserError, match="not finite"):
        trainer.train()
    assert runs[1].status == "failed"
    assert {runs[0].status, runs[2].status} <= {"finished", "stopped"}


@pytest.mark.parametrize("override", ["seed=1", "batch_size=3", "layer=4", "topics.spells.max_tokens=9"])
def test_candidates_that_share_no_batches_are_refused_with_the_fields(
    override: str, tiny_recipe: dict[str, Any], tmp_path: Path
) -> None:
    runs = [
        RunFolder.open(tmp_path / str(index), load_recipe(tiny_recipe, changes))
        for index, changes in enumerate([[], [override]])
    ]
    with pytest.raises(
        UserError, match=f"cannot be trained in lockstep.*differs in {override.split('.')[0].split('=')[0]}"
    ):
        Trainer(runs)


# --- topics


def test_two_topics_take_turns_with_steering_of_their_own(
    tiny_recipe: dict[str, Any], texts: dict[str, Path], tmp_path: Path
) -> None:
    run = _run(_two_topics(tiny_recipe, texts), tmp_path / "run", "topics.potions.steering_scale=9")
    assert [row["topic"] for row in run.rows()] == ["spells", "potions"] * 4
    steering = load_file(run.path / "steering.safetensors")
    assert set(steering) == {"spells", "potions"}
    assert not torch.allclose(steering["spells"], steering["potions"])
    assert run.record["steering_scales"] == {"spells": 5, "potions": 9}
    fingerprints = run.record["data_fingerprints"]
    assert fingerprints["spells"]["forget"] != fingerprints["potions"]["forget"]
    assert fingerprints["spells"]["retain"] == fingerprints["potions"]["retain"]


def test_a_topics_own_norm_is_kept_from_its_own_first_batch(
    tiny_recipe: dict[str, Any], texts: dict[str, Path], tmp_path: Path
) -> None:
    recipe = {**_two_topics(tiny_recipe, texts), **CASES["adaptive rmu, first batch"]}
    trainer = _trainer(recipe, tmp_path / "run")
    (candidate,) = trainer.candidates
    trainer.train()
    for topic in recipe["topics"]:
        batch = trainer.corpora[topic, "forget"].batch(0)
        hidden = trainer.engine.reference(trainer.engine.trunk(batch)).numpy()
        rows = [
            np.linalg.norm(row[keep == 1], axis=-1).mean() for row, keep in zip(hidden, batch.mask.numpy(), strict=True)
        ]
        assert candidate.forget.steering[topic].frozen_norm.item() == pytest.approx(np.mean(rows), rel=1e-5)


def test_a_topics_own_weights_and_lengths_are_used(
    tiny_recipe: dict[str, Any], texts: dict[str, Path], tmp_path: Path
) -> None:
    recipe = _two_topics(tiny_recipe, texts)
    recipe["topics"]["potions"] |= {"retain_weight": 3, "forget_weight": 0.25, "max_tokens": 6}
    trainer = _trainer(recipe, tmp_path / "run")
    widths = {topic: max(map(len, trainer.corpora[topic, "forget"].rows)) for topic in recipe["topics"]}
    assert widths == {"spells": 24, "potions": 6}
    trainer.train()
    for row in trainer.runs[0].rows():
        forget, retain = (0.25, 3) if row["topic"] == "potions" else (1, 10)
        assert row["loss"] == pytest.approx(forget * row["forget_loss"] + retain * row["retain_loss"], rel=1e-5)


def test_a_topic_may_bring_its_own_retain_text(
    tiny_recipe: dict[str, Any], texts: dict[str, Path], tmp_path: Path
) -> None:
    recipe = _two_topics(tiny_recipe, texts)
    recipe["topics"]["potions"]["retain"] = str(texts["forget"])
    record = _run(recipe, tmp_path / "run", "steps=2").record["data_fingerprints"]
    assert record["potions"]["retain"] == record["spells"]["forget"]


# --- precision and snapshots


def test_updates_too_small_for_bfloat16_add_up_in_the_masters(
    tiny_recipe: dict[str, Any], tiny_model: Path, tmp_path: Path
) -> None:
    import shutil

    from transformers import AutoModelForCausalLM

    folder = tmp_path / "half"
    AutoModelForCausalLM.from_pretrained(tiny_model).to(torch.bfloat16).save_pretrained(folder)
    for each in tiny_model.glob("tokenizer*"):
        shutil.copy(each, folder)
    trainer = _trainer({**tiny_recipe, "model": str(folder)}, tmp_path / "run", "learning_rate=1e-4")
    (candidate,) = trainer.candidates
    base = {key: value.detach().clone() for key, value in trainer.trained.items()}
    assert {value.dtype for value in base.values()} == {torch.bfloat16}
    assert {master.dtype for master in candidate.masters.values()} == {torch.float32}
    take_step(candidate, trainer.batches(0))
    swallowed = {key: master.to(torch.bfloat16) == base[key] for key, master in candidate.masters.items()}
    for key, master in candidate.masters.items():
        assert swallowed[key].any()
        assert (master[swallowed[key]] != base[key].float()[swallowed[key]]).float().mean() > 0.9
    for step in range(1, 12):
        take_step(candidate, trainer.batches(step))
    tensors = trainer.delta(candidate).tensors
    for key, keep in swallowed.items():
        changed = tensors[trainer.keys[key]] != base[key]
        assert tensors[trainer.keys[key]].dtype == torch.bfloat16
        assert (changed & keep).any()


def test_the_forward_pass_sees_the_masters_in_the_models_type(tiny_recipe: dict[str, Any], tmp_path: Path) -> None:
    trainer = _trainer(tiny_recipe, tmp_path / "run", "dtype=bfloat16")
    (candidate,) = trainer.candidates
    weights = band_weights(candidate)
    assert {value.dtype for named in weights.values() for value in named.values()} == {torch.bfloat16}
    losses = step_losses(candidate, trainer.batches(0))
    assert losses.retain.hidden.dtype == torch.bfloat16
    assert losses.retain.loss.item() == 0


def test_snapshots_are_the_deltas_of_shorter_runs(tiny_recipe: dict[str, Any], tmp_path: Path) -> None:
    run = _run(tiny_recipe, tmp_path / "run", "snapshots=[3, 5, 8]", "noise_std=0.3")
    for step in (3, 5, 8):
        shorter = _run(tiny_recipe, tmp_path / str(step), f"steps={step}", "noise_std=0.3")
        snapshot = load_delta(run.snapshot(step))
        assert _same(snapshot.tensors, _tensors(shorter))
        assert snapshot.provenance["step"] == step
    assert sorted(each.name for each in (run.path / "snapshots").iterdir()) == [
        f"step-{step}.safetensors" for step in (3, 5, 8)
    ]


def test_how_often_is_logged_or_saved_changes_nothing_else(tiny_recipe: dict[str, Any], tmp_path: Path) -> None:
    often = _run(tiny_recipe, tmp_path / "often", "noise_std=0.3", "checkpoint_every=1", "snapshots=[1, 2]")
    rarely = _run(tiny_recipe, tmp_path / "rarely", "noise_std=0.3", "log_every=5", "checkpoint_every=100")
    assert _same(_tensors(often), _tensors(rarely))
    assert [row["step"] for row in rarely.rows()] == [5, 8]
    assert _rows(rarely) == [row for row in _rows(often) if row["step"] in (5, 8)]

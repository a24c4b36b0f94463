"""Several candidates in lockstep: each as if alone, to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from training_runs import rows_of, same, tensors_of

from robust_unlearning import UserError, load_recipe, unlearn
from robust_unlearning.run.delta import load_delta
from robust_unlearning.run.folder import RunFolder
from robust_unlearning.train.candidate import Candidate
from robust_unlearning.train.trainer import Trainer

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
        assert same(tensors_of(run), tensors_of(alone))
        assert rows_of(run) == rows_of(alone)
    assert same(
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
        assert same(tensors_of(run), tensors_of(alone))
        assert rows_of(run) == rows_of(alone)


def test_a_failing_candidate_leaves_no_run_marked_as_running(tiny_recipe: dict[str, Any], tmp_path: Path) -> None:
    runs = _three(tiny_recipe, tmp_path)
    trainer = Trainer(runs)
    trainer.candidates[1].optimiser.param_groups[0]["lr"] = 1e30
    with pytest.raises(UserError, match="not finite"):
        trainer.train()
    assert runs[1].status == "failed"
    assert {runs[0].status, runs[2].status} <= {"finished", "stopped"}


@pytest.mark.unit
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

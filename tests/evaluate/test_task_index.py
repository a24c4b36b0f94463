"""Tasks of lm-evaluation-harness and of this package by name."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import yaml

from robust_unlearning.cli import main
from robust_unlearning.errors import UserError
from robust_unlearning.evaluate.harness import Harness
from robust_unlearning.evaluate.task_index import _lm_eval_index, shipped_groups, shipped_tasks, task_manager


@pytest.mark.integration
def test_groups_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    index = task_manager().task_index
    for path in shipped_tasks().glob("*.yaml"):
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
        assert path.stem == config.get("group") or path.stem == config["task"]
        for member in config["task"] if "group" in config else ():
            assert member in index, (path.name, member)
    assert main.main(["list", "tasks"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in [*shipped_groups(), "demo", "planted"])


@pytest.mark.integration
def test_index_is_lm_evals_own() -> None:
    import lm_eval.tasks
    from lm_eval.tasks import TaskManager

    ours = _lm_eval_index()
    for part in ("mmlu/continuation", "wmdp", "arc", "glue"):  # all of it takes lm-eval ten seconds and more
        folder = Path(lm_eval.tasks.__file__).parent / part
        for name, entry in TaskManager(include_defaults=False, include_path=str(folder)).task_index.items():
            assert (ours[name].kind, ours[name].yaml_path) == (entry.kind, entry.yaml_path)
            assert entry.tags <= ours[name].tags


def test_lm_eval_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)  # impossible to import
    with pytest.raises(UserError, match=r"robust-unlearning\[eval\]"):
        Harness(("mmlu",)).loaded  # noqa: B018

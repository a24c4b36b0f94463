"""Running a target: stage after stage, each finished one kept under the content hash of what it depends on.

| in the folder | what |
|---|---|
| `plan.json` | what was to be run, and the estimate |
| `runs/` | run folders of all stages, shared |
| `base/` | scores of the base model |
| `stages/NAME/stage.json` | status, hash, seconds, and the error of a stage that failed |
| `stages/NAME/result.json` | what a finished stage found; an analysis has its own tables in `analysis/` |
| `report.html`, `reproduce.json`, `figures/` | the report, written after the main stage and at the end |
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from robust_unlearning import __version__, files
from robust_unlearning.errors import UserError
from robust_unlearning.reproduce.analyses import analyse
from robust_unlearning.reproduce.grid import choose_noise, run_grid, suites_of
from robust_unlearning.reproduce.results import Grid, folder_of
from robust_unlearning.reproduce.target import TRAINING, Stage, Target, main_name, points_of

STATE, RESULT = "stage.json", "result.json"
Say = Callable[[str], None]
Status = Literal["finished", "failed", "stopped", "waiting"]


@dataclass
class StageResults:
    """What stages have found so far.

    Attributes:
        grids: of stages that trained something.
        analyses: numbers of the others.
        chosen: recipe -> scale of the noise chosen for it on validation questions.
        states: stage -> what its `stage.json` says; `status` is there always.
    """

    grids: dict[str, Grid] = field(default_factory=dict)
    analyses: dict[str, dict[str, Any]] = field(default_factory=dict)
    chosen: dict[str, float] = field(default_factory=dict)
    states: dict[str, dict[str, Any]] = field(default_factory=dict)


def key_of(target: Target, stage: Stage) -> str:
    """Content hash of what a stage's result depends on: settings, recipes, questions, and this package's version.

    An analysis depends on the main stage too. Titles and the like play no part.
    """
    says = stage.model_dump(mode="json", exclude={"title", "stands_for", "command", "reduced", "grids", "seeds"})
    recipes = sorted(point.recipe.content_hash() for point in points_of(target, stage))
    suites = [suite.fingerprint() if suite else None for suite in suites_of(target)]
    shared = [target.roles.model_dump(mode="json"), target.rule, target.limit]
    main = None if stage.kind in TRAINING else key_of(target, target.stages[main_name(target)])
    text = json.dumps([says, recipes, suites, shared, main, __version__], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def state_of(target: Target, name: str, out: Path) -> dict[str, Any]:
    """What is known of a stage; a result of other settings counts as none."""
    path = folder_of(out, name) / STATE
    state = files.read_json(path) if path.exists() else {}
    return state if state.get("key") == key_of(target, target.stages[name]) else {"status": "waiting"}


def read(target: Target, out: Path) -> StageResults:
    """The results that are there, of these settings."""
    results = StageResults()
    for name in target.stages:
        results.states[name] = state_of(target, name, out)
        if results.states[name]["status"] == "finished":
            _take(target, name, files.read_json(folder_of(out, name) / RESULT), results)
    return results


def _take(target: Target, name: str, result: Mapping[str, Any], results: StageResults) -> None:
    stage = target.stages[name]
    if stage.kind not in TRAINING:
        results.analyses[name] = dict(result)
        return
    results.grids[name] = Grid.from_json(result)
    if stage.kind == "main":
        results.chosen = choose_noise(target, results.grids[name])


def run(
    target: Target, stages: Mapping[str, Stage], out: Path, say: Say, after: Callable[[StageResults], None]
) -> StageResults:
    """Run what is not finished of `stages`; a stage that fails is kept with its error and the others go on.

    Args:
        after: called after the main stage, with what is known then: what follows may take long.
    """
    results = read(target, out)
    for number, (name, stage) in enumerate(stages.items(), 1):
        head = f"stage {number} of {len(stages)}, {name} ({stage.stands_for})"
        if results.states[name]["status"] == "finished":
            say(f"{head}: finished before")
            continue
        say(f"{head}: {stage.title}")
        if results.states[name]["status"] == "waiting" and (folder_of(out, name) / STATE).exists():
            say(f"  {out} holds this stage with other settings; its result and the report are replaced, its runs kept")
        results.states[name] = _run_one(target, name, out, say, results)
        if results.states[name]["status"] == "failed":
            say(f"  failed: {results.states[name]['error']}")
        if stage.kind == "main":
            after(results)
    return results


def _run_one(target: Target, name: str, out: Path, say: Say, results: StageResults) -> dict[str, Any]:
    stage, folder = target.stages[name], folder_of(out, name)
    state: dict[str, Any] = {"key": key_of(target, stage), "kind": stage.kind, "title": stage.title}
    began = time.perf_counter()

    def written(status: Status, **more: Any) -> dict[str, Any]:
        own = {**state, "status": status, "seconds": round(time.perf_counter() - began, 1), **more}
        files.write_json(folder / STATE, own)
        return own

    try:
        if stage.kind in TRAINING:
            result = run_grid(target, stage, out, say).as_json()
        else:
            grid = results.grids.get(main_name(target))
            if grid is None:
                raise UserError(
                    f"it looks at the models of {main_name(target)!r}, which is not finished: run that stage first."
                )
            result = analyse(target, stage, grid, results.chosen, out, folder, say)
        files.write_json(folder / RESULT, result)
        state = written("finished")
        _take(target, name, result, results)
    except KeyboardInterrupt:
        written("stopped")
        raise
    except (UserError, OSError, RuntimeError) as error:  # one stage's, such as a full disk; the others may do well
        return written("failed", error=f"{error}")
    return state

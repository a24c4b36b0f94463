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
from robust_unlearning.experiments.runner import Say
from robust_unlearning.reproduce.analyses import analyse
from robust_unlearning.reproduce.grid import Grid, choose_noise, run_grid, suites_of
from robust_unlearning.reproduce.target import TRAINING, Stage, Target, folder_of, main_name, points_of

STATE, RESULT = "stage.json", "result.json"
Status = Literal["finished", "failed", "stopped", "waiting"]


@dataclass
class Results:
    """What stages have come to so far.

    Attributes:
        grids: of stages that trained something.
        analyses: numbers of the others.
        chosen: recipe -> scale of the noise chosen for it on validation questions.
        unchosen: recipe -> why none was chosen: no scale kept the rule's bounds.
        states: stage -> what its `stage.json` says; `status` is there always.
    """

    grids: dict[str, Grid] = field(default_factory=dict)
    analyses: dict[str, dict[str, Any]] = field(default_factory=dict)
    chosen: dict[str, float] = field(default_factory=dict)
    unchosen: dict[str, str] = field(default_factory=dict)
    states: dict[str, dict[str, Any]] = field(default_factory=dict)

    def take(self, target: Target, name: str, result: Mapping[str, Any]) -> None:
        """Add the result of a finished stage."""
        stage = target.stages[name]
        if stage.kind not in TRAINING:
            self.analyses[name] = dict(result)
            return
        self.grids[name] = Grid.from_json(result)
        if stage.kind == "main":
            choice = choose_noise(target, self.grids[name])
            self.chosen, self.unchosen = dict(choice.scales), dict(choice.unkept)


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


def read(target: Target, out: Path) -> Results:
    """The results that are there, of these settings."""
    results = Results()
    for name in target.stages:
        results.states[name] = state_of(target, name, out)
        if results.states[name]["status"] == "finished":
            results.take(target, name, files.read_json(folder_of(out, name) / RESULT))
    return results


def run(target: Target, stages: Mapping[str, Stage], out: Path, say: Say, after: Callable[[Results], None]) -> Results:
    """Run what is not finished of `stages`; a stage that fails is kept with its error and the others go on.

    Args:
        after: called after the main stage, with what is known then: what follows may take long.
    """
    results = read(target, out)
    for number, (name, stage) in enumerate(stages.items(), 1):
        head = f"stage {number} of {len(stages)}, {name} ({stage.stands_for})"
        status = results.states[name]["status"]
        if status == "finished":
            say(f"{head}: finished before")
            continue
        say(f"{head}: {stage.title}")
        if status == "waiting" and (folder_of(out, name) / STATE).exists():
            say(f"  {out} holds this stage with other settings; its result and the report are replaced, its runs kept")
        _run_one(target, name, out, say, results)
        if results.states[name]["status"] == "failed":
            say(f"  failed: {results.states[name]['error']}")
        if stage.kind == "main":
            after(results)
    return results


def _run_one(target: Target, name: str, out: Path, say: Say, results: Results) -> None:
    stage, folder, began = target.stages[name], folder_of(out, name), time.perf_counter()

    def write_state(status: Status, **more: Any) -> None:
        about = {"key": key_of(target, stage), "kind": stage.kind, "title": stage.title, "status": status}
        results.states[name] = {**about, "seconds": round(time.perf_counter() - began, 1), **more}
        files.write_json(folder / STATE, results.states[name])

    try:
        if stage.kind in TRAINING:
            result = run_grid(target, stage, out, say).as_json()
        elif grid := results.grids.get(main_name(target)):
            result = analyse(target, stage, grid, results.chosen, out, folder, say)
        else:
            main = main_name(target)
            raise UserError(f"it looks at the models of {main!r}, which is not finished: run that stage first.")
        files.write_json(folder / RESULT, result)
        results.take(target, name, result)
        write_state("finished")
    except KeyboardInterrupt:
        write_state("stopped")
        raise
    except (UserError, OSError, RuntimeError) as error:  # one stage's, such as a full disk; the others may do well
        write_state("failed", error=f"{error}")

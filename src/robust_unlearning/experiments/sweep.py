"""`unlearn sweep`: expand, train side by side, score over one loaded base, choose, show; continued if killed.

| in the sweep's folder | what |
|---|---|
| `sweep.json` | the index: every point with fields, status, folder and scores; the rule and what it chose |
| `sweep.md`, `sweep.png`, `sweep-curve.png` | the trade-off for people; figures also as `.svg`, numbers as `.csv` |
| `runs/POINT/`, `base/…/` | see `runner.py` |
| `failed/POINT/` | runs that failed, with `error.txt` |

A point is a recipe with its fields, known by the recipe's content hash; its run folder is all that stages share.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from robust_unlearning import files
from robust_unlearning.errors import UserError
from robust_unlearning.evaluate.harness import TaskSet, load_task_sets
from robust_unlearning.experiments.answers import Answers, answers_of
from robust_unlearning.experiments.grid import Point, Sweep
from robust_unlearning.experiments.rule import DEFAULT_RULE, Rule, parse_rule
from robust_unlearning.experiments.runner import Runner, Say, say_aloud
from robust_unlearning.run.folder import RunFolder

OWN_VALIDATION = {"planted": "planted-validation", "planted-texts": "planted-texts-validation"}
"""Suites that come with a validation split."""
INDEX, ERROR = "sweep.json", "error.txt"


@dataclass(frozen=True)
class SweepResult:
    """A finished sweep, or one on its way.

    Attributes:
        runner: its points, their answers by suite, and which failed.
        tasks, validation: names of the suites, None where there is none.
        rule: of the choice; None where there is no validation suite.
    """

    runner: Runner[Answers]
    tasks: str | None
    validation: str | None
    rule: Rule | None

    @property
    def failed(self) -> Mapping[str, str]:
        """Point name -> why it has no model."""
        return self.runner.failed

    def answers(self, point: Point) -> dict[str, Answers] | None:
        """A point's answers by suite; None where it has no model."""
        return self.runner.models.get((point.name, point.recipe.steps))


def run_sweep(
    sweep: Sweep,
    points: list[Point],
    out: Path,
    at_once: int | None = None,
    say: Say = say_aloud,
    settings: Mapping[str, Any] | None = None,
) -> SweepResult:
    """Train and score what is not there yet in `out`, and read all of it. Nothing is trained before the suites, the
    rule and the base models' scores are known to be in order.

    Args:
        settings: how much is asked, and where tasks of lm-evaluation-harness lie; see `harness.load_task_sets`.

    Raises:
        UserError: a suite or the rule is wrong, or not one point could be trained.
    """
    validation = sweep.validation or OWN_VALIDATION.get(sweep.tasks or "")
    suites = {name: _task_set(name, settings or {}) for name in (validation, sweep.tasks) if name}
    _require_apart(validation, sweep.tasks, suites)
    rule = parse_rule(sweep.select or DEFAULT_RULE) if validation else None
    if sweep.select and not validation:
        raise UserError(f"--select {sweep.select!r} needs questions to choose on: add --validation SUITE.")
    patterns = {"forget": sweep.forget, "retain": sweep.retain, "perturbed": sweep.perturbed}
    read = partial(answers_of, patterns=patterns)
    runner = Runner(points, suites, out, read, own=sweep.tasks, at_once=at_once, say=say)
    result = SweepResult(runner, sweep.tasks, validation, rule)
    runner.score_bases()
    for point in points:
        apart = RunFolder(out / "failed" / point.name, point.recipe)
        if apart.status == "failed":  # its loss would be as it was
            runner.failed[point.name] = apart.record["error"]
    write_index(result)
    runner.train()
    _put_apart(runner)
    write_index(result)
    runner.score_models()
    write_index(result)
    return result


def _task_set(name: str, settings: Mapping[str, Any]) -> TaskSet:
    """A suite, or tasks of lm-evaluation-harness."""
    task_sets = load_task_sets(name, **settings)
    if len(task_sets) != 1:
        raise UserError(f"a sweep is scored on one suite, or on tasks of lm-evaluation-harness; {name!r} names both.")
    return next(iter(task_sets.values()))


def _require_apart(validation: str | None, tasks: str | None, suites: Mapping[str, TaskSet]) -> None:
    """Refuse suites that share a question: a choice made on it would flatter what is reported."""
    if not validation or not tasks:
        return
    if shared := suites[validation].question_texts() & suites[tasks].question_texts():
        raise UserError(
            f"{len(shared)} questions are both in --validation {validation} and in --tasks {tasks} (one is "
            f"{min(shared)[0][:60]!r}). What a point is chosen on must not be what is reported: split them."
        )


def _put_apart(runner: Runner[Answers]) -> None:
    """Move runs that failed into `failed/`; one that is finished is no longer there."""
    apart = runner.out / "failed"
    for point in runner.points:
        path, place = runner.folder(point), apart / point.name
        if point.name not in runner.failed or path.exists():
            shutil.rmtree(place, ignore_errors=True)  # of an earlier start
        if point.name in runner.failed and path.exists():
            apart.mkdir(exist_ok=True)
            path.rename(place)
            files.write_text(place / ERROR, runner.failed[point.name] + "\n")
    if runner.failed:
        runner.say(f"{len(runner.failed)} points failed; {apart} says why. Remove a folder there to try it again.")


def write_index(result: SweepResult, **more: Any) -> None:
    """Write `sweep.json`: what is known of every point so far, and `more`."""

    def means(answers: Mapping[str, Answers]) -> dict[str, dict[str, float]]:
        return {suite: own.means() for suite, own in answers.items()}

    runner = result.runner
    rows = []
    for point in runner.points:
        apart = runner.out / "failed" / point.name
        run = RunFolder(apart if apart.exists() else runner.folder(point), point.recipe)
        row: dict[str, Any] = {
            "name": point.name,
            "recipe": point.source,
            "fields": dict(point.fields),
            "recipe_hash": point.recipe.content_hash(),
            "status": "failed" if point.name in runner.failed else run.status or "waiting",
            "folder": str(run.path.relative_to(runner.out)),
        }
        if point.name in runner.failed:
            row["error"] = runner.failed[point.name]
        if answers := result.answers(point):
            row["scores"] = means(answers)
        rows.append(row)
    about = {
        "tasks": result.tasks,
        "validation": result.validation,
        "rule": result.rule.text if result.rule else None,
        "bases": {base: means(answers) for base, answers in runner.bases.items()},
    }
    files.write_json(runner.out / INDEX, {**about, **more, "points": rows})

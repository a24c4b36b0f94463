"""`unlearn sweep`: expand, train side by side, score over one loaded base, choose, show; continued if killed.

| in the sweep's folder | what |
|---|---|
| `sweep.json` | the index: every point with fields, status, folder and scores; the rule and what it chose |
| `sweep.md`, `sweep.png`, `sweep-curve.png` | the trade-off for people; figures also as `.svg`, numbers as `.csv` |
| `runs/POINT/` | run folders; a finished one is never trained again |
| `failed/POINT/` | runs that failed, with `error.txt` |
| `base/…/` | scores of the models as they were |

A point is a recipe with its fields, known by the recipe's content hash; its run folder is all that stages share.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from robust_unlearning import files
from robust_unlearning.errors import UserError
from robust_unlearning.evaluate.evaluator import Evaluator, open_target
from robust_unlearning.evaluate.harness import TaskSet, load_task_sets
from robust_unlearning.experiments.grid import Point, Sweep
from robust_unlearning.experiments.selection import DEFAULT_RULE, Answers, Rule, answers_of, parse_rule
from robust_unlearning.experiments.side_by_side import Say, train_all
from robust_unlearning.recipe import Recipe
from robust_unlearning.run.folder import RunFolder
from robust_unlearning.train.progress import EvaluationProgress

OWN_VALIDATION = {"planted": "planted-validation", "planted-texts": "planted-texts-validation"}
"""Suites that come with a validation split."""
INDEX, ERROR = "sweep.json", "error.txt"
Patterns = Mapping[str, Sequence[str]]
"""Role -> patterns of its tasks' names."""
Scores = dict[str, Answers]
"""A model's answers by suite."""


@dataclass
class Result:
    """A finished sweep.

    Attributes:
        points: in order of the grids.
        scores: by point name; a point that failed has none.
        bases: by model and type of the forward pass, see `base_of`.
        failed: point name -> why.
        tasks, validation: names of the suites, None where there is none.
        rule: of the choice; None where there is no validation suite.
    """

    points: list[Point]
    scores: dict[str, Scores]
    bases: dict[str, Scores]
    failed: dict[str, str]
    tasks: str | None
    validation: str | None
    rule: Rule | None


def base_of(recipe: Recipe) -> str:
    """What the scores of a recipe's base model are kept under."""
    digest = hashlib.sha256(repr((recipe.model, recipe.dtype)).encode()).hexdigest()[:8]
    return f"{Path(recipe.model).name}-{digest}"


def run_sweep(
    sweep: Sweep,
    points: list[Point],
    out: Path,
    at_once: int | None = None,
    say: Say = print,
    settings: Mapping[str, Any] | None = None,
) -> Result:
    """Train and score what is not there yet in `out`, and read all of it. Nothing is trained before the suites, the
    rule and the base models' scores are known to be in order.

    Args:
        settings: how much is asked, and where tasks of lm-evaluation-harness lie; see `harness.load_task_sets`.

    Raises:
        UserError: a suite or the rule is wrong, or not one point could be trained.
    """
    validation = sweep.validation or OWN_VALIDATION.get(sweep.tasks or "")
    suites = {name: _plan(name, settings or {}) for name in (validation, sweep.tasks) if name}
    _require_apart(validation, sweep.tasks, suites)
    rule = parse_rule(sweep.select or DEFAULT_RULE) if validation else None
    if sweep.select and not validation:
        raise UserError(f"--select {sweep.select!r} needs questions to choose on: add --validation SUITE.")
    patterns = {"forget": sweep.forget, "retain": sweep.retain, "perturbed": sweep.perturbed}
    found = Result(points, {}, {}, {}, sweep.tasks, validation, rule)
    if suites:
        say(f"scoring the base on {' and '.join(suites)}")
        _score(found, suites, patterns, out, [])
    runs = _train(found, out, at_once, say)
    if not runs:
        name, why = next(iter(found.failed.items()))
        raise UserError(f"all {len(points)} points failed, {name} for instance: {why}")
    if suites:
        say(f"scoring {len(runs)} points over one loaded base")
        _score(found, suites, patterns, out, [point for point in points if point.name in runs])
    write_index(found, out)
    return found


def _plan(name: str, settings: Mapping[str, Any]) -> TaskSet:
    """A suite, or tasks of lm-evaluation-harness."""
    plans = load_task_sets(name, **settings)
    if len(plans) != 1:
        raise UserError(f"a sweep is scored on one suite, or on tasks of lm-evaluation-harness; {name!r} names both.")
    return next(iter(plans.values()))


def _require_apart(validation: str | None, tasks: str | None, suites: Mapping[str, TaskSet]) -> None:
    """Refuse suites that share a question: a choice made on it would flatter what is reported."""
    if not validation or not tasks:
        return
    if shared := suites[validation].question_texts() & suites[tasks].question_texts():
        raise UserError(
            f"{len(shared)} questions are both in --validation {validation} and in --tasks {tasks} (one is "
            f"{min(shared)[0][:60]!r}). What a point is chosen on must not be what is reported: split them."
        )


def _train(found: Result, out: Path, at_once: int | None, say: Say) -> set[str]:
    """Train the points; failed ones are put apart. Returns the names of the finished ones."""
    runs: dict[str, RunFolder] = {}
    for point in found.points:
        apart = RunFolder(out / "failed" / point.name, point.recipe)
        if apart.status == "failed":  # its loss would be as it was
            found.failed[point.name] = apart.record["error"]
        else:
            runs[point.name] = RunFolder.open(out / "runs" / point.name, point.recipe, resume=True)
    there = sum(run.status == "finished" for run in runs.values())
    say(f"{len(found.points)} points: {there} trained before, {len(found.failed)} failed before")
    write_index(found, out)
    errors = train_all(list(runs.values()), at_once, say)
    for path, why in errors.items():
        found.failed[path.name] = why
        place = out / "failed" / path.name
        shutil.rmtree(place, ignore_errors=True)
        place.parent.mkdir(exist_ok=True)
        path.rename(place)
        files.write_text(place / ERROR, why + "\n")
    finished = {name for name, run in runs.items() if run.status == "finished"}
    for name in finished:
        shutil.rmtree(out / "failed" / name, ignore_errors=True)  # of an earlier start
    if found.failed:
        say(f"{len(found.failed)} points failed; {out / 'failed'} says why. Remove a folder there to try it again.")
    write_index(found, out)
    return finished


def _score(found: Result, suites: Mapping[str, TaskSet], patterns: Patterns, out: Path, points: list[Point]) -> None:
    """Score points (or, without any, their base models), loading each base once; results on disk are reused."""
    wanted: dict[str, list[Point]] = {}
    for point in points or found.points:
        wanted.setdefault(base_of(point.recipe), []).append(point)
    for base, own in wanted.items():
        recipe = own[0].recipe
        evaluator = Evaluator(recipe.dtype, recipe.device)  # lets the model of the one before go

        def scored(target: str, folder: Path) -> Scores:
            answers = {}
            for name, suite in suites.items():
                place = folder if name == found.tasks else folder / "scores" / Path(name).stem
                with EvaluationProgress(folder.name) as progress:
                    result = evaluator.evaluate(open_target(target), suite, place, progress.tick)  # noqa: B023
                answers[name] = answers_of(result, patterns)
            return answers

        if not points:
            found.bases[base] = scored(recipe.model, out / "base" / base)
            continue
        for point in own:
            run = out / "runs" / point.name
            try:
                found.scores[point.name] = scored(str(run), run)
            except UserError as error:  # the base could be scored: it is this point's weights
                found.failed[point.name] = f"trained, but cannot be scored: {error}"


def write_index(found: Result, out: Path, **more: Any) -> None:
    """Write `sweep.json`: what is known of every point so far, and `more`."""
    points = []
    for point in found.points:
        apart = out / "failed" / point.name
        run = RunFolder(apart if apart.exists() else out / "runs" / point.name, point.recipe)
        row: dict[str, Any] = {
            "name": point.name,
            "recipe": point.source,
            "fields": dict(point.fields),
            "recipe_hash": point.recipe.content_hash(),
            "status": "failed" if point.name in found.failed else run.status or "waiting",
            "folder": str(run.path.relative_to(out)),
        }
        if point.name in found.failed:
            row["error"] = found.failed[point.name]
        if point.name in found.scores:
            row["scores"] = {name: each.means() for name, each in found.scores[point.name].items()}
        points.append(row)
    about = {
        "tasks": found.tasks,
        "validation": found.validation,
        "rule": found.rule.text if found.rule else None,
        "bases": {
            base: {name: each.means() for name, each in answers.items()} for base, answers in found.bases.items()
        },
    }
    files.write_json(out / INDEX, {**about, **more, "points": points})

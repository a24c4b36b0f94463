"""`unlearn sweep`: expand, train side by side, score over one loaded base, choose, show; continued if killed.

| in the sweep's folder | what |
|---|---|
| `sweep.json` | the index: every point with fields, status, folder and scores; the rule and what it chose |
| `sweep.md`, `sweep.png`, `sweep-curve.png` | the trade-off for people; figures also as `.svg`, numbers as `.csv` |
| `runs/POINT/`, `base/…/` | see `runner.py` |
| `failed/POINT/` | runs that failed, with `error.txt` |

A point is a recipe with its fields, known by the recipe's content hash; its run folder is all that stages share.

A row of its tables is a setting: points that differ in their seeds only are one, with intervals over seeds and
questions.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from robust_unlearning import files
from robust_unlearning.errors import UserError
from robust_unlearning.evaluate.harness import TaskSet, load_task_sets
from robust_unlearning.experiments.grid import Point, Sweep, label
from robust_unlearning.experiments.rule import (
    DEFAULT_RULE,
    FORGETTING,
    MEASURES,
    Answers,
    Choice,
    Rule,
    answers_of,
    choose,
    parse_rule,
)
from robust_unlearning.experiments.runner import Runner, Say, base_of, say_aloud
from robust_unlearning.report.figures import Series, trade_off
from robust_unlearning.report.tables import Column, Table
from robust_unlearning.run.folder import RunFolder
from robust_unlearning.stats.estimates import Estimate
from robust_unlearning.stats.format import NATS, PERCENT
from robust_unlearning.stats.means import over_seeds, share_over_seeds

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


COLUMNS = {
    "forgotten": Column("forgotten, nats", NATS),
    "forget": Column("forget, %", PERCENT), "retain": Column("retain, %", PERCENT),
    "perturbed": Column("perturbed, %", PERCENT), "excess_harm": Column("excess harm, nats/token", NATS),
}  # fmt: skip
TRADE_OFF, CURVE = "sweep.png", "sweep-curve.png"
Estimates = dict[str, Estimate]
"""Measure -> estimate."""


@dataclass(frozen=True)
class Setting:
    """Points that differ in their seeds only. `failed` counts those without a model; `cells` are of each suite."""

    name: str
    source: str
    fields: Mapping[str, Any]
    base: str
    points: Sequence[Point]
    failed: int
    cells: Mapping[str, Estimates]


def pooled(models: Sequence[Answers], base: Answers | None = None) -> Estimates:
    """Measure -> mean over models, one a seed, and questions, with its interval; empty where there is no model. With
    `base` also `forgotten`: log p of the right answer to what is to be forgotten, the base's less the models'."""
    cells = {}
    for key in MEASURES:
        if models and all(key in model.values for model in models):
            mean = over_seeds if key == "excess_harm" else share_over_seeds
            cells[key] = mean(np.stack([model.values[key] for model in models]), models[0].groups.get(key))
    if base and models and all(FORGETTING in each.values for each in (base, *models)):
        lost = [model.values[FORGETTING] - base.values[FORGETTING] for model in models]
        cells["forgotten"] = over_seeds(lost, base.groups.get(FORGETTING))
    return cells


def settings_of(result: SweepResult) -> list[Setting]:
    """The settings of a sweep, in order of their first point."""
    grouped: dict[tuple[str, str], list[Point]] = {}
    for point in result.runner.points:
        grouped.setdefault((base_of(point.recipe), repr(point.setting)), []).append(point)
    settings = []
    for (base, _), points in grouped.items():
        models = [answers for point in points if (answers := result.answers(point))]
        of_base = result.runner.bases.get(base, {})
        cells = {
            suite: pooled([each[suite] for each in models], of_base.get(suite)) for suite in result.runner.task_sets
        }
        source, fields = points[0].source, points[0].setting
        failed = sum(point.name in result.failed for point in points)
        settings.append(Setting(label(fields) or source, source, fields, base, points, failed, cells))
    return settings


def summarise(result: SweepResult) -> str:
    """Choose, write `sweep.md`, the figures and the choice into `sweep.json`; returns the text for the terminal."""
    out, settings = result.runner.out, settings_of(result)
    choices = _choices(result, settings)
    verdict = _verdict(result, settings, choices)
    tables = {suite: _table(result, settings, choices, suite) for suite in result.runner.task_sets}
    text, sections, notes = [], ["# Sweep", *verdict], []
    for table in tables.values():
        text += [table.title, table.text()]
        sections += [f"## {table.title}", table.markdown()]
    if suite := result.tasks or result.validation:
        notes.append(_about(result, settings))
        try:
            _draw(result, settings, {choice.index for choice in choices.values()}, suite)
            sections += [f"![{name}]({name})" for name in (TRADE_OFF, CURVE) if (out / name).exists()]
        except UserError as error:
            notes.append(f"No figure: {error}")
    notes += [f"failed: {name}: {why}" for name, why in result.failed.items()]
    files.write_text(out / "sweep.md", "\n\n".join([*sections, *notes]) + "\n")
    chosen = [_as_dict(settings, source, choice) for source, choice in choices.items()]
    write_index(result, choices=chosen, settings={name: table.as_json() for name, table in tables.items()})
    return "\n\n".join([*text, *notes, *verdict])


def _choices(result: SweepResult, settings: Sequence[Setting]) -> dict[str, Choice]:
    """What the rule chose of each recipe's settings; indices are those of `settings`."""
    suite = result.validation
    if result.rule is None or suite is None:
        return {}
    values = [
        None if setting.failed else {key: cell.value or 0.0 for key, cell in setting.cells[suite].items()}
        for setting in settings
    ]
    bases = [result.runner.bases[setting.base][suite] for setting in settings]
    choices = {}
    for source in dict.fromkeys(setting.source for setting in settings):
        of_source = [
            value if setting.source == source else None for setting, value in zip(settings, values, strict=True)
        ]
        choices[source] = choose(result.rule, of_source, [base.means() for base in bases], bases[0].chance)
    return choices


def _verdict(result: SweepResult, settings: Sequence[Setting], choices: Mapping[str, Choice]) -> list[str]:
    """What was chosen: the rule, then a sentence for each recipe."""
    if result.rule is None:
        wanted = "--validation SUITE" if result.tasks else "--tasks SUITE and --validation SUITE"
        return [f"No point is chosen: that needs questions of its own ({wanted})."]
    sentences = [f"Rule, on {result.validation}: {result.rule.text}."]
    for source, choice in choices.items():
        broken = [choice.broken[index] for index, own in enumerate(settings) if own.source == source and not own.failed]
        tried = f"{sum(setting.source == source for setting in settings)} settings tried"
        if choice.index is not None:
            folders = ", ".join(f"runs/{point.name}" for point in settings[choice.index].points)
            counts = f"{tried}, {broken.count(())} within the bounds"
            sentences.append(f"{source}: chosen {settings[choice.index].name} ({counts}): {folders}")
        elif choice.nearest is None:
            sentences.append(f"{source}: no point is chosen, as every setting has a seed that failed ({tried}).")
        else:
            near = f"{settings[choice.nearest].name}, with {' and '.join(choice.broken[choice.nearest])}"
            sentences.append(f"{source}: no point satisfies the bounds ({tried}); the nearest is {near}.")
    return sentences


def _as_dict(settings: Sequence[Setting], source: str, choice: Choice) -> dict[str, Any]:
    """A choice for `sweep.json`."""

    def setting(index: int | None) -> dict[str, Any] | None:
        if index is None:
            return None
        return {"fields": dict(settings[index].fields), "points": [point.name for point in settings[index].points]}

    near = setting(choice.nearest) if choice.index is None else None
    return {"recipe": source, "chosen": setting(choice.index), "nearest": near}


def _bases(result: SweepResult, suite: str) -> dict[str, Estimates]:
    """The base models, `base` where there is one."""
    bases = result.runner.bases
    return {f"base {name}" if len(bases) > 1 else "base": pooled([own[suite]]) for name, own in bases.items()}


def _table(result: SweepResult, settings: Sequence[Setting], choices: Mapping[str, Choice], suite: str) -> Table:
    """One suite, the base models first."""
    rows: list[dict[str, Any]] = [{"name": name, "note": "", **cells} for name, cells in _bases(result, suite).items()]
    for index, setting in enumerate(settings):
        note = f"{setting.failed} of {len(setting.points)} failed" if setting.failed else ""
        choice = choices.get(setting.source)
        if choice and index == choice.index:
            note = "chosen"
        elif choice and suite == result.validation and choice.broken[index]:
            note = "; ".join(choice.broken[index])
        rows.append({"name": setting.name, "note": note, **setting.cells[suite]})
    measured = {key: column for key, column in COLUMNS.items() if any(key in row for row in rows)}
    use = "what the choice is made on" if suite == result.validation else "reported; no part in the choice"
    return Table(f"{suite} ({use})", {"name": "setting", **measured, "note": ""}, rows)


def _about(result: SweepResult, settings: Sequence[Setting]) -> str:
    seeds = sorted({len(setting.points) for setting in settings})
    counts = []
    for suite, answers in result.runner.base.items():
        sizes = ", ".join(f"{len(values)} {measure}" for measure, values in answers.values.items())
        counts.append(f"{suite}: {sizes}")
    return (
        f"95 % intervals over seeds and questions; seeds a setting: {', '.join(map(str, seeds))}. Questions: "
        f"{'; '.join(counts)}. Perturbed: retain questions with a forget-token in them."
    )


def _draw(result: SweepResult, settings: Sequence[Setting], chosen: set[int | None], suite: str) -> None:
    """`TRADE_OFF`: retain, perturbed and excess harm over forget accuracy; `CURVE`: all of them over the field with
    most values, in order of the values and equally spaced, the base first. A line for each other combination.
    """
    axis, bases = _axis(settings), _bases(result, suite)
    cells, names = [setting.cells[suite] for setting in settings], [_value(setting, axis) for setting in settings]
    places = {name: Estimate(float(place)) for place, name in enumerate(dict.fromkeys(["base", *names]))}
    lines: dict[str, list[int]] = {}
    for index, setting in enumerate(settings):
        rest = {key: value for key, value in setting.fields.items() if key != axis}
        lines.setdefault(label(rest) or f"over {axis}", []).append(index)

    def panel(measure: str, over: str | None) -> tuple[str, list[Series]]:
        def series(name: str, indices: Sequence[int], marker: str) -> Series:
            line = [index for index in indices if measure in cells[index]]
            xs = [cells[index][over] if over else places[names[index]] for index in line]
            notes = [names[index] for index in line] if over and marker == "o" else ()
            points = [(x, cells[index][measure]) for x, index in zip(xs, line, strict=True)]
            return Series(name, points, marker, marker == "o", notes)

        drawn = [
            Series(name, [(base[over] if over else places["base"], base[measure])], "s") for name, base in bases.items()
        ]
        drawn += [series(name, indices, "o") for name, indices in lines.items()]
        stars = series("chosen", [index for index in range(len(cells)) if index in chosen], "*")
        return COLUMNS[measure].header.replace(", %", " accuracy"), [*drawn, *([stars] if stars.points else [])]

    measures = [key for key in MEASURES if all(key in base for base in bases.values())]
    about, out = f"on {suite} (95 % intervals over seeds and questions)", result.runner.out
    curve = [panel(key, None) for key in measures]
    trade_off(curve, axis, f"Over {axis} {about}", out / CURVE, ticks=list(places))
    if "forget" in measures and len(measures) > 1:
        panels = [panel(key, "forget") for key in measures if key != "forget"]
        title = f"Trade-off {about}; beside the points: {axis}"
        trade_off(panels, "forget accuracy (less is more forgotten)", title, out / TRADE_OFF)


def _value(setting: Setting, axis: str) -> str:
    return label({axis: setting.fields[axis]}).partition("=")[2] if axis in setting.fields else "none"


def _axis(settings: Sequence[Setting]) -> str:
    """The field with most values, the recipe only where there is no other: what a line of a figure runs along."""
    values: dict[str, set[str]] = {}
    for setting in settings:
        for key, value in setting.fields.items():
            values.setdefault(key, set()).add(repr(value))
    return max(values, key=lambda key: (key != "recipe", len(values[key])), default="setting")

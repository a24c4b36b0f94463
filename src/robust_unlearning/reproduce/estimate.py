"""The plan: what each stage will run, and for how long, told before anything runs.

For a model that is here, unit costs come from a short calibration: a few steps of training and a few questions, in
this process. For one that is not, from the planner's FLOPs at a stated rate.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from robust_unlearning import files
from robust_unlearning.data.questions import read_questions, shows_options
from robust_unlearning.errors import UserError
from robust_unlearning.evaluate.suite import Suite, load_suite
from robust_unlearning.experiments.grid import Point
from robust_unlearning.methods.table import Representation
from robust_unlearning.plan.text import duration
from robust_unlearning.recipe import Recipe, load_recipe, shared_fields
from robust_unlearning.report.tables import Table
from robust_unlearning.reproduce.grid import suites_of
from robust_unlearning.reproduce.run import state_of
from robust_unlearning.reproduce.target import TRAINING, Stage, Target, main_name, points_of
from robust_unlearning.reproduce.timing import steps_of
from robust_unlearning.run.folder import RunFolder

CALIBRATION = "calibration.json"
STEPS, SIDE_BY_SIDE, QUESTIONS = 3, 3, 16
"""Steps of training, runs side by side, and questions of each set that a calibration takes."""
PROMPT_TOKENS = 150
"""Tokens of a question, for models that are not here."""
PASSES = {"noise-sensitivity": 60.0, "activations": 17.0, "theory": 90.0}
"""Cost of an analysis for each model and text, in prompts of an evaluation: measured on tiny, good to a factor of 2."""


@dataclass(frozen=True)
class Units:
    """Seconds of what a reproduction consists of.

    Attributes:
        step: `representation` or `preference` -> of one step of one run.
        prompt: of scoring one prompt.
        source: where they come from, a sentence.
    """

    step: Mapping[str, float]
    prompt: float
    source: str


@dataclass(frozen=True)
class StagePlan:
    """One stage of the plan.

    Attributes:
        runs, trained: runs it needs, and those there already or in an earlier stage.
        steps: of training that are left, all runs together.
        evaluations: models that are scored, those there already included.
        prompts: left to be scored, those of analyses included.
        seconds: estimate of what is left; None where no cost is known.
    """

    stage: str
    stands_for: str
    status: str
    runs: int
    trained: int
    steps: int
    evaluations: int
    prompts: int
    seconds: float | None


def family(recipe: Recipe) -> str:
    """What a run's cost depends on most: whether the layers above l take part."""
    return "representation" if isinstance(recipe.spec, Representation) else "preference"


def prompts_of(suite: Suite) -> int:
    """How many prompts an evaluation scores, texts counted as one each document up to 100."""
    total = 0
    for source in suite.questions.values():
        count = len(read_questions(source.path, config=source.config, split=source.split))
        pairs = [(place, style) for place in source.perturb for style in source.styles]
        forms = len(source.styles) + 2 * sum(shows_options(style) or place != "option" for place, style in pairs)
        total += min(count, source.limit or count) * forms
    return total + sum(min(100, text.limit or 100) for text in suite.texts.values())


def make_plan(target: Target, stages: Mapping[str, Stage], out: Path, units: Units | None) -> list[StagePlan]:
    """A row for each stage. Runs that an earlier stage trains count there; without `units` no seconds are given.

    Steps of a stage of kind time are reckoned as those of runs side by side, so it takes somewhat longer than that.
    """
    try:
        test, validation = suites_of(target)
        prompts, checks = prompts_of(test), prompts_of(validation) if validation else 0
        here = True
    except UserError:  # the questions are not here: the plan still says what will be run
        (prompts, checks), here = target.prompts or (0, 0), False
    seen: set[tuple[str, int]] = set()
    rows = []
    for name, stage in stages.items():
        status = state_of(target, name, out)["status"] if here else "waiting"
        points = points_of(target, stage)
        left = dict.fromkeys(("representation", "preference"), 0)
        trained = evaluations = scored = 0
        for point in points:
            last = point.recipe.steps
            there = (point.name, last) in seen or RunFolder(
                out / "runs" / point.name, point.recipe
            ).status == "finished"
            trained += there
            left[family(point.recipe)] += 0 if there else last
            steps = {(point.name, step) for step in (*point.earlier, last)}
            evaluations += len(steps)
            scored += prompts * len(steps - seen)
            scored += checks * (stage.kind == "main" and (point.name, last) not in seen)
            seen |= steps
        if stage.kind == "time":
            for kind in _timed_families(target, stage):
                left[kind] += steps_of(stage)
        elif stage.kind not in TRAINING:
            evaluations = len(stage.recipes) * (1 + stage.rna) + 1
            scored = round(_passes(stage, evaluations, prompts))
        if status == "finished":
            left, scored = dict.fromkeys(left, 0), 0
        costs = [units.step.get(kind, 0.0) * count for kind, count in left.items()] if units else []
        seconds = sum(costs) + units.prompt * scored if units else 0.0 if status == "finished" else None
        total = sum(left.values())
        rows.append(
            StagePlan(name, stage.stands_for, status, len(points), trained, total, evaluations, scored, seconds)
        )
    return rows


def _timed_families(target: Target, stage: Stage) -> list[str]:
    """The family of each recipe that a stage of kind time times."""
    known = {point.source: family(point.recipe) for point in points_of(target, target.stages[main_name(target)])}
    return [known[name] for name in stage.recipes if name in known]


def _passes(stage: Stage, models: int, prompts: int) -> float:
    """What an analysis costs, in prompts of an evaluation."""
    if stage.kind == "ngrams":  # classes on the base and models without noise, the top of each document on all
        return (len(stage.recipes) + 1 + models) * len(stage.n) * 0.45 * prompts
    texts = stage.documents + 4 * stage.questions
    if stage.kind == "noise-sensitivity":
        texts = stage.documents * stage.probes
    return models * texts * PASSES[stage.kind]


def units_of(target: Target, stages: Mapping[str, Stage], out: Path, *, here: bool) -> Units:
    """Unit costs: measured, and kept in `out`, where the model is here; else reckoned.

    Raises:
        UserError: the model, its texts or the questions cannot be used.
    """
    trained = [*stages.values()]
    if any(stage.kind == "time" for stage in trained):  # it times what the main stage trains
        trained.append(target.stages[main_name(target)])
    points = [point for stage in trained for point in points_of(target, stage)]
    families = {family(point.recipe): point for point in reversed(points)}
    recipe = points_of(target, target.stages[main_name(target)])[0].recipe
    if not here:
        return _reckoned(target, families, recipe)
    path = out / CALIBRATION
    units = Units(**files.read_json(path)) if path.exists() else None
    if units is None or not families.keys() <= units.step.keys():
        units = _measured(target, points, recipe)
        files.write_json(path, asdict(units))
    return units


def _measured(target: Target, points: Sequence[Point], recipe: Recipe) -> Units:
    from robust_unlearning.evaluate.evaluator import Evaluator, open_target

    groups: dict[str, list[Recipe]] = {}
    for point in points:
        group = groups.setdefault(family(point.recipe), [])
        if not group or (len(group) < SIDE_BY_SIDE and shared_fields(group[0]) == shared_fields(point.recipe)):
            group.append(point.recipe)
    step = {kind: _step_seconds(group) for kind, group in groups.items()}
    evaluator = Evaluator(recipe.dtype, recipe.device)
    suite = load_suite(target.suite).limited(min(QUESTIONS, target.limit or QUESTIONS))
    evaluator.evaluate(open_target(recipe.model), suite.limited(1))  # the model is loaded, and warm
    began = time.perf_counter()
    evaluator.evaluate(open_target(recipe.model), suite)
    prompt = (time.perf_counter() - began) / prompts_of(suite)
    taken = [f"{STEPS} steps of {len(group)} {kind} runs side by side" for kind, group in groups.items()]
    return Units(step, prompt, "measured here: " + ", ".join([*taken, f"{prompts_of(suite)} prompts"]))


def _step_seconds(recipes: Sequence[Recipe]) -> float:
    """Seconds of a step of one run among several side by side; a first step warms up."""
    from robust_unlearning.train.trainer import Trainer

    seconds = 0.0
    for steps in (1, STEPS):
        with tempfile.TemporaryDirectory() as folder:
            runs = []
            for number, recipe in enumerate(recipes):
                data = {**recipe.model_dump(mode="json"), "steps": steps, "snapshots": []}
                runs.append(RunFolder.open(Path(folder) / str(number), load_recipe(data)))
            Trainer(runs).train()
            seconds = sum(run.record["seconds"]["train"] for run in runs) / len(runs) / steps
    return seconds


def _reckoned(target: Target, ones: Mapping[str, Point], recipe: Recipe) -> Units:
    import torch
    from transformers import AutoModelForCausalLM

    from robust_unlearning.models import checkpoint
    from robust_unlearning.plan.lengths import config_of
    from robust_unlearning.plan.plan import make_plan as plan_run

    config = files.locate(target.config) if target.config else None
    step = {}
    for kind, point in ones.items():
        plan = plan_run(point.recipe, config=config)
        step[kind] = plan.total_flops / target.flops / plan.steps
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(checkpoint.read_config(config_of(recipe, config), None))
    parameters = sum(tensor.numel() for tensor in model.parameters())
    prompt = 2 * parameters * PROMPT_TOKENS / target.flops
    rate = f"{target.flops / 1e12:g} TFLOP/s, {PROMPT_TOKENS} tokens a prompt"
    return Units(step, prompt, f"reckoned, not measured: FLOPs of the planner at {rate}")


def plan_text(target: Target, rows: Sequence[StagePlan], units: Units | None, lacking: Sequence[str]) -> str:
    """The plan as one reads it in a terminal."""
    table = [
        {
            **asdict(row),
            "runs": f"{row.runs}" + (f" ({row.trained} there)" if row.trained else ""),
            "steps": f"{row.steps:,}",
            "prompts": f"{row.prompts:,}",
            "seconds": "" if row.seconds is None else duration(row.seconds),
        }
        for row in rows
    ]
    text = [target.about, Table("", HEADERS, table).text()]
    if units:
        seconds = sum(row.seconds or 0.0 for row in rows)
        costs = "".join(f"{value:.3g} s a step of one {kind} run, " for kind, value in units.step.items())
        costs += f"{units.prompt:.3g} s a prompt"
        text.append(f"in all about {duration(seconds)}. Unit costs {units.source}: {costs}.")
    text += [f"reduced: {what}" for what in target.reduced]
    if lacking:
        text.append("missing, to be brought before it can run:\n" + "\n".join(f"  - {what}" for what in lacking))
    return "\n\n".join(text)


HEADERS = {
    "stage": "stage", "stands_for": "stands for", "status": "status", "runs": "runs", "steps": "steps left",
    "evaluations": "models", "prompts": "prompts left", "seconds": "estimate",
}  # fmt: skip


def plan_json(rows: Sequence[StagePlan], units: Units | None) -> dict[str, Any]:
    """The plan for `plan.json`."""
    return {"units": asdict(units) if units else None, "stages": [asdict(row) for row in rows]}

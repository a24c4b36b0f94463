"""A study's tables, its comparison at like forgetting, and its figure."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from robust_unlearning import files
from robust_unlearning.errors import UserError
from robust_unlearning.experiments.study import LEAST, Measurements, Point, forgetting, matched_difference
from robust_unlearning.report.figures import Series, trade_off
from robust_unlearning.report.tables import markdown_table, text_table
from robust_unlearning.results.measures import Measured, estimates, right_at
from robust_unlearning.stats.estimates import Estimate, over_seeds, paired_recovery, paired_reduction

HEADERS = (
    "model", "forget", "near", "far", "clean", "+control", "+forget-token", "excess harm", "reduction", "recovery",
)  # fmt: skip
MATCHED = ("model", "token in", "points", "forgetting", "excess harm: RNA less none", "right: RNA less none", "verdict")


def summarise(found: Measurements, out: Path) -> str:
    """Write `study.md`, `study.json` and the figure (`study.png`, .svg, .csv) into `out`; returns the text for the
    terminal.
    """
    study, base = found.study, found.base
    places = list(base.places)
    questions = f"{len(base.forget)} forget, {len(base.near)} near and {len(base.far)} far questions"
    notes = [
        f"{len(study.seeds)} seeds, {study.steps[-1]} steps; {questions}, {len(base.clean)} of them perturbed. "
        "Accuracy in %, 95 % intervals over seeds and questions (base: over questions). Chance is 25 %.",
        "Excess harm: log p of the right option under a forget-token less that under a control token, nats; below 0 "
        "the forget-token does more harm than an unrelated name. Reduction and recovery are the paper's rates of "
        "accuracy with a forget-token.",
    ]
    sections: list[str] = []
    text: list[str] = []
    tables: dict[str, list[dict[str, Any]]] = {}
    for where in places:
        rows = [_base_row(base, where)]
        for recipe in study.recipes:
            rows += [_row(found, recipe, noise, where) for noise in (0.0, *study.noise_std)]
        shown, numbers = [row for row, _ in rows], [each for _, each in rows]
        title = f"After {study.steps[-1]} steps, a token in place of or in: {where}"
        sections += [f"## {title}", markdown_table(HEADERS, shown)]
        text += [title, text_table(HEADERS, shown)]
        tables[where] = numbers
    fair = [
        _against(found, recipe, noise, where)
        for recipe in study.recipes
        for where in places
        for noise in study.noise_std
    ]
    data = {"study": study.model_dump(mode="json"), "tables": tables, "like_forgetting": [each for _, each in fair]}
    about = (
        "RNA less the same method, seed and retain weight without noise, where that has forgotten as much (mean −log p "
        f"of the right option on forget questions; at least {LEAST} nats, chance is {math.log(4):.2f}). A positive "
        "difference speaks for RNA. Points: models compared, over seeds, retain weights and steps."
    )
    sections += ["## At like forgetting", about, markdown_table(MATCHED, [row for row, _ in fair])]
    text += ["At like forgetting", text_table(MATCHED, [row for row, _ in fair]), about]
    try:
        _draw(found, places[0], out / "study.png")
        sections.append("![excess harm over forgetting](study.png)")
    except UserError as error:
        notes.append(f"No figure: {error}")
    files.write_text(out / "study.md", "\n\n".join(["# Study", *notes, *sections]) + "\n")
    files.write_json(out / "study.json", data)
    return "\n\n".join([*text, *notes])


def _percent(estimate: Estimate) -> str:
    if estimate.value is None:
        return "undefined"
    if estimate.low is None or estimate.high is None:
        return f"{100 * estimate.value:.1f}"
    return f"{100 * estimate.value:.1f} [{100 * estimate.low:.0f}, {100 * estimate.high:.0f}]"


def _nats(estimate: Estimate) -> str:
    return f"{estimate.value:+.3f} [{estimate.low:+.3f}, {estimate.high:+.3f}]"


def _shown(name: str, cells: dict[str, Estimate]) -> list[str]:
    return [name, *(_nats(each) if key == "excess_harm" else _percent(each) for key, each in cells.items())]


def _base_row(base: Measured, where: str) -> tuple[list[str], dict[str, Any]]:
    cells = estimates([base], where)
    return [*_shown("base", cells), "", ""], {"name": "base", **{key: each.as_dict() for key, each in cells.items()}}


def _row(found: Measurements, recipe: str, noise: float, where: str) -> tuple[list[str], dict[str, Any]]:
    """A recipe at one noise scale and the plain retain weight, after the last step, over seeds."""

    def models(std: float) -> list[Measured]:
        weight = min(found.study.weights, key=lambda each: abs(math.log(each)))
        last = found.study.steps[-1]
        return [found.models[Point(recipe, seed, std, weight, last)] for seed in found.study.seeds]

    own = models(noise)
    cells = estimates(own, where)
    cells["reduction"] = paired_reduction(found.base.places[where].right, right_at(own, where))
    if noise:
        cells["recovery"] = paired_recovery(
            found.base.places[where].right, right_at(models(0.0), where), right_at(own, where)
        )
    name = recipe + (f" + RNA {noise:g}" if noise else "")
    shown = _shown(name, cells) + ([] if noise else [""])
    return shown, {"name": name, "noise_std": noise, **{key: each.as_dict() for key, each in cells.items()}}


def _against(found: Measurements, recipe: str, noise: float, where: str) -> tuple[list[str], dict[str, Any]]:
    """RNA at one scale against no noise at like forgetting: averaged over weights and steps, then over seeds."""
    excess, right, at = [], [], []
    for seed in found.study.seeds:
        of_seed = []
        for weight in found.study.weights:
            rna = found.line(recipe, seed, noise, weight)[1:]
            matched = matched_difference(rna, found.line(recipe, seed, 0.0, weight), where, LEAST)
            if matched:
                of_seed.append(matched)
                at += matched[2]
        if of_seed:
            excess.append(np.mean([each[0] for each in of_seed], axis=0))
            right.append(np.mean([each[1] for each in of_seed], axis=0))
    name, data = f"{recipe} + RNA {noise:g}", {"recipe": recipe, "noise_std": noise, "where": where}
    if not excess:
        strongest = max(
            forgetting(each)
            for seed in found.study.seeds
            for weight in found.study.weights
            for each in found.line(recipe, seed, noise, weight)
        )
        said = f"nothing to compare: forgot {strongest:.2f} nats at most, or more than without noise"
        return [name, where, "0", "", "", "", said], {**data, "points": 0, "verdict": said}
    harm, answers = over_seeds(np.stack(excess)), over_seeds(np.stack(right))
    low, high = harm.low or 0.0, harm.high or 0.0
    said = "RNA mends" if low > 0 else "RNA harms" if high < 0 else "cannot be told"
    span = f"{min(at):.2f} to {max(at):.2f}"
    row = [name, where, str(len(at)), span, _nats(harm), _percent(answers), said]
    numbers = {"excess_difference": harm.as_dict(), "right_difference": answers.as_dict(), "forgetting": at}
    return row, {**data, "points": len(at), **numbers, "verdict": said}


def _draw(found: Measurements, where: str, path: Path) -> None:
    """A panel for each recipe: excess harm over forgetting, a line for each noise scale (mean over seeds)."""
    panels = []
    for recipe in found.study.recipes:
        series = []
        for noise in (0.0, *found.study.noise_std):
            points = []
            for weight in found.study.weights:
                lines = [found.line(recipe, seed, noise, weight) for seed in found.study.seeds]
                for models in zip(*lines, strict=True):
                    strengths = [forgetting(each) for each in models]
                    harm = over_seeds(np.stack([each.places[where].excess for each in models]))
                    points.append((Estimate(float(np.mean(strengths))), harm))
            joined = len(found.study.weights) == 1
            label = f"RNA {noise:g}" if noise else "no noise"
            series.append(Series(label, points, "D" if noise else "o", joined))
        panels.append((f"{recipe}: excess harm (nats), token in {where}", series))
    trade_off(
        panels,
        "forgetting: −log p of the right option, nats (more is stronger)",
        "What a forget-token costs at each degree of forgetting (95 % intervals over seeds and questions)",
        path,
    )

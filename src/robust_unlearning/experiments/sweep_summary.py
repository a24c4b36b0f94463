"""A sweep's trade-off for people: the table, `sweep.md` and two figures, with the chosen setting marked.

A row is a setting: points that differ in their seeds only are one, with intervals over seeds and questions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from robust_unlearning import files
from robust_unlearning.errors import UserError
from robust_unlearning.experiments.answers import Answers
from robust_unlearning.experiments.grid import Point, label
from robust_unlearning.experiments.rule import MEASURES, Choice, choose
from robust_unlearning.experiments.runner import base_of
from robust_unlearning.experiments.sweep import SweepResult, write_index
from robust_unlearning.report.figures import Series, trade_off
from robust_unlearning.report.tables import Column, Table
from robust_unlearning.stats.estimates import Estimate, over_seeds
from robust_unlearning.stats.format import NATS, PERCENT

COLUMNS = {
    "forget": Column("forget, %", PERCENT), "retain": Column("retain, %", PERCENT),
    "perturbed": Column("perturbed, %", PERCENT), "excess_harm": Column("excess harm, nats/token", NATS),
}  # fmt: skip
TRADE_OFF, CURVE = "sweep.png", "sweep-curve.png"
Estimates = dict[str, Estimate]
"""Measure -> estimate."""


@dataclass(frozen=True)
class Setting:
    """Points that differ in their seeds only. `failed` counts those without a model."""

    name: str
    source: str
    fields: Mapping[str, Any]
    base: str
    points: tuple[Point, ...]
    failed: int


def pooled(models: Sequence[Answers]) -> Estimates:
    """Measure -> mean over models, one a seed, and questions, with its interval; empty where there is no model."""
    measures = [key for key in MEASURES if models and all(key in model.values for model in models)]
    return {key: over_seeds(np.stack([model.values[key] for model in models])) for key in measures}


def summarise(result: SweepResult, out: Path) -> str:
    """Choose, write `sweep.md`, the figures and the choice into `sweep.json`; returns the text for the terminal."""
    summary = _Summary(result)
    verdict = summary.verdict()
    text, sections, notes = [], ["# Sweep", *verdict], []
    tables = {suite: summary.table(suite) for suite in summary.suites}
    for table in tables.values():
        text += [table.title, table.text()]
        sections += [f"## {table.title}", table.markdown()]
    if reported := result.tasks or result.validation:
        notes.append(summary.about())
        try:
            summary.draw(reported, out)
            sections += [f"![{name}]({name})" for name in (TRADE_OFF, CURVE) if (out / name).exists()]
        except UserError as error:
            notes.append(f"No figure: {error}")
    notes += [f"failed: {name}: {why}" for name, why in result.failed.items()]
    files.write_text(out / "sweep.md", "\n\n".join([*sections, *notes]) + "\n")
    rows = {suite: table.as_json() for suite, table in tables.items()}
    write_index(result, out, choices=summary.choices_json(), settings=rows)
    return "\n\n".join([*text, *notes, *verdict])


class _Summary:
    """Settings, their estimates by suite, and what the rule chose of each recipe's; indices are those of settings."""

    def __init__(self, result: SweepResult) -> None:
        self.result = result
        grouped: dict[tuple[str, str], list[Point]] = {}
        for point in result.points:
            grouped.setdefault((base_of(point.recipe), repr(point.setting)), []).append(point)
        self.settings = [
            Setting(
                label(points[0].setting) or points[0].source,
                points[0].source,
                points[0].setting,
                base,
                tuple(points),
                sum(point.name in result.failed for point in points),
            )
            for (base, _), points in grouped.items()
        ]
        scores = result.scores
        self.suites = list(dict.fromkeys(suite for suite in (result.validation, result.tasks) if suite))
        self.cells = {
            suite: [
                pooled([scores[point.name][suite] for point in setting.points if point.name in scores])
                for setting in self.settings
            ]
            for suite in self.suites
        }
        self.bases = {
            suite: {base: pooled([answers[suite]]) for base, answers in result.bases.items()} for suite in self.suites
        }
        self.choices = self._choices()

    def _choices(self) -> dict[str, Choice]:
        rule, suite = self.result.rule, self.result.validation
        if rule is None or suite is None:
            return {}
        values = [
            None if setting.failed else {key: cell.value or 0.0 for key, cell in cells.items()}
            for setting, cells in zip(self.settings, self.cells[suite], strict=True)
        ]
        bases = [self.result.bases[setting.base][suite] for setting in self.settings]
        choices = {}
        for source in dict.fromkeys(setting.source for setting in self.settings):
            own = [
                value if setting.source == source else None
                for setting, value in zip(self.settings, values, strict=True)
            ]
            choices[source] = choose(rule, own, [base.means() for base in bases], bases[0].chance)
        return choices

    def verdict(self) -> list[str]:
        """What was chosen: the rule, then a sentence for each recipe."""
        if self.result.rule is None:
            wanted = "--validation SUITE" if self.result.tasks else "--tasks SUITE and --validation SUITE"
            return [f"No point is chosen: that needs questions of its own ({wanted})."]
        sentences = [f"Rule, on {self.result.validation}: {self.result.rule.text}."]
        for source, choice in self.choices.items():
            own = [index for index, setting in enumerate(self.settings) if setting.source == source]
            tried = f"{len(own)} settings tried"
            if choice.index is not None:
                setting = self.settings[choice.index]
                within = sum(not choice.broken[index] and not self.settings[index].failed for index in own)
                folders = ", ".join(f"runs/{point.name}" for point in setting.points)
                sentences.append(f"{source}: chosen {setting.name} ({tried}, {within} within the bounds): {folders}")
            elif choice.nearest is None:
                sentences.append(f"{source}: no point is chosen, as every setting has a seed that failed ({tried}).")
            else:
                broken = " and ".join(choice.broken[choice.nearest])
                near = self.settings[choice.nearest].name
                sentences.append(
                    f"{source}: no point satisfies the bounds ({tried}); the nearest is {near}, with {broken}."
                )
        return sentences

    def choices_json(self) -> list[dict[str, Any]]:
        """The choices for `sweep.json`."""

        def setting(index: int | None) -> dict[str, Any] | None:
            if index is None:
                return None
            chosen = self.settings[index]
            return {"fields": dict(chosen.fields), "points": [point.name for point in chosen.points]}

        return [
            {
                "recipe": source,
                "chosen": setting(choice.index),
                "nearest": setting(choice.nearest) if choice.index is None else None,
            }
            for source, choice in self.choices.items()
        ]

    def table(self, suite: str) -> Table:
        """One suite, the base models first."""
        bases = self.bases[suite]
        rows: list[dict[str, Any]] = [
            {"name": "base" if len(bases) == 1 else f"base {name}", "note": "", **cells}
            for name, cells in bases.items()
        ]
        for index, (setting, cells) in enumerate(zip(self.settings, self.cells[suite], strict=True)):
            note = f"{setting.failed} of {len(setting.points)} failed" if setting.failed else ""
            choice = self.choices.get(setting.source)
            if choice and index == choice.index:
                note = "chosen"
            elif choice and suite == self.result.validation and choice.broken[index]:
                note = "; ".join(choice.broken[index])
            rows.append({"name": setting.name, "note": note, **cells})
        measured = {key: column for key, column in COLUMNS.items() if any(key in row for row in rows)}
        use = "what the choice is made on" if suite == self.result.validation else "reported; no part in the choice"
        return Table(f"{suite} ({use})", {"name": "setting", **measured, "note": ""}, rows)

    def about(self) -> str:
        """What the intervals rest on."""
        seeds = sorted({len(setting.points) for setting in self.settings})
        counts = []
        for suite, answers in next(iter(self.result.bases.values())).items():
            sizes = ", ".join(f"{len(values)} {measure}" for measure, values in answers.values.items())
            counts.append(f"{suite}: {sizes}")
        return (
            f"95 % intervals over seeds and questions; seeds a setting: {', '.join(map(str, seeds))}. Questions: "
            f"{'; '.join(counts)}. Perturbed: retain questions with a forget-token in them."
        )

    def draw(self, suite: str, out: Path) -> None:
        """`TRADE_OFF`: retain, perturbed and excess harm over forget accuracy; `CURVE`: all of them over the field
        with most values, in order of the values and equally spaced, the base first. A line for each other combination.
        """
        axis, cells, bases = self._axis(), self.cells[suite], self.bases[suite]
        names = [_value(setting, axis) for setting in self.settings]
        places = {name: Estimate(float(place)) for place, name in enumerate(dict.fromkeys(["base", *names]))}
        lines: dict[str, list[int]] = {}
        for index, setting in enumerate(self.settings):
            rest = {key: value for key, value in setting.fields.items() if key != axis}
            lines.setdefault(label(rest) or f"over {axis}", []).append(index)
        chosen = [index for index in range(len(cells)) if index in {choice.index for choice in self.choices.values()}]

        def series(measure: str, over: str | None) -> list[Series]:
            def those(indices: Sequence[int]) -> list[int]:
                return [index for index in indices if measure in cells[index]]

            def at(index: int) -> tuple[Estimate, Estimate]:
                return cells[index][over] if over else places[names[index]], cells[index][measure]

            drawn = [
                Series(name if len(bases) > 1 else "base", [(own[over] if over else Estimate(0.0), own[measure])], "s")
                for name, own in bases.items()
            ]
            for name, indices in lines.items():
                notes = [names[index] for index in those(indices)] if over else ()
                drawn.append(Series(name, [at(index) for index in those(indices)], "o", joined=True, notes=notes))
            if those(chosen):
                drawn.append(Series("chosen", [at(index) for index in those(chosen)], "*"))
            return drawn

        def panels(measures: Sequence[str], over: str | None) -> list[tuple[str, list[Series]]]:
            return [(COLUMNS[key].header.replace(", %", " accuracy"), series(key, over)) for key in measures]

        measures = [key for key in MEASURES if all(key in own for own in bases.values())]
        about = f"on {suite} (95 % intervals over seeds and questions)"
        trade_off(panels(measures, None), axis, f"Over {axis} {about}", out / CURVE, ticks=list(places))
        if "forget" in measures and len(measures) > 1:
            over = panels([key for key in measures if key != "forget"], "forget")
            title = f"Trade-off {about}; beside the points: {axis}"
            trade_off(over, "forget accuracy (less is more forgotten)", title, out / TRADE_OFF)

    def _axis(self) -> str:
        """The field with most values, the recipe only where there is no other: what a line of a figure runs along."""
        values: dict[str, set[str]] = {}
        for setting in self.settings:
            for key, value in setting.fields.items():
                values.setdefault(key, set()).add(repr(value))
        return max(values, key=lambda key: (key != "recipe", len(values[key])), default="setting")


def _value(setting: Setting, axis: str) -> str:
    return label({axis: setting.fields[axis]}).partition("=")[2] if axis in setting.fields else "none"

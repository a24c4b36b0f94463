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
from robust_unlearning.experiments.grid import Point, label
from robust_unlearning.experiments.selection import MEASURES, Choice, choose
from robust_unlearning.experiments.sweep import Result, Scores, base_of, write_index
from robust_unlearning.report.figures import Series, trade_off
from robust_unlearning.report.tables import markdown_table, text_table
from robust_unlearning.stats.estimates import Estimate, over_seeds

HEADERS = {
    "forget": "forget, %", "retain": "retain, %", "perturbed": "perturbed, %", "excess_harm": "excess harm, nats/token",
}  # fmt: skip
TRADE_OFF, CURVE = "sweep.png", "sweep-curve.png"


@dataclass(frozen=True)
class Setting:
    """Points that differ in their seeds only. `failed` counts those without a model."""

    name: str
    source: str
    fields: Mapping[str, Any]
    base: str
    points: tuple[Point, ...]
    failed: int

    def estimates(self, scores: Mapping[str, Scores], suite: str) -> dict[str, Estimate]:
        """Measure -> mean over seeds and questions, with its interval; empty where no point has a model."""
        found = [scores[point.name][suite].values for point in self.points if point.name in scores]
        measures = [each for each in MEASURES if found and all(each in values for values in found)]
        return {each: over_seeds(np.stack([values[each] for values in found])) for each in measures}


def settings_of(found: Result) -> list[Setting]:
    """The settings of a sweep, in order of their first point."""
    grouped: dict[tuple[str, str], list[Point]] = {}
    for point in found.points:
        grouped.setdefault((base_of(point.recipe), repr(point.setting)), []).append(point)
    return [
        Setting(
            label(points[0].setting) or points[0].source,
            points[0].source,
            points[0].setting,
            base,
            tuple(points),
            sum(point.name in found.failed for point in points),
        )
        for (base, _), points in grouped.items()
    ]


def summarise(found: Result, out: Path) -> str:
    """Choose, write `sweep.md`, the figures and the choice into `sweep.json`; returns the text for the terminal."""
    settings = settings_of(found)
    choices = _choices(found, settings)
    said = _verdict(found, settings, choices)
    text, sections, notes = [], ["# Sweep", *said], []
    tables: dict[str, list[dict[str, Any]]] = {}
    for suite in dict.fromkeys(each for each in (found.validation, found.tasks) if each):
        use = "what the choice is made on" if suite == found.validation else "reported; no part in the choice"
        headers, rows, tables[suite] = _table(found, settings, choices, suite)
        text += [f"{suite} ({use})", text_table(headers, rows)]
        sections += [f"## {suite} ({use})", markdown_table(headers, rows)]
    shown = found.tasks or found.validation
    if shown:
        notes.append(_about(found, settings))
        try:
            _draw(found, settings, choices, shown, out)
            sections += [f"![{name}]({name})" for name in (TRADE_OFF, CURVE) if (out / name).exists()]
        except UserError as error:
            notes.append(f"No figure: {error}")
    notes += [f"failed: {name}: {why}" for name, why in found.failed.items()]
    files.write_text(out / "sweep.md", "\n\n".join([*sections, *notes]) + "\n")
    write_index(found, out, choices=[_as_dict(settings, *each) for each in choices.items()], settings=tables)
    return "\n\n".join([*text, *notes, *said])


def _choices(found: Result, settings: Sequence[Setting]) -> dict[str, Choice]:
    """What the rule chose of each recipe's settings; indices are those of `settings`."""
    if found.rule is None or found.validation is None:
        return {}
    suite = found.validation
    values = [
        None if each.failed else {key: cell.value or 0.0 for key, cell in each.estimates(found.scores, suite).items()}
        for each in settings
    ]
    choices = {}
    for source in dict.fromkeys(each.source for each in settings):
        own = [values[index] if each.source == source else None for index, each in enumerate(settings)]
        bases = [found.bases[each.base][suite].means() for each in settings]
        choices[source] = choose(found.rule, own, bases, found.bases[settings[0].base][suite].chance)
    return choices


def _verdict(found: Result, settings: Sequence[Setting], choices: Mapping[str, Choice]) -> list[str]:
    """What was chosen: the rule, then a sentence for each recipe."""
    if found.rule is None:
        wanted = "--validation SUITE" if found.tasks else "--tasks SUITE and --validation SUITE"
        return [f"No point is chosen: that needs questions of its own ({wanted})."]
    said = [f"Rule, on {found.validation}: {found.rule.text}."]
    for source, choice in choices.items():
        own = [index for index, each in enumerate(settings) if each.source == source]
        tried = f"{len(own)} settings tried"
        if choice.index is not None:
            setting = settings[choice.index]
            kept = sum(not choice.broken[index] and not settings[index].failed for index in own)
            folders = ", ".join(f"runs/{point.name}" for point in setting.points)
            said.append(f"{source}: chosen {setting.name} ({tried}, {kept} within the bounds): {folders}")
        elif choice.nearest is None:
            said.append(f"{source}: no point is chosen, as every setting has a seed that failed ({tried}).")
        else:
            broken = " and ".join(choice.broken[choice.nearest])
            near = settings[choice.nearest].name
            said.append(f"{source}: no point satisfies the bounds ({tried}); the nearest is {near}, with {broken}.")
    return said


def _as_dict(settings: Sequence[Setting], source: str, choice: Choice) -> dict[str, Any]:
    """A choice for `sweep.json`."""

    def setting(index: int | None) -> dict[str, Any] | None:
        if index is None:
            return None
        return {"fields": dict(settings[index].fields), "points": [each.name for each in settings[index].points]}

    near = None if choice.index is not None else setting(choice.nearest)
    return {"recipe": source, "chosen": setting(choice.index), "nearest": near}


def _table(
    found: Result, settings: Sequence[Setting], choices: Mapping[str, Choice], suite: str
) -> tuple[list[str], list[list[str]], list[dict[str, Any]]]:
    """Headers and rows of one suite, the base models first, and the numbers behind them."""
    base = {name: _estimates(scores[suite].values) for name, scores in found.bases.items()}
    lines: list[tuple[str, str, dict[str, Estimate]]] = [
        ("base" if len(base) == 1 else f"base {name}", "", cells) for name, cells in base.items()
    ]
    for index, setting in enumerate(settings):
        note = f"{setting.failed} of {len(setting.points)} failed" if setting.failed else ""
        choice = choices.get(setting.source)
        if choice and index == choice.index:
            note = "chosen"
        elif choice and suite == found.validation and choice.broken[index]:
            note = "; ".join(choice.broken[index])
        lines.append((setting.name, note, setting.estimates(found.scores, suite)))
    measures = [each for each in MEASURES if any(each in cells for _, _, cells in lines)]
    rows = [[name, *(_cell(each, cells.get(each)) for each in measures), note] for name, note, cells in lines]
    numbers = [
        {"name": name, "note": note, **{each: cells[each].as_dict() for each in measures if each in cells}}
        for name, note, cells in lines
    ]
    return ["setting", *(HEADERS[each] for each in measures), ""], rows, numbers


def _cell(measure: str, estimate: Estimate | None) -> str:
    if estimate is None or estimate.value is None:
        return ""
    form, scale = ("+.3f", 1) if measure == "excess_harm" else (".1f", 100)
    text = f"{scale * estimate.value:{form}}"
    if estimate.low is None or estimate.high is None:
        return text
    ends = "+.3f" if scale == 1 else ".0f"
    return f"{text} [{scale * estimate.low:{ends}}, {scale * estimate.high:{ends}}]"


def _about(found: Result, settings: Sequence[Setting]) -> str:
    seeds = sorted({len(setting.points) for setting in settings})
    counts = []
    for suite, answers in next(iter(found.bases.values())).items():
        sizes = ", ".join(f"{len(values)} {measure}" for measure, values in answers.values.items())
        counts.append(f"{suite}: {sizes}")
    return (
        f"95 % intervals over seeds and questions; seeds a setting: {', '.join(map(str, seeds))}. Questions: "
        f"{'; '.join(counts)}. Perturbed: retain questions with a forget-token in them."
    )


def _draw(found: Result, settings: Sequence[Setting], choices: Mapping[str, Choice], suite: str, out: Path) -> None:
    """`TRADE_OFF`: retain, perturbed and excess harm over forget accuracy; `CURVE`: all of them over the field with
    most values, in order of the values and equally spaced, the base first. A line for each other combination.
    """
    axis = _axis(settings)
    cells = [setting.estimates(found.scores, suite) for setting in settings]
    bases = {name: _estimates(scores[suite].values) for name, scores in found.bases.items()}
    shown = [_value(setting, axis) for setting in settings]
    places = {each: float(place) for place, each in enumerate(dict.fromkeys(["base", *shown]))}
    lines: dict[str, list[int]] = {}
    for index, setting in enumerate(settings):
        rest = {key: value for key, value in setting.fields.items() if key != axis}
        lines.setdefault(label(rest) or f"over {axis}", []).append(index)
    chosen = {each.index for each in choices.values()}

    def panels(measures: Sequence[str], over: str | None) -> list[tuple[str, list[Series]]]:
        drawn = []
        for measure in measures:

            def points(own: Sequence[int], measure: str = measure) -> list[tuple[Estimate, Estimate]]:
                return [
                    (cells[each][over] if over else Estimate(places[shown[each]]), cells[each][measure]) for each in own
                ]

            series = [
                Series(name if len(bases) > 1 else "base", [(own[over] if over else Estimate(0.0), own[measure])], "s")
                for name, own in bases.items()
            ]
            for name, indices in lines.items():
                own = [each for each in indices if measure in cells[each]]
                series.append(
                    Series(name, points(own), "o", joined=True, notes=[shown[each] for each in own] if over else ())
                )
            if own := [each for each in range(len(settings)) if each in chosen and measure in cells[each]]:
                series.append(Series("chosen", points(own), "*"))
            drawn.append((HEADERS[measure].replace(", %", " accuracy"), series))
        return drawn

    measures = [each for each in MEASURES if all(each in own for own in bases.values())]
    about = f"on {suite} (95 % intervals over seeds and questions)"
    trade_off(panels(measures, None), axis, f"Over {axis} {about}", out / CURVE, ticks=list(places))
    if "forget" in measures and len(measures) > 1:
        over = panels([each for each in measures if each != "forget"], "forget")
        trade_off(
            over,
            "forget accuracy (less is more forgotten)",
            f"Trade-off {about}; beside the points: {axis}",
            out / TRADE_OFF,
        )


def _estimates(values: Mapping[str, Any]) -> dict[str, Estimate]:
    return {measure: over_seeds(each[None]) for measure, each in values.items()}


def _value(setting: Setting, axis: str) -> str:
    return label({axis: setting.fields[axis]}).partition("=")[2] if axis in setting.fields else "none"


def _axis(settings: Sequence[Setting]) -> str:
    """The field with most values, the recipe only where there is no other: what a line of a figure runs along."""
    values: dict[str, set[str]] = {}
    for setting in settings:
        for key, value in setting.fields.items():
            values.setdefault(key, set()).add(repr(value))
    return max(values, key=lambda key: (key != "recipe", len(values[key])), default="setting")

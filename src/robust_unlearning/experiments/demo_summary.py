"""The demo's table, its comparison at like forgetting, and its figure.

Forget strength is nats per token on held-out forget text: finer than accuracy, which is soon at chance. Added
harm is excess harm less the base's, question by question: a base model too finds some words more distracting
than others, and only what unlearning added counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from robust_unlearning import files
from robust_unlearning.errors import UserError
from robust_unlearning.evaluate.record import CLEAN, Task, by_task, excess_of, right_of
from robust_unlearning.evaluate.suite import Evaluation
from robust_unlearning.report.figures import Series, trade_off
from robust_unlearning.report.tables import markdown_table, text_table
from robust_unlearning.stats.estimates import (
    Array,
    Estimate,
    accuracy,
    mean_interval,
    over_seeds,
    paired_recovery,
    paired_reduction,
)

GENERAL, FORGET = Task("general", "cloze", "parenthesis"), Task("astronomy", "cloze", CLEAN)
LIKE = 0.05
"""Forgetting within this many nats per token counts as equal."""


@dataclass(frozen=True)
class Measured:
    """What one model answered: arrays [n] over the questions, in the suite's order.

    Attributes:
        forget: right or wrong on forget questions.
        clean: right or wrong on general questions as they are, of those that are perturbed too.
        perturbed: the same with a forget-token in front.
        control: the same with a harmless word in front.
        excess: log p of the right answer under the forget-token less that under the control, nats per token.
        forget_text: nats per token on held-out forget text.
        retain_text: nats per token on held-out retain text.
    """

    name: str
    forget: Array
    clean: Array
    perturbed: Array
    control: Array
    excess: Array
    forget_text: Estimate
    retain_text: Estimate

    @classmethod
    def of(cls, name: str, evaluation: Evaluation) -> Measured:
        """From an evaluation of the demo's suite."""
        tasks, texts = by_task(evaluation.records), evaluation.scores
        perturbed, control = tasks[GENERAL], tasks[GENERAL.control_form]
        clean = {record.id: record for record in tasks[GENERAL.clean_form]}
        return cls(
            name=name,
            forget=right_of(tasks[FORGET]),
            clean=right_of(clean[record.id] for record in perturbed),
            perturbed=right_of(perturbed),
            control=right_of(control),
            excess=excess_of(perturbed, control),
            forget_text=_text(texts["forget/text"]),
            retain_text=_text(texts["retain/text"]),
        )


def _text(score: dict[str, Any]) -> Estimate:
    return Estimate(score["nats_per_token"], score["low"], score["high"], score["stderr"], score["n"])


@dataclass(frozen=True)
class Level:
    """RNA at one noise scale, one model for each seed of the noise."""

    std: float
    models: list[Measured]

    def table(self, field: str) -> Array:
        """A field of every model, [seeds, n]."""
        return np.stack([getattr(each, field) for each in self.models])

    @property
    def forget_nats(self) -> float:
        """Forget strength: mean over seeds of nats per token on held-out forget text."""
        return float(np.mean([each.forget_text.value for each in self.models]))


@dataclass(frozen=True)
class Matched:
    """RMU where it has forgotten as much as RNA has: between steps `before` and `after`, `share` of the way."""

    before: int
    after: int
    share: float
    excess: Array
    perturbed: Array


def match(level: Level, line: Sequence[tuple[int, Measured]]) -> Matched | None:
    """RMU's per-question results interpolated to the level's forget strength; None where its line does not reach."""
    strengths = [each.forget_text.value or 0.0 for _, each in line]
    wanted = level.forget_nats
    for index in range(len(line) - 1):
        low, high = strengths[index], strengths[index + 1]
        if low != high and min(low, high) <= wanted <= max(low, high):
            share = (wanted - low) / (high - low)
            (before, a), (after, b) = line[index], line[index + 1]
            return Matched(
                before,
                after,
                share,
                (1 - share) * a.excess + share * b.excess,
                (1 - share) * a.perturbed + share * b.perturbed,
            )
    return None


def _percent(estimate: Estimate) -> str:
    data = estimate.as_dict()
    if data["value"] is None:
        return "undefined"
    if data["low"] is None:
        return f"{100 * data['value']:.1f} (no bound)"
    return f"{100 * data['value']:.1f} [{100 * data['low']:.0f}, {100 * data['high']:.0f}]"


def _nats(estimate: Estimate, sign: bool = False) -> str:
    number = "+.2f" if sign else ".2f"
    return f"{estimate.value:{number}} [{estimate.low:{number}}, {estimate.high:{number}}]"


HEADERS = (
    "model", "forget acc", "forget text", "general acc", "+control word", "+forget-token", "retain text",
    "added harm", "reduction", "recovery",
)  # fmt: skip


def _row(base: Measured, rmu: Measured, models: Sequence[Measured], name: str) -> tuple[list[str], dict[str, Any]]:
    """A model's row for people and for machines; several models are seeds of one noise scale."""
    one = models[0] if len(models) == 1 else None

    def share(field: str) -> Estimate:
        values = np.stack([getattr(each, field) for each in models])
        if one is None:
            return over_seeds(values)
        return accuracy(values[0])

    def text(field: str) -> Estimate:
        values = [getattr(each, field) for each in models]
        if one is not None:
            return values[0]
        numbers = [each.value for each in values]
        # over seeds the passages are the same: the widest of the seeds' intervals is given
        low, high = min(each.low for each in values), max(each.high for each in values)
        return Estimate(float(np.mean(numbers)), low, high, None, values[0].n, len(values))

    cells = {field: share(field) for field in ("forget", "clean", "control", "perturbed")}
    texts = {field: text(field) for field in ("forget_text", "retain_text")}
    added = np.stack([each.excess - base.excess for each in models])
    harm = over_seeds(added) if one is None else mean_interval(added[0])
    mean_perturbed = np.mean([each.perturbed for each in models], axis=0)
    reduction = paired_reduction(base.perturbed, mean_perturbed)
    recovery = paired_recovery(base.perturbed, rmu.perturbed, mean_perturbed)
    is_base, is_rna = one is base, one is None
    shown = [
        name,
        _percent(cells["forget"]),
        _nats(texts["forget_text"]),
        _percent(cells["clean"]),
        _percent(cells["control"]),
        _percent(cells["perturbed"]),
        _nats(texts["retain_text"]),
        "" if is_base else _nats(harm, sign=True),
        "" if is_base else _percent(reduction),
        _percent(recovery) if is_rna else "",
    ]
    data = {key: each.as_dict() for key, each in {**cells, **texts}.items()}
    if not is_base:
        data |= {"added_harm": harm.as_dict(), "reduction": reduction.as_dict()}
    if is_rna:
        data["recovery"] = recovery.as_dict()
    return shown, {"name": name, "seeds": len(models), **data}


def _verdict(level: Level, line: Sequence[tuple[int, Measured]]) -> tuple[list[str], dict[str, Any]]:
    """RNA against RMU of like forgetting, question by question."""
    matched = match(level, line)
    name = f"RNA {level.std:g}"
    if matched is None:
        reach = ", ".join(f"{each.forget_text.value:.2f}" for _, each in line)
        said = f"no like RMU: {level.forget_nats:.2f} nats lies outside RMU's {reach}"
        return [name, "-", f"{level.forget_nats:.2f}", "-", "-", said], {
            "noise_std": level.std,
            "verdict": said,
        }
    step = f"RMU, steps {matched.before} to {matched.after}, {100 * matched.share:.0f} % of the way"
    row, data = _against(level, step, level.forget_nats, matched.excess, matched.perturbed)
    return row, {**data, "matched_steps": [matched.before, matched.after], "share": matched.share}


def _against(level: Level, name: str, nats: float, excess: Array, perturbed: Array) -> tuple[list[str], dict[str, Any]]:
    """RNA's harm and accuracy less another model's, the same questions, with what the intervals say."""
    harm = over_seeds(level.table("excess") - excess)
    right = over_seeds(level.table("perturbed") - perturbed)
    low, high = harm.low or 0.0, harm.high or 0.0
    if low > 0:
        said = "RNA is more robust" if nats <= level.forget_nats + LIKE else "RNA harms less, but forgot less"
    elif high < 0:
        said = "RNA is less robust" if nats >= level.forget_nats - LIKE else "RNA harms more, but forgot more"
    else:
        said = "cannot be told"
    texts = f"{level.forget_nats:.2f} / {nats:.2f}"
    row = [f"RNA {level.std:g}", name, texts, _nats(harm, sign=True), _percent(right), said]
    data = {"harm_difference": harm.as_dict(), "perturbed_difference": right.as_dict(), "verdict": said}
    return row, {"noise_std": level.std, "against": name, "forget_text": [level.forget_nats, nats], **data}


def report(
    base: Measured,
    line: Sequence[tuple[int, Measured]],
    slower: Measured,
    levels: Sequence[Level],
    out: Path,
    about: str,
) -> str:
    """Write `demo.md`, `demo.json` and the figure, `demo.png`, .svg and .csv; returns the text for the terminal.

    Args:
        base: the base model.
        line: RMU at ascending steps, the finished run last.
        slower: RMU with a heavier retain weight and no noise.
        levels: RNA by noise scale.
        out: folder to write into.
        about: one sentence on what was run.
    """
    rmu = line[-1][1]
    rows = [_row(base, rmu, [base], "base"), *(_row(base, rmu, [each], each.name) for _, each in line)]
    rows.append(_row(base, rmu, [slower], slower.name))
    rows += [_row(base, rmu, level.models, f"RMU + RNA {level.std:g} ({len(level.models)} seeds)") for level in levels]
    verdicts = [_verdict(level, line) for level in levels]
    slow = slower.forget_text.value or 0.0
    nearest = min(levels, key=lambda each: abs(each.forget_nats - slow))
    verdicts.append(_against(nearest, slower.name, slow, slower.excess, slower.perturbed))
    notes = [
        f"What was run: {about}.",
        f"Accuracies in % with 95 % intervals ({len(base.forget)} forget and {len(base.clean)} general questions; "
        "chance is 25 %); text in nats a token on held-out passages; several seeds: interval over seeds and questions.",
        "Added harm: what the forget-token takes from the right answer's log-probability beyond what a harmless word "
        "takes, less the same for the base; nats a token, negative is harm.",
        "Like forgetting: RNA against RMU stopped where it had forgotten as much (between two steps), and against RMU "
        "that was slowed by a heavier retain weight instead of noise. Differences are RNA less the "
        "other; a positive one speaks for RNA; where the "
        "control forgets no less and harms no more, noise was not needed.",
        "Reduction: share of the base's accuracy with a forget-token that was lost. Recovery: share of RMU's loss that "
        "RNA won back. Read both beside the forgetting.",
    ]
    headers = ("model", "against", "forget text of both", "harm difference", "accuracy difference", "verdict")
    fair = [row for row, _ in verdicts]
    files.write_text(
        out / "demo.md",
        "\n\n".join(
            ["# Demo", *notes, markdown_table(HEADERS, [row for row, _ in rows]), "## At like forgetting",
             markdown_table(headers, fair), "![trade-off](demo.png)"]
        ) + "\n",
    )  # fmt: skip
    files.write_json(
        out / "demo.json",
        {
            "about": about,
            "models": [data for _, data in rows],
            "like_forgetting": [data for _, data in verdicts],
        },
    )
    try:
        _draw(base, line, slower, levels, out / "demo.png")
    except UserError as error:
        notes.append(f"No figure: {error}")
    table = text_table(HEADERS, [row for row, _ in rows])
    return "\n".join([table, "", "At like forgetting:", text_table(headers, fair), "", *notes])


def _draw(
    base: Measured, line: Sequence[tuple[int, Measured]], slower: Measured, levels: Sequence[Level], path: Path
) -> None:
    """Two panels over forget strength: added harm, and accuracy with a forget-token in the question."""

    def harm(model: Measured) -> Estimate:
        return mean_interval(model.excess - base.excess)

    def right(model: Measured) -> Estimate:
        return accuracy(model.perturbed)

    panels = []
    for label, measure in (
        ("added harm of a forget-token\n(nats per answer token; 0 is none)", harm),
        ("accuracy with a forget-token in the question", right),
    ):
        zero = Estimate(0.0) if measure is harm else right(base)
        series = [Series("base", [(base.forget_text, zero)], "s")]
        points = [(each.forget_text, measure(each)) for _, each in line]
        series.append(Series("RMU, by step", points, "o", True, [str(step) for step, _ in line]))
        series.append(Series(f"{slower.name} (no noise)", [(slower.forget_text, measure(slower))], "^"))
        for level in levels:
            own = [(each.forget_text, measure(each)) for each in level.models]
            series.append(Series(f"RMU + RNA {level.std:g}, {len(own)} seeds", own, "D"))
        panels.append((label, series))
    trade_off(
        panels,
        "forgetting: nats per token on held-out forget text (more is stronger)",
        "What a forget-token in a harmless question costs, at each degree of forgetting (95 % intervals)",
        path,
    )

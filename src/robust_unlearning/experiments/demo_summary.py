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
from robust_unlearning.experiments.matched import Place, place_on
from robust_unlearning.report.figures import Series, trade_off
from robust_unlearning.report.tables import Column, Table
from robust_unlearning.stats.estimates import (
    Array,
    Estimate,
    accuracy,
    mean_interval,
    over_seeds,
    paired_recovery,
    paired_reduction,
)
from robust_unlearning.stats.format import PERCENT, Form

GENERAL, FORGET = Task("general", "cloze", "parenthesis"), Task("astronomy", "cloze", CLEAN)
LIKE = 0.05
"""Forgetting within this many nats per token counts as equal."""
TEXT, HARM = Form(".2f", ".2f"), Form("+.2f", "+.2f")
COLUMNS: dict[str, str | Column] = {
    "name": "model",
    "forget": Column("forget acc", PERCENT),
    "forget_text": Column("forget text", TEXT),
    "clean": Column("general acc", PERCENT),
    "control": Column("+control word", PERCENT),
    "perturbed": Column("+forget-token", PERCENT),
    "retain_text": Column("retain text", TEXT),
    "added_harm": Column("added harm", HARM),
    "reduction": Column("reduction", PERCENT),
    "recovery": Column("recovery", PERCENT),
}
MATCHED: dict[str, str | Column] = {
    "name": "model",
    "against": "against",
    "texts": "forget text of both",
    "harm_difference": Column("harm difference", HARM),
    "perturbed_difference": Column("accuracy difference", PERCENT),
    "verdict": "verdict",
}
FOR_PEOPLE = ("name", "texts")
"""What `MATCHED` shows and the JSON has in numbers."""


@dataclass(frozen=True)
class DemoAnswers:
    """What one model answered in the demo's suite: arrays [n] over the questions, in the suite's order.

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
    def of(cls, evaluation: Evaluation, name: str = "") -> DemoAnswers:
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

    @property
    def forget_nats(self) -> float:
        """Forget strength."""
        return self.forget_text.value or 0.0


def _text(score: dict[str, Any]) -> Estimate:
    return Estimate(score["nats_per_token"], score["low"], score["high"], score["stderr"], score["n"])


Line = Sequence[tuple[int, DemoAnswers]]
"""RMU at ascending steps, the finished run last."""


@dataclass(frozen=True)
class Level:
    """RNA at one noise scale, one model for each seed of the noise."""

    std: float
    models: list[DemoAnswers]

    @property
    def forget_nats(self) -> float:
        """Forget strength, mean over seeds."""
        return float(np.mean([model.forget_nats for model in self.models]))

    def match(self, line: Line) -> Place | None:
        """Where RMU has forgotten as much; None where its line does not reach."""
        return place_on([model.forget_nats for _, model in line], self.forget_nats)


def report(base: DemoAnswers, line: Line, slower: DemoAnswers, levels: Sequence[Level], out: Path, about: str) -> str:
    """Write `demo.md`, `demo.json` and the figure, `demo.png`, .svg and .csv; returns the text for the terminal.

    Args:
        base: the base model.
        line: RMU by step.
        slower: RMU with a heavier retain weight and no noise.
        levels: RNA by noise scale.
        out: folder to write into.
        about: one sentence on what was run.
    """
    rmu = line[-1][1]
    models = [_row(base, rmu, [model], model.name) for model in (base, *(model for _, model in line), slower)]
    models += [
        _row(base, rmu, level.models, f"RMU + RNA {level.std:g} ({len(level.models)} seeds)") for level in levels
    ]
    verdicts = [_at_like_forgetting(level, line) for level in levels]
    near = min(levels, key=lambda level: abs(level.forget_nats - slower.forget_nats))
    verdicts.append(_against(near, slower.name, slower.forget_nats, slower.excess, slower.perturbed))
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
    table, matched = Table("Demo", COLUMNS, models), Table("At like forgetting", MATCHED, verdicts)
    parts = [f"# {table.title}", *notes, table.markdown(), f"## {matched.title}", matched.markdown()]
    files.write_text(out / "demo.md", "\n\n".join([*parts, "![trade-off](demo.png)"]) + "\n")
    like_forgetting = [{key: value for key, value in row.items() if key not in FOR_PEOPLE} for row in matched.as_json()]
    data = {"about": about, "models": table.as_json(), "like_forgetting": like_forgetting}
    files.write_json(out / "demo.json", data)
    try:
        _draw(base, line, slower, levels, out / "demo.png")
    except UserError as error:
        notes.append(f"No figure: {error}")
    return "\n".join([table.text(), "", matched.title, matched.text(), "", *notes])


def _row(base: DemoAnswers, rmu: DemoAnswers, models: Sequence[DemoAnswers], name: str) -> dict[str, Any]:
    """A model's row; several models are seeds of one noise scale."""
    one = models[0] if len(models) == 1 else None

    def share(field: str) -> Estimate:
        values = [getattr(model, field) for model in models]
        return accuracy(values[0]) if one else over_seeds(np.stack(values))

    def text(field: str) -> Estimate:
        values = [getattr(model, field) for model in models]
        if one:
            return values[0]
        mean = float(np.mean([value.value for value in values]))
        # over seeds the passages are the same: the widest of the seeds' intervals is given
        low, high = min(value.low for value in values), max(value.high for value in values)
        return Estimate(mean, low, high, None, values[0].n, len(values))

    row: dict[str, Any] = {"name": name, "seeds": len(models)}
    row |= {field: share(field) for field in ("forget", "clean", "control", "perturbed")}
    row |= {field: text(field) for field in ("forget_text", "retain_text")}
    perturbed = np.mean([model.perturbed for model in models], axis=0)
    if one is not base:
        added = np.stack([model.excess - base.excess for model in models])
        row["added_harm"] = mean_interval(added[0]) if one else over_seeds(added)
        row["reduction"] = paired_reduction(base.perturbed, perturbed)
    if not one:
        row["recovery"] = paired_recovery(base.perturbed, rmu.perturbed, perturbed)
    return row


def _at_like_forgetting(level: Level, line: Line) -> dict[str, Any]:
    """RNA against RMU of like forgetting, question by question."""
    nats, place = level.forget_nats, level.match(line)
    if place is None:
        reach = ", ".join(f"{model.forget_nats:.2f}" for _, model in line)
        verdict = f"no like RMU: {nats:.2f} nats lies outside RMU's {reach}"
        return {"name": f"RNA {level.std:g}", "texts": f"{nats:.2f}", "noise_std": level.std, "verdict": verdict}
    (before, after), share = (line[place.index + side][0] for side in (0, 1)), place.share
    name = f"RMU, steps {before} to {after}, {100 * share:.0f} % of the way"
    excess, perturbed = (place.of([getattr(model, key) for _, model in line]) for key in ("excess", "perturbed"))
    return {**_against(level, name, nats, excess, perturbed), "matched_steps": [before, after], "share": share}


def _against(level: Level, name: str, nats: float, excess: Array, perturbed: Array) -> dict[str, Any]:
    """RNA's harm and accuracy less another model's, the same questions, with what the intervals say."""
    harm = over_seeds(np.stack([model.excess - excess for model in level.models]))
    low, high, own = harm.low or 0.0, harm.high or 0.0, level.forget_nats
    if low > 0:
        verdict = "RNA is more robust" if nats <= own + LIKE else "RNA harms less, but forgot less"
    elif high < 0:
        verdict = "RNA is less robust" if nats >= own - LIKE else "RNA harms more, but forgot more"
    else:
        verdict = "cannot be told"
    return {
        "name": f"RNA {level.std:g}",
        "noise_std": level.std,
        "against": name,
        "texts": f"{own:.2f} / {nats:.2f}",
        "forget_text": [own, nats],
        "harm_difference": harm,
        "perturbed_difference": over_seeds(np.stack([model.perturbed - perturbed for model in level.models])),
        "verdict": verdict,
    }


def _draw(base: DemoAnswers, line: Line, slower: DemoAnswers, levels: Sequence[Level], path: Path) -> None:
    """Two panels over forget strength: added harm, and accuracy with a forget-token in the question."""

    def harm(model: DemoAnswers) -> Estimate:
        return Estimate(0.0) if model is base else mean_interval(model.excess - base.excess)

    def right(model: DemoAnswers) -> Estimate:
        return accuracy(model.perturbed)

    panels = []
    for label, measure in (
        ("added harm of a forget-token\n(nats per answer token; 0 is none)", harm),
        ("accuracy with a forget-token in the question", right),
    ):

        def series(name: str, models: Sequence[DemoAnswers], marker: str, steps: Sequence[str] = ()) -> Series:
            points = [(model.forget_text, measure(model)) for model in models]  # noqa: B023
            return Series(name, points, marker, bool(steps), steps)

        own = [series("base", [base], "s")]
        own.append(series("RMU, by step", [model for _, model in line], "o", [str(step) for step, _ in line]))
        own.append(series(f"{slower.name} (no noise)", [slower], "^"))
        own += [series(f"RMU + RNA {level.std:g}, {len(level.models)} seeds", level.models, "D") for level in levels]
        panels.append((label, own))
    trade_off(
        panels,
        "forgetting: nats per token on held-out forget text (more is stronger)",
        "What a forget-token in a harmless question costs, at each degree of forgetting (95 % intervals)",
        path,
    )

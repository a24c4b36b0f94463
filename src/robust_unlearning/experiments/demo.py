"""`unlearn demo`: base against RMU against RMU with RNA on a small real model, compared at like forgetting.

Noise that has merely stopped the forgetting looks like a cure and is not. So RMU is also stopped early, at
`SNAPSHOTS`, which traces what robustness each degree of forgetting costs without noise; RNA's models are set
against the point of that curve where RMU has forgotten as much (`matched`). And because noise also slows the
forgetting, RMU with a heavier retain weight, `SLOWER`, is trained as a control: slow without noise.

Forgetting is nats per token on held-out forget text beyond the base's: finer than accuracy, which is soon at chance.
Added harm is excess harm less the base's, question by question: a base model too finds some words more distracting
than others, and only what unlearning added counts.

Every model is a run folder or a snapshot in the demo's folder, and every evaluation is kept, so a demo that was
stopped continues where it was.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from robust_unlearning import files
from robust_unlearning.errors import UserError
from robust_unlearning.evaluate.record import CLEAN, Task, by_task, excess_of, right_of
from robust_unlearning.evaluate.suite import Evaluation, Suite, load_suite
from robust_unlearning.experiments.grid import Point, override_words, point_of
from robust_unlearning.experiments.matched import effect_of, for_machines, matches
from robust_unlearning.experiments.runner import Runner
from robust_unlearning.models.checkpoint import pick_device, quick_dtype
from robust_unlearning.recipe import Recipe, load_recipe
from robust_unlearning.report.figures import Series, trade_off
from robust_unlearning.report.tables import INCONCLUSIVE, Column, Table
from robust_unlearning.stats import paired
from robust_unlearning.stats.effects import Effect
from robust_unlearning.stats.estimates import Array, Estimate, accuracy
from robust_unlearning.stats.factors import Groups
from robust_unlearning.stats.format import PERCENT, NumberForm
from robust_unlearning.stats.means import mean_interval, over_seeds, share_over_seeds

RECIPE = "smollm2/rmu"
NOISE_LEVELS = (1.0, 3.0)
NOISE_SEEDS = (0, 1, 2)
SNAPSHOTS = (30, 35, 40, 45, 52, 60, 70)
SLOWER = 300
"""Retain weight of the control, against 100 of the others."""
OWN_FIELDS = {
    "noise_std",
    "noise_variance",
    "noise_seed",
    "retain_weight",
    "snapshots",
    "topics.astronomy.retain_weight",
}
"""What makes the demo's models differ, so no override may set it."""


def points_of(overrides: Sequence[str]) -> list[Point]:
    """The demo's runs: RMU with its snapshots, the slower control, RNA at each noise level and seed of the noise.

    Raises:
        UserError: an override of what makes the demo's models differ.
    """
    taken = {text.partition("=")[0].strip() for text in overrides} & OWN_FIELDS
    if taken:
        raise UserError(f"the demo sets {', '.join(sorted(taken))} itself; use `unlearn run {RECIPE}` to choose.")
    steps = load_recipe(RECIPE, overrides).steps
    snapshots = [step for step in SNAPSHOTS if step < steps]
    settings: dict[str, dict[str, Any]] = {"rmu": {"snapshots": snapshots}, "rmu-slower": {"retain_weight": SLOWER}}
    for std in NOISE_LEVELS:
        settings |= {_rna(std, seed): {"noise_std": std, "noise_seed": seed} for seed in NOISE_SEEDS}
    common = [f"dtype={quick_dtype(pick_device('auto'))}", *overrides]
    return [
        point_of(RECIPE, fields, [*common, *override_words(fields)], name, fields.get("snapshots", ()))
        for name, fields in settings.items()
    ]


def _rna(std: float, seed: int) -> str:
    return f"rna-{std:g}-seed{seed}"


def run_demo(out: Path, overrides: Sequence[str] = ()) -> None:
    """Train, evaluate, print the table, and write `demo.md`, `demo.json` and the figure into `out`.

    Args:
        out: the demo's folder; one that was begun before, with the same overrides, is continued.
        overrides: `field=value` changes to the recipe of every run.

    Raises:
        UserError: the folder holds a demo with other settings, or a run failed.
    """
    suite = load_suite("demo")
    points = points_of(overrides)
    runner = Runner(points, {"suite": suite}, out, DemoAnswers.of, one_base=True, strict=True).run()
    recipe = points[0].recipe
    last = recipe.steps

    def answers(name: str, run: str, step: int = last) -> DemoAnswers:
        return replace(runner.models[run, step]["suite"], name=name)

    line = [(step, answers(f"RMU, step {step}", "rmu", step)) for step in (*points[0].earlier, last)]
    slower = answers(f"RMU, retain weight {SLOWER:g}", "rmu-slower")
    levels = {
        std: [answers(f"RNA {std:g}, seed {seed}", _rna(std, seed)) for seed in NOISE_SEEDS] for std in NOISE_LEVELS
    }
    text = report(replace(runner.base["suite"], name="base"), line, slower, levels, out, _about(suite, recipe))
    print(f"\n{text}\n\nwritten: {out / 'demo.md'}, .json, .png, .svg, .csv; runs in {out / 'runs'}")


def _about(suite: Suite, recipe: Recipe) -> str:
    general, forget = suite.questions["general"], suite.questions["astronomy"]
    held_out = files.locate(suite.texts["forget"].path).read_text(encoding="utf-8").splitlines()
    return (
        f"{recipe.model}, {recipe.title} at layer {recipe.layer}, {recipe.steps} steps of {recipe.batch_size} × "
        f"{recipe.max_tokens} tokens, {recipe.dtype}; general questions {general.path}, forget questions {forget.path} "
        f"(answer texts scored); {len(held_out)} held-out passages of forget text"
    )


GENERAL, FORGET = Task("general", "cloze", "parenthesis"), Task("astronomy", "cloze", CLEAN)
LIKE = 0.05
"""Forgetting within this many nats per token counts as equal."""
WINDOW = 1.5
"""Nats per token within which a snapshot must lie on either side of a match: text moves further than answers."""
TEXT, HARM = NumberForm(".2f", ".2f"), NumberForm("+.2f", "+.2f")
COLUMNS: dict[str, str | Column] = {
    "name": "model",
    "forget": Column("forget acc", PERCENT),
    "forget_text": Column("forget text", TEXT),
    "forgotten": Column("forgotten", TEXT),
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
    "span": "forgotten, both",
    "harm_difference": Column("harm difference", HARM),
    "perturbed_difference": Column("accuracy difference", PERCENT),
    "verdict": "verdict",
}


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


def _text(score: dict[str, Any]) -> Estimate:
    return Estimate(score["nats_per_token"], score["low"], score["high"], score["stderr"], score["n"])


Line = Sequence[tuple[int, DemoAnswers]]
"""RMU at ascending steps, the finished run last."""
Levels = Mapping[float, Sequence[DemoAnswers]]
"""RNA by noise scale, a model for each seed of the noise."""


def forgotten(models: Sequence[DemoAnswers], base: DemoAnswers) -> float:
    """Mean over models of nats per token on held-out forget text, less the base's."""
    return sum(model.forget_text.value or 0.0 for model in models) / len(models) - (base.forget_text.value or 0.0)


def at_like_forgetting(
    models: Sequence[DemoAnswers], line: Line, base: DemoAnswers, key: Literal["excess", "perturbed"]
) -> tuple[Effect | None, list[float]]:
    """RNA's models, one a seed of the noise, less RMU where that has forgotten as much; and at what forgetting."""

    def of(model: DemoAnswers) -> tuple[Array, Array]:
        return np.array([forgotten([model], base)]), getattr(model, key)

    plain = [base, *(model for _, model in line)]
    found = {seed: matches([model], plain, of, WINDOW) for seed, model in enumerate(models)}
    return effect_of(found, Groups(), Groups()), [each.at for of_seed in found.values() for each in of_seed]


def report(base: DemoAnswers, line: Line, slower: DemoAnswers, levels: Levels, out: Path, about: str) -> str:
    """Write `demo.md`, `demo.json` and the figure, `demo.png`, .svg and .csv; returns the text for the terminal.

    Args:
        slower: RMU with a heavier retain weight and no noise.
        out: folder to write into.
        about: one sentence on what was run.
    """
    alone = {model.name: [model] for model in (base, *(model for _, model in line), slower)}
    several = {f"RMU + RNA {std:g} ({len(models)} seeds)": models for std, models in levels.items()}
    rows = [_row(name, models, base, line[-1][1]) for name, models in {**alone, **several}.items()]
    nats = forgotten([slower], base)
    near = min(levels, key=lambda std: abs(forgotten(levels[std], base) - nats))
    pairs = [_at_like_forgetting(std, models, line, base) for std, models in levels.items()]
    pairs.append(_against_slower(near, levels[near], slower, base))
    _judge(pairs)
    notes = [
        f"What was run: {about}.",
        f"Accuracies in % with 95 % intervals ({len(base.forget)} forget and {len(base.clean)} general questions; "
        "chance is 25 %); text in nats a token on held-out passages, forgotten: beyond the base. Several seeds: an "
        "interval says how far the number may move with other seeds of the noise and other questions. All models have "
        "one training seed, so whatever is said is of these models.",
        "Added harm: what the forget-token takes from the right answer's log-probability beyond what a harmless word "
        "takes, less the same for the base; nats a token, negative is harm.",
        "Like forgetting: RNA against RMU stopped where it had forgotten as much (on a monotone curve through its "
        f"snapshots, with one within {WINDOW} nats on either side; how far it may be off between them is part of the "
        "interval), and against RMU "
        "that was slowed by a heavier retain weight instead of noise. Differences are RNA less the "
        "other; a positive one speaks for RNA; where the "
        "control forgets no less and harms no more, noise was not needed.",
        "Reduction: share of the base's accuracy with a forget-token that was lost. Recovery: share of RMU's loss that "
        "RNA won back. Read both beside the forgetting.",
    ]
    table, matched = Table("Demo", COLUMNS, rows), Table("At like forgetting", MATCHED, pairs)
    parts = [f"# {table.title}", *notes, table.markdown(), f"## {matched.title}", matched.markdown()]
    files.write_text(out / "demo.md", "\n\n".join([*parts, "![trade-off](demo.png)"]) + "\n")
    data = {"about": about, "models": table.as_json(), "like_forgetting": for_machines(matched)}
    files.write_json(out / "demo.json", data)
    try:
        _draw(base, line, slower, levels, out / "demo.png")
    except UserError as error:
        notes.append(f"No figure: {error}")
    return "\n".join([table.text(), "", matched.title, matched.text(), "", *notes])


def _row(name: str, models: Sequence[DemoAnswers], base: DemoAnswers, rmu: DemoAnswers) -> dict[str, Any]:
    """A model's row; several models are seeds of one noise scale."""
    alone = len(models) == 1

    def values(field: str) -> Array:
        return np.stack([getattr(model, field) for model in models])

    def text(field: str) -> Estimate:
        first, *others = [getattr(model, field) for model in models]
        if alone:
            return first
        mean = float(np.mean([first.value, *(text.value for text in others)]))
        # over seeds the passages are the same: the widest of the seeds' intervals is given
        low, high = min(first.low, *(text.low for text in others)), max(first.high, *(text.high for text in others))
        return Estimate(mean, low, high, None, first.n, len(models))

    row: dict[str, Any] = {"name": name, "seeds": len(models)}
    for field in ("forget", "clean", "control", "perturbed"):
        row[field] = share_over_seeds(values(field))
    row |= {field: text(field) for field in ("forget_text", "retain_text")}
    if models[0] is not base:
        row["forgotten"] = _beyond(text("forget_text"), base.forget_text)
        row["added_harm"] = over_seeds(values("excess") - base.excess)
        row["reduction"] = paired.reduction([base.perturbed], values("perturbed"))
    if not alone:
        row["recovery"] = paired.recovery([base.perturbed], [rmu.perturbed], values("perturbed"))
    return row


def _beyond(text: Estimate, base: Estimate) -> Estimate:
    """Nats of a text beyond the base's. The passages are the same and their nats go together, so that both intervals
    taken as independent give one that errs to the wide side.
    """
    value = (text.value or 0.0) - (base.value or 0.0)
    down = math.hypot((text.value or 0.0) - (text.low or 0.0), (base.high or 0.0) - (base.value or 0.0))
    up = math.hypot((text.high or 0.0) - (text.value or 0.0), (base.value or 0.0) - (base.low or 0.0))
    return Estimate(value, value - down, value + up, n=text.n, seeds=text.seeds)


def _at_like_forgetting(std: float, models: Sequence[DemoAnswers], line: Line, base: DemoAnswers) -> dict[str, Any]:
    """RNA against RMU of like forgetting, question by question."""
    (harm, at), (perturbed, _) = (at_like_forgetting(models, line, base, key) for key in ("excess", "perturbed"))
    if harm is None or perturbed is None:
        reach = ", ".join(f"{forgotten([model], base):.2f}" for _, model in line)
        nats = forgotten(models, base)
        verdict = f"nothing to compare: {nats:.2f} nats, RMU {reach}, not on both sides within {WINDOW}"
        return {"name": f"RNA {std:g}", "span": f"{nats:.2f}", "noise_std": std, "verdict": verdict}
    nats = float(np.mean(at))
    name = f"RMU, stopped there ({len(at)} of {len(models)} seeds)"
    return _compared(std, name, (nats, nats), harm.estimate(), perturbed.estimate())


def _against_slower(
    std: float, models: Sequence[DemoAnswers], slower: DemoAnswers, base: DemoAnswers
) -> dict[str, Any]:
    """RNA against RMU that a heavier retain weight has slowed, the same questions."""
    harm, perturbed = (
        over_seeds(np.stack([getattr(model, key) - getattr(slower, key) for model in models]))
        for key in ("excess", "perturbed")
    )
    return _compared(std, slower.name, (forgotten(models, base), forgotten([slower], base)), harm, perturbed)


def _compared(
    std: float, against: str, nats: tuple[float, float], harm: Estimate, perturbed: Estimate
) -> dict[str, Any]:
    """RNA's harm and accuracy less another model's, and what both have forgotten."""
    return {
        "name": f"RNA {std:g}",
        "noise_std": std,
        "against": against,
        "span": f"{nats[0]:.2f} / {nats[1]:.2f}",
        "forgotten": list(nats),
        "harm_difference": harm,
        "perturbed_difference": perturbed,
    }


def _judge(rows: Sequence[dict[str, Any]]) -> None:
    """Give each compared row its verdict, by Holm's p among all of them."""
    compared = [row for row in rows if "harm_difference" in row]
    for row, p in zip(compared, paired.holm([row["harm_difference"].p() for row in compared]), strict=True):
        own, other = row["forgotten"]
        if p >= paired.ALPHA:
            verdict: str = INCONCLUSIVE
        elif row["harm_difference"].value > 0:
            verdict = "RNA is more robust" if other <= own + LIKE else "RNA harms less, but forgot less"
        else:
            verdict = "RNA is less robust" if other >= own - LIKE else "RNA harms more, but forgot more"
        row["verdict"] = verdict + ", of these models" * (verdict != INCONCLUSIVE)


def _draw(base: DemoAnswers, line: Line, slower: DemoAnswers, levels: Levels, path: Path) -> None:
    """Two panels over forget strength: added harm, and accuracy with a forget-token in the question."""

    def harm(model: DemoAnswers) -> Estimate:
        return Estimate(0.0) if model is base else mean_interval(model.excess - base.excess)

    def right(model: DemoAnswers) -> Estimate:
        return accuracy(model.perturbed)

    steps = [str(step) for step, _ in line]
    groups: list[tuple[str, Sequence[DemoAnswers], str, Sequence[str]]] = [
        ("base", [base], "s", ()),
        ("RMU, by step", [model for _, model in line], "o", steps),
        (f"{slower.name} (no noise)", [slower], "^", ()),
        *((f"RMU + RNA {std:g}, {len(models)} seeds", models, "D", ()) for std, models in levels.items()),
    ]
    panels = []
    for label, measure in (
        ("added harm of a forget-token\n(nats per answer token; 0 is none)", harm),
        ("accuracy with a forget-token in the question", right),
    ):
        series = [
            Series(name, [(model.forget_text, measure(model)) for model in models], marker, marker == "o", notes)
            for name, models, marker, notes in groups
        ]
        panels.append((label, series))
    trade_off(
        panels,
        "forgetting: nats per token on held-out forget text (more is stronger)",
        "What a forget-token in a harmless question costs, at each degree of forgetting (95 % intervals)",
        path,
    )

"""The paper's theory on real models: Assumption 4.1, Theorem 4.2, Theorem 5.2, and Eq. 5 to 9, at one layer.

Noise scales are given relative to the base: a scale of 1 is the root mean square of its hidden state at layer l at the
last token of the questions, so that one table reads alike for models of any width.

Shapes: n questions or documents, d width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice

import numpy as np
import torch

from robust_unlearning.analyze.derivatives import gaussian, gradients
from robust_unlearning.analyze.inputs import Prompt, batches, groups_of, joined
from robust_unlearning.analyze.variants import Variants
from robust_unlearning.recipe import Recipe
from robust_unlearning.reproduce.theory.curvature import LossChange, loss_change
from robust_unlearning.reproduce.theory.latent import Latent
from robust_unlearning.reproduce.theory.output_change import OutputChange, output_change
from robust_unlearning.reproduce.theory.rejection import rejects
from robust_unlearning.reproduce.theory.shift import Shift, describe
from robust_unlearning.stats.estimates import Array


@dataclass(frozen=True)
class TheorySettings:
    """What is measured with.

    Attributes:
        layer: l.
        scales: noise scales in units of the base's root mean square at l.
        prompts: questions on which Theorem 4.2 is measured.
        draws: of ε for Theorem 4.2, at least 20.
        probes: of the latent Hessian, a document.
        injections: draws of δ₁ and δ₂ for Theorem 5.2.
        seed: of all of them.
    """

    layer: int
    scales: Sequence[float] = (0.03, 0.1, 0.3, 1.0)
    prompts: int = 8
    draws: int = 32
    probes: int = 4
    injections: int = 4
    seed: int = 0


@dataclass(frozen=True)
class AnswerChange:
    """What a forget-token does to the loss of the right answer; a number a question [n].

    Attributes:
        change: ΔJ: loss in the forget form less loss in the clean form, nats.
        r: ‖g_per‖ / ‖g‖, gradients with respect to all of the prompt's hidden states at l.
        injected: √ν -> share of injections that reject the change: noise on the hidden states of both forms, which
            makes Assumption 5.1 true by hand. Empty for models trained with RNA, of which it is not assumed.
    """

    change: Array
    r: Array
    injected: Mapping[float, Array] = field(default_factory=dict)


@dataclass(frozen=True)
class Measurements:
    """Everything that was measured of one target.

    Attributes:
        shifts: where the token stands -> form (`forget-token`, `control`) -> its shift against the clean question.
        output: √η -> Theorem 4.2; the last one is the η that forget-tokens were measured to cause.
        loss: Eq. 5 to 9 on forget text, at the settings' scales.
        answers: where the token stands -> Theorem 5.2.
    """

    name: str
    recipe: Recipe | None
    shifts: Mapping[str, Mapping[str, Shift]]
    output: Mapping[float, OutputChange]
    loss: LossChange
    answers: Mapping[str, AnswerChange]


def unit(latent: Latent, questions: Mapping[str, Sequence[Prompt]], pad: int) -> float:
    """The root mean square of z's elements at the questions' last tokens: what a noise scale of 1 stands for."""
    states = latent.states([each.clean for group in questions.values() for each in group], pad)
    return float(np.sqrt((states**2).mean()))


def measure(
    variants: Variants,
    questions: Mapping[str, Sequence[Prompt]],
    documents: Sequence[Sequence[int]],
    settings: TheorySettings,
    tick: Callable[[str], None],
) -> tuple[float, list[Measurements]]:
    """Every model on the same questions, documents and draws.

    Args:
        questions: where the token stands -> prompts.
        documents: forget text, as tokens.
        tick: called with the name of each model when it begins.

    Returns:
        The unit of the noise scales, and what was measured.

    Raises:
        UserError: fewer than 20 questions or draws.
    """
    latent = Latent(variants.model, settings.layer)
    scale = unit(latent, questions, variants.pad)
    stds = [scale * relative for relative in settings.scales]
    measured = []
    for variant in variants.all:
        tick(variant.name)
        with variant.applied(variants.model):
            shifts = {where: shifts_of(latent, group, variants.pad) for where, group in questions.items()}
            eta = next(iter(shifts.values()))["forget-token"].eta.value or 0.0
            recipe = variant.recipe()
            injected = [] if recipe is not None and recipe.rna_std else stds
            output = output_of(latent, questions, variants.pad, [*stds, eta**0.5], settings)
            loss = loss_of(latent, documents, variants.pad, stds, settings)
            answers = {
                where: answers_of(latent, group, variants.pad, injected, settings) for where, group in questions.items()
            }
            measured.append(Measurements(variant.name, recipe, shifts, output, loss, answers))
    return scale, measured


def shifts_of(latent: Latent, group: Sequence[Prompt], pad: int) -> dict[str, Shift]:
    """Assumption 4.1 for the forget-token, and the same for the control word."""
    clean, forget, control = (
        latent.states([getattr(each, form) for each in group], pad) for form in ("clean", "forget", "control")
    )
    forms, groups = {"forget-token": forget, "control": control}, groups_of(group)
    return {form: describe(states - clean, clean, groups) for form, states in forms.items()}


def first_prompts(questions: Mapping[str, Sequence[Prompt]], count: int) -> list[Prompt]:
    """The first questions, each once and not once a place."""
    once = {prompt.clean: prompt for group in questions.values() for prompt in group}
    return list(once.values())[:count]


def output_of(
    latent: Latent, questions: Mapping[str, Sequence[Prompt]], pad: int, stds: Sequence[float], settings: TheorySettings
) -> dict[float, OutputChange]:
    """Theorem 4.2 on clean questions, at each √η."""
    generator = torch.Generator().manual_seed(settings.seed)
    clean = [prompt.clean for prompt in first_prompts(questions, settings.prompts)]
    parts = []
    for batch in batches(clean, pad):
        trunk, hidden = latent.enter(batch)
        etas = [std**2 for std in stds]
        parts.append(output_change(latent.output(trunk), hidden, trunk.mask, etas, settings.draws, generator))
    return {std: joined(column) for std, column in zip(stds, zip(*parts, strict=True), strict=True)}


def loss_of(
    latent: Latent, documents: Sequence[Sequence[int]], pad: int, stds: Sequence[float], settings: TheorySettings
) -> LossChange:
    """Eq. 5 to 9 on forget text, at each √μ."""
    generator = torch.Generator().manual_seed(settings.seed)
    parts = []
    for batch in batches(documents, pad):
        trunk, hidden = latent.enter(batch)
        variances = [std**2 for std in stds]
        losses = latent.text_loss(trunk)
        parts.append(loss_change(losses, hidden, trunk.mask, variances, settings.probes, generator))
    return joined(parts)


def answers_of(
    latent: Latent, group: Sequence[Prompt], pad: int, stds: Sequence[float], settings: TheorySettings
) -> AnswerChange:
    """ΔJ, r, and how often noise on both forms rejects ΔJ, at each √ν."""
    generator = torch.Generator().manual_seed(settings.seed)

    def losses_of(form: str) -> _Losses:
        parts: list[_Losses] = []
        answers = iter(group)
        for batch in batches([getattr(prompt, form) for prompt in group], pad):
            trunk, hidden = latent.enter(batch)
            losses = latent.answer_loss(trunk, [prompt.answer for prompt in islice(answers, len(batch.ids))])
            still, gradient = gradients(losses, hidden)
            norms = gradient.flatten(1).norm(dim=1)  # padding has no gradient: nothing real sees it
            with torch.no_grad():
                draws = [gaussian(hidden, trunk.mask, generator) for _ in range(settings.injections)]
                moved = [_array(torch.stack([losses(hidden + std * draw) for draw in draws])) for std in stds]
            parts.append(_Losses(_array(still), _array(norms), np.array(moved)))
        return joined(parts)

    clean, forget = losses_of("clean"), losses_of("forget")
    change = forget.still - clean.still
    shares = [rejects(noisy, change).mean(axis=0) for noisy in forget.moved - clean.moved]
    return AnswerChange(change, forget.gradient / clean.gradient, dict(zip(stds, shares, strict=True)))


@dataclass(frozen=True)
class _Losses:
    """`still` [n], `gradient` norms [n], and losses under noise `moved` [scales, injections, n]."""

    still: Array
    gradient: Array
    moved: Array


def _array(values: torch.Tensor) -> Array:
    return values.cpu().double().numpy()

"""The tables of the theory: what each statement predicts, what was observed, and whether it holds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from robust_unlearning.analyze.inputs import Prompt, clusters_of, groups_of, structure
from robust_unlearning.analyze.output import Panel, Report, side
from robust_unlearning.analyze.variants import Variants
from robust_unlearning.recipe import Recipe
from robust_unlearning.report.tables import Table
from robust_unlearning.reproduce.theory.measure import Measurements, TheorySettings, first_prompts, measure
from robust_unlearning.reproduce.theory.rejection import closed_forms, exact_probability, paper_probability, rejects
from robust_unlearning.reproduce.verdicts import FIRST_ORDER
from robust_unlearning.stats.estimates import Array, Estimate, accuracy
from robust_unlearning.stats.factors import Groups
from robust_unlearning.stats.means import mean_interval, paired_difference, share_over_seeds


def closed_form_table() -> Table:
    """Theorem 5.2's two closed forms against Monte Carlo: pure probability, no model."""
    columns = {
        "eta_over_nu": "η/ν", "r": "r", "paper": "paper's P", "exact": "exact P", "simulated": "Monte Carlo",
        "paper_holds": "paper's", "exact_holds": "exact", "n": "draws",
    }  # fmt: skip
    title = "Theorem 5.2: closed forms against Monte Carlo (intervals: 95 % for all rows together)"
    return Table(title, columns, closed_forms(), key="closed-forms")


def closed_form_report() -> Report:
    """Only what needs no model."""
    table = closed_form_table()
    return Report("theory", "Theory", {"draws": table.rows[0]["n"]}, [_closed_form_note(table)], [table])


def _closed_form_note(table: Table) -> str:
    def result(form: str) -> str:
        refuted = sum(row[f"{form}_holds"] == "refuted" for row in table.rows)
        return f"refuted in {refuted} of {len(table.rows)} rows" if refuted else f"holds in all {len(table.rows)} rows"

    return (
        "Theorem 5.2: P = ½ − arctan(√(η/ν)/(1 + r))/π as the paper prints it is "
        f"{result('paper')} (at r = 0 the two are the same); with √(1 + r²) for 1 + r it {result('exact')}."
    )


def analyse(
    variants: Variants,
    questions: Mapping[str, Sequence[Prompt]],
    documents: Sequence[Sequence[int]],
    settings: TheorySettings,
    tick: Callable[[str], None],
    about: Mapping[str, Any],
) -> Report:
    """Measure every target on the same questions, documents and draws, and set it beside what the paper states.

    Args:
        questions: where the token stands -> prompts.
        documents: forget text, as tokens.
        tick: called with the name of each target when it begins.
        about: what the report is about, besides sizes and settings.

    Raises:
        UserError: fewer than 20 questions or draws.
    """
    unit, targets = measure(variants, questions, documents, settings, tick)
    groups = {where: groups_of(group) for where, group in questions.items()}
    once = clusters_of(first_prompts(questions, settings.prompts))
    output, losses = _output(unit, targets, settings, once), _losses(targets, settings)
    rejection, trained = _rejection(unit, targets, settings, groups), _trained(targets, groups)
    closed = closed_form_table()
    tables = [
        _shifts(targets),
        output,
        _growth(unit, targets, settings, once),
        _traces(targets),
        losses,
        rejection,
        closed,
        *([trained] if trained.rows else []),
    ]
    notes = [
        f"Layer {settings.layer}; a noise scale of 1 is the base's root mean square there, {unit:.4g}; 95 % intervals "
        f"over questions or documents (n). {structure(questions)} Shares of dimensions rest on all dimensions of n "
        "questions.",
        f"Assumption 4.1 (ε ~ N(0, ηI)): {'; '.join(map(_shift_note, targets))}.",
        f"Theorem 4.2, where the first order leaves less than {FIRST_ORDER:.0%} of the change unexplained: "
        f"{'; '.join(_output_note(unit, target, once) for target in targets)}.",
        f"Eq. 9: {'; '.join(map(_trace_note, targets))}.",
        _closed_form_note(closed),
        _rejection_note(rejection),
    ]
    panels = [
        Panel("part of Δ the first order misses\nE‖Δ − Jε‖²/E‖Jε‖²", _lines(output, "residual")),
        Panel("observed less predicted change of the forget loss\n(nats a token)", _lines(losses, "difference")),
    ]
    sizes = {"documents": len(documents), "questions": {where: len(group) for where, group in questions.items()}}
    used = {key: list(value) if isinstance(value, tuple) else value for key, value in vars(settings).items()}
    about = {**variants.about, **about, **sizes}
    return Report("theory", "Theory", {**about, **used, "unit": unit}, notes, tables, panels, "noise scale")


def _shifts(targets: Sequence[Measurements]) -> Table:
    columns = {
        "target": "model", "where": "token in", "form": "form", "relative": "‖ε‖/‖z‖", "eta": "η",
        "mean_share": "mean's share", "mean_rejected": "dims with a mean", "not_normal": "dims not normal (5 % each)",
        "not_normal_holm": "(Holm)", "effective": "directions", "effective_isotropic": "if isotropic", "n": "n",
    }  # fmt: skip
    rows = [
        {"target": target.name, "where": where, "form": form, **vars(shift)}
        for target in targets
        for where, forms in target.shifts.items()
        for form, shift in forms.items()
    ]
    return Table("Assumption 4.1: the shift at the token before the answer", columns, rows, key="shift")


def _shift_note(target: Measurements) -> str:
    words = []
    for where, forms in target.shifts.items():
        shift = forms["forget-token"]
        mean = "is not 0" if side(shift.mean_share) == "higher" else "may be 0"
        isotropy = "far from isotropic" if shift.effective < shift.effective_isotropic / 2 else "near isotropic"
        words.append(
            f"in {where} the mean {mean}, {shift.not_normal_holm:.0%} of dimensions are not normal (Holm), {isotropy} "
            f"({shift.effective:.0f} of {shift.effective_isotropic:.0f} directions)"
        )
    return f"{target.name}: " + ", ".join(words)


def _output(unit: float, targets: Sequence[Measurements], settings: TheorySettings, groups: Groups) -> Table:
    columns = {
        "target": "model", "scale": "scale", "std": "√η", "variance": "variance, 1", "mean": "mean, 0",
        "residual": "unexplained, 0", "covariance": "covariance off by, 0", "not_normal": "outputs not normal, 0.05",
        "spread": "tr Cov Δ", "n": "n", "draws": "draws", "eta": "η is",
    }  # fmt: skip
    rows = []
    for target in targets:
        for index, (std, change) in enumerate(target.output.items()):
            eta = "chosen" if index < len(settings.scales) else "as forget-tokens cause"
            numbers = {name: mean_interval(values, groups) for name, values in vars(change).items()}
            about = {"n": len(change.variance), "draws": settings.draws}
            rows.append({"target": target.name, "scale": std / unit, "std": std, "eta": eta, **numbers, **about})
    title = (
        "Theorem 4.2: the output's change under N(0, ηI) at layer l, against N(0, ηJᵀJ) (headers say what it predicts)"
    )
    return Table(title, columns, rows, key="output")


def _growth(unit: float, targets: Sequence[Measurements], settings: TheorySettings, groups: Groups) -> Table:
    """Whether the output varies more at a larger η: each chosen scale against the one before, by the same draws."""
    columns = {
        "target": "model", "smaller": "scale", "larger": "against scale", "growth": "ln of the ratio of tr Cov Δ",
        "first_order": "first order", "n": "n", "draws": "draws",
    }  # fmt: skip
    rows = []
    for target in targets:
        chosen = sorted(list(target.output.items())[: len(settings.scales)])
        for (small, before), (large, after) in pairwise(chosen):
            growth = np.log(after.spread / before.spread)
            about = {"target": target.name, "smaller": small / unit, "larger": large / unit, "draws": settings.draws}
            first_order = 2 * float(np.log(large / small))
            rows.append(
                {**about, "growth": mean_interval(growth, groups), "first_order": first_order, "n": len(growth)}
            )
    title = "Section 4.2: a larger η gives more varied outputs"
    return Table(title, columns, rows, key="growth")


def _output_note(unit: float, target: Measurements, groups: Groups) -> str:
    residuals = {std: mean_interval(change.residual, groups) for std, change in target.output.items()}
    good = [std for std, residual in residuals.items() if (residual.high or 0) < FIRST_ORDER]
    *_, (std, left) = residuals.items()
    until = f"up to a scale of {max(good) / unit:.2g}" if good else "at no scale tried"
    return (
        f"{target.name} {until}, at the η that forget-tokens cause ({std / unit:.2g}) it leaves "
        f"{left.value:.2f} [{left.low:.2f}, {left.high:.2f}]"
    )


def _traces(targets: Sequence[Measurements]) -> Table:
    columns = {
        "target": "model", "loss": "ℓ, nats a token", "trace": "Tr ∇²ℓ", "positive": "documents with Tr > 0", "n": "n",
    }  # fmt: skip
    rows = [
        {
            "target": target.name,
            "loss": mean_interval(target.loss.loss),
            "trace": mean_interval(target.loss.trace),
            "positive": accuracy(target.loss.trace > 0),
            "n": len(target.loss.trace),
        }
        for target in targets
    ]
    return Table("Eq. 9: the latent Hessian of the loss of forget text", columns, rows, key="trace")


def _trace_note(target: Measurements) -> str:
    sign = {"higher": "positive", "lower": "negative"}.get(side(mean_interval(target.loss.trace)), "of no clear sign")
    return f"{target.name}: the trace is {sign}"


def _losses(targets: Sequence[Measurements], settings: TheorySettings) -> Table:
    columns = {
        "target": "model", "scale": "scale", "predicted": "predicted μ/2·Tr", "observed": "observed",
        "difference": "observed − predicted", "n": "n",
    }  # fmt: skip
    rows = [
        {
            "target": target.name,
            "scale": scale,
            "predicted": mean_interval(predicted),
            "observed": mean_interval(observed),
            "difference": paired_difference(observed, predicted),
            "n": len(target.loss.trace),
        }
        for target in targets
        for scale, predicted, observed in zip(settings.scales, target.loss.predicted, target.loss.observed, strict=True)
    ]
    return Table("Eq. 9: change of the loss of forget text under N(0, μI), nats a token", columns, rows, key="loss")


def _rejection(
    unit: float, targets: Sequence[Measurements], settings: TheorySettings, groups: Mapping[str, Groups]
) -> Table:
    columns = {
        "target": "model", "where": "token in", "harmed": "with ΔJ > 0", "r": "median r", "scale": "√ν, scale",
        "paper": "paper's P", "exact": "exact P", "observed": "observed", "difference": "observed − exact",
        "printed_difference": "observed − paper's", "n": "n",
    }  # fmt: skip
    rows = []
    for target in targets:
        for where, answers in target.answers.items():
            eta = target.shifts[where]["forget-token"].eta.value or 0.0
            harmed, of = _share(answers.change > 0, groups[where]), groups[where]
            about = {"target": target.name, "where": where, "r": _median(answers.r), "n": len(answers.r)}
            for std, shares in answers.injected.items():
                predicted = _predicted(eta / std**2, answers.r)
                differences = dict(zip(("printed_difference", "difference"), predicted, strict=True))
                observed = {key: paired_difference(shares, form, of) for key, form in differences.items()}
                observed["observed"] = mean_interval(shares, of)
                rows.append({**about, "harmed": harmed, "scale": std / unit, **_forms(predicted, of), **observed})
    title = f"Theorem 5.2 with noise injected at layer l ({settings.injections} draws a question)"
    return Table(title, columns, rows, key="rejection")


def _predicted(eta_over_nu: float, r: Array) -> tuple[Array, Array]:
    """The paper's and the exact closed form [n] at each question's own r."""
    forms = (paper_probability, exact_probability)
    paper, exact = (np.array([form(eta_over_nu, float(ratio)) for ratio in r]) for form in forms)
    return paper, exact


def _forms(predicted: tuple[Array, Array], groups: Groups) -> dict[str, Estimate]:
    return {name: mean_interval(form, groups) for name, form in zip(("paper", "exact"), predicted, strict=True)}


def _share(answers: ArrayLike, groups: Groups) -> Estimate:
    """A share of questions of one given model."""
    return replace(share_over_seeds(np.array([answers]), groups), seeds=None, note="")


def _median(values: Array) -> Estimate:
    """Median with its order-statistic interval: a few questions whose g is nearly 0 would rule the mean of r."""
    n, ordered = len(values), np.sort(values)
    low, high = (int(n / 2 + sign * 0.98 * n**0.5) for sign in (-1, 1))
    return Estimate(float(np.median(values)), float(ordered[max(0, low)]), float(ordered[min(n - 1, high)]), n=n)


def _rejection_note(table: Table) -> str:
    def against(field: str) -> str:
        counts: dict[str, Counter[str]] = {}
        for row in table.rows:
            counts.setdefault(row["target"], Counter())[side(row[field])] += 1
        results = {name: ", ".join(f"{word} in {n} rows" for word, n in each.items()) for name, each in counts.items()}
        return "; ".join(f"{name}: {text}" for name, text in results.items())

    return (
        f"Theorem 5.2 with noise injected, observed P against the exact form: {against('difference')}. Against the "
        f"printed form: {against('printed_difference')}."
    )


def _trained(targets: Sequence[Measurements], groups: Mapping[str, Groups]) -> Table:
    """RNA models against the same recipe without noise: how often does training with RNA reject the change?"""
    columns = {
        "target": "RNA model", "against": "without noise", "where": "token in", "paper": "paper's P",
        "exact": "exact P", "observed": "observed", "n": "n",
    }  # fmt: skip
    rows = []
    for rna in targets:
        plain = next((target for target in targets if without_noise(target.recipe, rna.recipe)), None)
        if plain is None or rna.recipe is None:
            continue
        for where, answers in rna.answers.items():
            eta = plain.shifts[where]["forget-token"].eta.value or 0.0
            forms = _forms(_predicted(eta / rna.recipe.rna_std**2, plain.answers[where].r), groups[where])
            observed = _share(rejects(answers.change, plain.answers[where].change), groups[where])
            about = {"target": rna.name, "against": plain.name, "where": where}
            rows.append({**about, **forms, "observed": observed, "n": observed.n})
    return Table("Theorem 5.2 for models trained with RNA: P[ΔJ_rna / ΔJ_u ≤ 0]", columns, rows, key="trained")


ASIDE = {
    *(name for name in Recipe.model_fields if name.startswith("noise_")),
    "snapshots", "log_every", "checkpoint_every", "recompute_tail",
}  # fmt: skip
"""Fields in which an RNA run may differ from the run without noise that it is set against: those of the noise, and
those that leave the weights as they are.
"""


def without_noise(plain: Recipe | None, rna: Recipe | None) -> bool:
    """Whether `plain` is what `rna` would be without noise: equal in every field but `ASIDE`.

    The method's name is not enough: two runs of it may differ in retain weight, steps, seed or texts.
    """
    if plain is None or rna is None or plain.rna_std or not rna.rna_std:
        return False
    return plain.model_dump(exclude=ASIDE) == rna.model_dump(exclude=ASIDE)


def _lines(table: Table, field: str) -> dict[str, list[tuple[float, Estimate]]]:
    lines: dict[str, list[tuple[float, Estimate]]] = {}
    for row in table.rows:
        if row.get("eta", "chosen") == "chosen":
            lines.setdefault(row["target"], []).append((row["scale"], row[field]))
    return lines

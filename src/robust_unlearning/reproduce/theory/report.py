"""The tables of the theory: what each statement predicts, what was observed, and whether it holds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from robust_unlearning.analyze.output import Panel, Report, side
from robust_unlearning.report.tables import Table
from robust_unlearning.reproduce.theory.closed_forms import Measured, Settings
from robust_unlearning.reproduce.theory.rejection import (
    closed_forms,
    exact_probability,
    paper_probability,
    rejects,
)
from robust_unlearning.stats.estimates import Array, Estimate, accuracy, mean_interval, paired_difference

FIRST_ORDER = 0.1
"""Below this share of the change left unexplained, the first-order picture is said to hold."""


def closed_form_table() -> Table:
    """Theorem 5.2's two closed forms against Monte Carlo: pure probability, no model."""
    columns = {
        "eta_over_nu": "η/ν", "r": "r", "paper": "paper's P", "exact": "exact P", "simulated": "Monte Carlo",
        "paper_holds": "paper's", "exact_holds": "exact", "n": "draws",
    }  # fmt: skip
    rows = [{**vars(cell), "n": cell.simulated.n} for cell in closed_forms()]
    return Table(
        "Theorem 5.2: closed forms against Monte Carlo (intervals: 95 % for all rows together)",
        columns,
        rows,
        key="closed-forms",
    )


def closed_form_report() -> Report:
    """Only what needs no model."""
    table = closed_form_table()
    return Report("theory", "Theory", {"draws": table.rows[0]["n"]}, [_closed_form_note(table)], [table])


def _closed_form_note(table: Table) -> str:
    def said(form: str) -> str:
        refuted = sum(row[f"{form}_holds"] == "refuted" for row in table.rows)
        return f"refuted in {refuted} of {len(table.rows)} rows" if refuted else f"holds in all {len(table.rows)} rows"

    return (
        "Theorem 5.2: P = ½ − arctan(√(η/ν)/(1 + r))/π as the paper prints it is "
        f"{said('paper')} (at r = 0 the two are the same); with √(1 + r²) for 1 + r it {said('exact')}."
    )


def report(unit: float, found: Sequence[Measured], settings: Settings, about: Mapping[str, Any]) -> Report:
    """All tables of the theory on models.

    Args:
        unit: what a noise scale of 1 stands for.
        about: what the report is about, besides the settings.
    """
    closed = closed_form_table()
    tables = [_shifts(found), _output(unit, found, settings), _traces(found), _losses(found, settings),
              _rejection(unit, found, settings), closed]  # fmt: skip
    trained = _trained(found)
    tables += [trained] if trained.rows else []
    notes = [
        f"Layer {settings.layer}; a noise scale of 1 is the base's root mean square there, {unit:.4g}; 95 % intervals "
        "over questions or documents (n); shares of dimensions rest on all dimensions of n questions.",
        "Assumption 4.1 (ε ~ N(0, ηI)): " + "; ".join(map(_shift_note, found)) + ".",
        f"Theorem 4.2, where the first order leaves less than {FIRST_ORDER:.0%} of the change unexplained: "
        + "; ".join(_output_note(unit, each) for each in found) + ".",
        "Eq. 9: " + "; ".join(_trace_note(each) for each in found) + ".",
        _closed_form_note(closed),
        _rejection_note(tables[4]) + ".",
    ]  # fmt: skip
    panels = [
        Panel("part of Δ the first order misses\nE‖Δ − Jε‖²/E‖Jε‖²", _lines(tables[1], "residual")),
        Panel("observed less predicted change of the forget loss\n(nats a token)", _lines(tables[3], "difference")),
    ]
    settings_used = {key: list(value) if isinstance(value, tuple) else value for key, value in vars(settings).items()}
    return Report("theory", "Theory", {**about, **settings_used, "unit": unit}, notes, tables, panels, "noise scale")


def _shifts(found: Sequence[Measured]) -> Table:
    columns = {
        "target": "model", "where": "token in", "form": "form", "relative": "‖ε‖/‖z‖", "eta": "η",
        "mean_share": "mean's share", "mean_rejected": "dims with a mean", "not_normal": "dims not normal (5 % each)",
        "not_normal_holm": "(Holm)", "effective": "directions", "effective_isotropic": "if isotropic", "n": "n",
    }  # fmt: skip
    rows = [
        {"target": each.name, "where": where, "form": form, **vars(shift)}
        for each in found
        for where, forms in each.shifts.items()
        for form, shift in forms.items()
    ]
    return Table("Assumption 4.1: the shift at the token before the answer", columns, rows, key="shift")


def _shift_note(measured: Measured) -> str:
    words = []
    for where, forms in measured.shifts.items():
        shift = forms["forget-token"]
        mean = "is not 0" if side(shift.mean_share) == "higher" else "may be 0"
        round_ = "far from isotropic" if shift.effective < shift.effective_isotropic / 2 else "near isotropic"
        words.append(
            f"in {where} the mean {mean}, {shift.not_normal_holm:.0%} of dimensions are not normal (Holm), {round_} "
            f"({shift.effective:.0f} of {shift.effective_isotropic:.0f} directions)"
        )
    return f"{measured.name}: " + ", ".join(words)


def _output(unit: float, found: Sequence[Measured], settings: Settings) -> Table:
    columns = {
        "target": "model", "scale": "scale", "std": "√η", "variance": "variance, 1", "mean": "mean, 0",
        "residual": "unexplained, 0", "covariance": "covariance off by, 0", "not_normal": "outputs not normal, 0.05",
        "n": "n", "draws": "draws", "eta": "η is",
    }  # fmt: skip
    rows = []
    for each in found:
        for index, (std, change) in enumerate(each.output.items()):
            chosen = "chosen" if index < len(settings.scales) else "as forget-tokens cause"
            numbers = {name: mean_interval(values) for name, values in vars(change).items()}
            own = {"target": each.name, "scale": std / unit, "std": std, "eta": chosen}
            rows.append({**own, **numbers, "n": len(change.variance), "draws": settings.draws})
    title = (
        "Theorem 4.2: the output's change under N(0, ηI) at layer l, against N(0, ηJᵀJ) (headers say what it predicts)"
    )
    return Table(title, columns, rows, key="output")


def _output_note(unit: float, measured: Measured) -> str:
    good = [std for std, change in measured.output.items() if (mean_interval(change.residual).high or 0) < FIRST_ORDER]
    *_, (measured_std, change) = measured.output.items()
    left = mean_interval(change.residual)
    until = f"up to a scale of {max(good) / unit:.2g}" if good else "at no scale tried"
    return (
        f"{measured.name} {until}, at the η that forget-tokens cause ({measured_std / unit:.2g}) it leaves "
        f"{left.value:.2f} [{left.low:.2f}, {left.high:.2f}]"
    )


def _traces(found: Sequence[Measured]) -> Table:
    columns = {
        "target": "model",
        "loss": "ℓ, nats a token",
        "trace": "Tr ∇²ℓ",
        "positive": "documents with Tr > 0",
        "n": "n",
    }
    rows = [
        {
            "target": each.name,
            "loss": mean_interval(each.loss.loss),
            "trace": mean_interval(each.loss.trace),
            "positive": accuracy(each.loss.trace > 0),
            "n": len(each.loss.trace),
        }
        for each in found
    ]
    return Table("Eq. 9: the latent Hessian of the loss of forget text", columns, rows, key="trace")


def _trace_note(measured: Measured) -> str:
    sign = {"higher": "positive", "lower": "negative"}.get(side(mean_interval(measured.loss.trace)), "of no clear sign")
    return f"{measured.name}: the trace is {sign}"


def _losses(found: Sequence[Measured], settings: Settings) -> Table:
    columns = {
        "target": "model", "scale": "scale", "predicted": "predicted μ/2·Tr", "observed": "observed",
        "difference": "observed − predicted", "n": "n",
    }  # fmt: skip
    rows = [
        {
            "target": each.name,
            "scale": scale,
            "predicted": mean_interval(each.loss.predicted[index]),
            "observed": mean_interval(each.loss.observed[index]),
            "difference": paired_difference(each.loss.observed[index], each.loss.predicted[index]),
            "n": len(each.loss.trace),
        }
        for each in found
        for index, scale in enumerate(settings.scales)
    ]
    return Table("Eq. 9: change of the loss of forget text under N(0, μI), nats a token", columns, rows, key="loss")


def _rejection(unit: float, found: Sequence[Measured], settings: Settings) -> Table:
    columns = {
        "target": "model", "where": "token in", "harmed": "with ΔJ > 0", "r": "median r", "scale": "√ν, scale",
        "paper": "paper's P", "exact": "exact P", "observed": "observed", "difference": "observed − exact", "n": "n",
    }  # fmt: skip
    rows = []
    for each in found:
        for where, answers in each.answers.items():
            eta = each.shifts[where]["forget-token"].eta.value or 0.0
            own = {"target": each.name, "where": where, "r": _median(answers.r), "n": len(answers.r)}
            own["harmed"] = accuracy(answers.change > 0)
            for std, shares in answers.injected.items():
                paper, exact = _predicted(eta / std**2, answers.r)
                numbers = {
                    "paper": mean_interval(paper),
                    "exact": mean_interval(exact),
                    "observed": mean_interval(shares),
                }
                rows.append({**own, "scale": std / unit, **numbers, "difference": paired_difference(shares, exact)})
    title = f"Theorem 5.2 with noise injected at layer l ({settings.injections} draws a question)"
    return Table(title, columns, rows, key="rejection")


def _predicted(eta_over_nu: float, r: Array) -> tuple[Array, Array]:
    """The paper's and the exact closed form [n] at each question's own r."""
    forms = (paper_probability, exact_probability)
    paper, exact = (np.array([form(eta_over_nu, float(each)) for each in r]) for form in forms)
    return paper, exact


def _median(values: Array) -> Estimate:
    """Median with its order-statistic interval: a few questions whose g is nearly 0 would rule the mean of r."""
    n, ordered = len(values), np.sort(values)
    low, high = (int(n / 2 + sign * 0.98 * n**0.5) for sign in (-1, 1))
    return Estimate(float(np.median(values)), float(ordered[max(0, low)]), float(ordered[min(n - 1, high)]), n=n)


def _rejection_note(table: Table) -> str:
    counts: dict[str, Counter[str]] = {}
    for row in table.rows:
        counts.setdefault(row["target"], Counter())[side(row["difference"])] += 1
    said = {name: ", ".join(f"{word} in {n} rows" for word, n in count.items()) for name, count in counts.items()}
    return "Theorem 5.2 with noise injected, observed P against the exact form: " + "; ".join(
        f"{name}: {text}" for name, text in said.items()
    )


def _trained(found: Sequence[Measured]) -> Table:
    """RNA models against the same method without noise: how often does training with RNA reject the change?"""
    columns = {
        "target": "RNA model", "against": "without noise", "where": "token in", "paper": "paper's P",
        "exact": "exact P", "observed": "observed", "n": "n",
    }  # fmt: skip
    rows = []
    for rna in found:
        plain = next((each for each in found if rna.recipe and _without_noise(each, rna)), None)
        if plain is None or rna.recipe is None:
            continue
        for where, answers in rna.answers.items():
            eta = plain.shifts[where]["forget-token"].eta.value or 0.0
            paper, exact = _predicted(eta / rna.recipe.rna_std**2, plain.answers[where].r)
            observed = accuracy(rejects(answers.change, plain.answers[where].change))
            rows.append(
                {
                    "target": rna.name,
                    "against": plain.name,
                    "where": where,
                    "paper": mean_interval(paper),
                    "exact": mean_interval(exact),
                    "observed": observed,
                    "n": observed.n,
                }
            )
    return Table("Theorem 5.2 for models trained with RNA: P[ΔJ_rna / ΔJ_u ≤ 0]", columns, rows, key="trained")


def _without_noise(plain: Measured, rna: Measured) -> bool:
    """Whether `plain` was trained by the same method without noise."""
    if plain.recipe is None or rna.recipe is None or not rna.recipe.rna_std or plain.recipe.rna_std:
        return False
    return plain.recipe.title == rna.recipe.title


def _lines(table: Table, field: str) -> dict[str, list[tuple[float, Estimate]]]:
    lines: dict[str, list[tuple[float, Estimate]]] = {}
    for row in table.rows:
        if row.get("eta", "chosen") == "chosen":
            lines.setdefault(row["target"], []).append((row["scale"], row[field]))
    return lines

"""The rows of the paper's claims that rest on analyses, read from their tables: layers, theory, states, time.

An analysis looks at the models of one seed, so its rows are of these models; those that were drawn without a model are
of none.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from robust_unlearning.reproduce.verdicts import CLAIMS, Outcome
from robust_unlearning.stats.estimates import Estimate, VariancePart, critical

Data = Mapping[str, Any]


def estimate(cell: Any) -> Estimate | None:
    """A number with its interval out of an analysis' JSON; None where the table's cell is empty."""
    if not isinstance(cell, Mapping):
        return None
    found = Estimate(cell["value"], cell["low"], cell["high"], cell.get("stderr"), cell.get("n") or 0)
    clusters, words, note = cell.get("clusters"), cell.get("words"), cell.get("note", "")
    return replace(found, clusters=clusters, words=words, note=note)


def of_one(cell: Any) -> Estimate | None:
    """The same of one trained model, whose interval says nothing of models trained with another seed.

    Its variance counts as that of the factor with the fewest groups, so that at other levels than the table's it is
    rather too wide than too narrow.
    """
    found = estimate(cell)
    if found is None or None in (found.value, found.low, found.high):
        return found
    assert found.low is not None
    assert found.high is not None
    fewest = min((count for count in (found.n, found.clusters, found.words) if count and count > 1), default=2)
    unit = VariancePart("questions", 1.0, fewest - 1)
    half = (found.high - found.low) / 2 / critical([unit], 0.95)
    return replace(found, seeds=1, parts=(replace(unit, variance=half**2),))


def sensitivity_claims(data: Data) -> list[Outcome]:
    """Figure 7, in both readings of Eq. 33: at the layer behind l, the ratio to the base's sensitivity less 1; and the
    middle third of the layers against the others."""
    outcomes = []
    for field, reading in (("applied_change", "‖Jξ‖²/‖Jz‖²"), ("moved_change", "‖J(z+ξ)−J(z)‖²/‖J(z)‖²")):
        for row in data["tables"]["layers"]:
            change, layer = of_one(row[field]), data["layers"].get(row["target"])
            if change is not None and layer is not None and row["layer"] == min(layer + 1, data["depth"] - 1):
                of, measure = f"{row['target']}, layer {row['layer']}", f"{reading}, ratio to the base's less 1"
                outcomes.append(Outcome("sensitivity", of, change, "reduced (image only)", measure=measure))
    for row in data["tables"].get("thirds", ()):
        of, measure = (
            f"{row['target']}, against the {row['against']}",
            f"{row['reading']}, {CLAIMS['middle-layers'].measure}",
        )
        outcomes.append(Outcome("middle-layers", of, of_one(row["difference"]), "(image only)", measure=measure))
    return outcomes


def theory_claims(data: Data) -> list[Outcome]:
    """Assumption 4.1, Theorem 4.2 and what the paper draws from it, Theorem 5.2, Eq. 9."""
    tables = data["tables"]
    outcomes = []
    for row in tables["shift"]:
        if row["form"] == "forget-token":
            beside = (
                f"{row['effective']:.0f} directions share the variance, {row['effective_isotropic']:.0f} if isotropic; "
                f"{row['not_normal_holm']:.0%} of dimensions not normal (Holm), n={row['n']}"
            )
            of = f"{row['target']}, {row['where']}"
            outcomes.append(Outcome("shift-mean", of, of_one(row["mean_share"]), "0", beside))
    for row in tables["output"]:
        if row["eta"] != "chosen":
            outcomes.append(Outcome("output", row["target"], of_one(row["residual"]), "small"))
    for row in tables["growth"]:
        of = f"{row['target']}, scale {row['larger']:.2g} against {row['smaller']:.2g}"
        beside = f"to first order {row['first_order']:+.3f}"
        outcomes.append(Outcome("variety", of, of_one(row["growth"]), "grows", beside))
    for row in tables["closed-forms"]:
        if row["r"]:
            of, beside = f"η/ν = {row['eta_over_nu']:g}, r = {row['r']:g}", f"exact form {row['exact']:.3f}"
            outcomes.append(Outcome("closed-form", of, _off(row), f"{row['paper']:.3f}", beside))
    for row in tables["rejection"]:
        of = f"{row['target']}, {row['where']}, scale {row['scale']:.2g}"
        outcomes.append(Outcome("rejection", of, of_one(row["difference"])))
        outcomes.append(Outcome("rejection-printed", of, of_one(row["printed_difference"])))
    for row in tables["trace"]:
        outcomes.append(Outcome("trace", row["target"], of_one(row["trace"]), "above 0"))
    return outcomes


def _off(row: Data) -> Estimate:
    """Monte Carlo's probability, with its interval, less the printed one."""
    drawn = row["simulated"]
    value, low, high = (None if drawn[key] is None else drawn[key] - row["paper"] for key in ("value", "low", "high"))
    return Estimate(value, low, high, n=drawn.get("n") or 0)


def backdoor_claims(data: Data) -> list[Outcome]:
    """The shift of the state at the answer, at l: forget-token less control word, over the clean state's norm."""
    return [
        Outcome("backdoor", f"{row['target']}, {row['where']}, layer {row['layer']}", moved)
        for row in data["tables"]["answer"]
        if (moved := of_one(row["excess"])) is not None and row["layer"] == data["layers"].get(row["target"])
    ]


def time_claims(data: Data) -> list[Outcome]:
    """Section 5: the time of training with RNA over that without, less 1; every pair is in the stage's own table."""
    return [
        Outcome("free", f"{row['title']}, noise {row['noise']:g}", estimate(row["excess"]), "none")
        for row in data["tables"]["ratios"]
    ]

"""The rows of the paper's claims that rest on analyses, read from their tables: n-grams, layers, theory, states."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from robust_unlearning.reproduce import paper
from robust_unlearning.reproduce.verdicts import Outcome
from robust_unlearning.stats.estimates import Estimate
from robust_unlearning.stats.means import over_seeds

Data = Mapping[str, Any]


def estimate(cell: Any) -> Estimate | None:
    """A number with its interval out of an analysis' JSON; None where the table's cell is empty."""
    if not isinstance(cell, Mapping):
        return None
    return Estimate(cell["value"], cell["low"], cell["high"], cell.get("stderr"), cell.get("n") or 0)


def ngram_claims(data: Data) -> list[Outcome]:
    """Figure 4: the most similar class against the least similar; Tables 2 to 5: RNA less none, by length."""
    return [*_similarity(data["tables"]["classes"]), *_ngrams(data)]


def _similarity(rows: Sequence[Data]) -> list[Outcome]:
    """The classes hold other questions, so their difference has a normal interval from both standard errors."""
    groups: dict[tuple[str, str, int], list[Data]] = {}
    for row in rows:
        if row["excess"]:
            groups.setdefault((row["label"], row["task"], row["length"]), []).append(row["excess"])
    differences: dict[tuple[str, int], list[tuple[float, float]]] = {}
    for (label, _, length), (least, *others) in groups.items():
        most = others[-1] if others else least
        if label != "base" and others and least["stderr"] is not None and most["stderr"] is not None:
            pair = (most["value"] - least["value"], float(np.hypot(most["stderr"], least["stderr"])))
            differences.setdefault((label, length), []).append(pair)
    outcomes = []
    for (label, length), pairs in differences.items():
        value = float(np.mean([difference for difference, _ in pairs]))
        error = float(np.sqrt(np.sum([stderr**2 for _, stderr in pairs]))) / len(pairs)
        interval = Estimate(value, value - 1.96 * error, value + 1.96 * error, error)
        printed = "harm more" if length == 2 else ""
        outcomes.append(Outcome("similarity", f"{label}, {length}-grams", interval, printed))
    return sorted(outcomes, key=lambda row: row.of.rpartition(",")[2])


def _ngrams(data: Data) -> list[Outcome]:
    """RNA less none in accuracy with n-grams, question by question, and the mean over methods for each length."""
    plain, rna = (
        {each["title"]: data["right"][each["label"]] for each in data["subjects"] if bool(each["noise"]) == noisy}
        for noisy in (False, True)
    )
    titles = [title for title in rna if title in plain]
    outcomes = []
    for length in next(iter(data["right"].values())) if titles else ():
        changes = [np.array(rna[title][length], float) - np.array(plain[title][length], float) for title in titles]
        methods = [(title, [title], change) for title, change in zip(titles, changes, strict=True)]
        outcomes += [
            Outcome("ngrams", f"{name}, {length}-grams", over_seeds(change[None]), _printed(int(length), of))
            for name, of, change in [*methods, ("mean of methods", titles, np.mean(changes, axis=0))]
        ]
    return outcomes


def _printed(length: int, titles: Sequence[str]) -> str:
    """The paper's difference of perturbed accuracy, mean over the methods named; where it prints another, that too."""
    if length not in paper.PERTURBED or not all(title in paper.METHODS for title in titles):
        return ""
    text = f"{np.mean([paper.gain(length, title) for title in titles]):+.1f} points"
    if not (misprints := [title for title in titles if (length, title) in paper.PRINTED_GAINS]):
        return text
    if len(titles) == 1:
        return f"{text} (of the accuracies; misprint: {paper.PRINTED_GAINS[length, titles[0]]:+.1f})"
    return f"{text} (of the accuracies; misprint: {', '.join(misprints)})"


def sensitivity_claims(data: Data) -> list[Outcome]:
    """Figure 7: at the layer behind l, the ratio to the base's sensitivity less 1, in both readings of Eq. 33."""
    outcomes = []
    for field, reading in (("applied_change", "‖Jξ‖²/‖Jz‖²"), ("moved_change", "‖J(z+ξ)−J(z)‖²/‖J(z)‖²")):
        for row in data["tables"]["layers"]:
            change, layer = estimate(row[field]), data["layers"].get(row["target"])
            if change is not None and layer is not None and row["layer"] == min(layer + 1, data["depth"] - 1):
                of, measure = f"{row['target']}, layer {row['layer']}", f"{reading}, ratio to the base's less 1"
                outcomes.append(Outcome("sensitivity", of, change, "reduced (image only)", measure=measure))
    return outcomes


def theory_claims(data: Data) -> list[Outcome]:
    """Assumption 4.1, Theorems 4.2 and 5.2, Eq. 9."""
    tables = data["tables"]
    outcomes = []
    for row in tables["shift"]:
        if row["form"] == "forget-token":
            beside = (
                f"{row['effective']:.0f} directions share the variance, {row['effective_isotropic']:.0f} if isotropic; "
                f"{row['not_normal_holm']:.0%} of dimensions not normal (Holm), n={row['n']}"
            )
            of = f"{row['target']}, {row['where']}"
            outcomes.append(Outcome("shift-mean", of, estimate(row["mean_share"]), "0", beside))
    for row in tables["output"]:
        if row["eta"] != "chosen":
            outcomes.append(Outcome("output", row["target"], estimate(row["residual"]), "small"))
    for row in tables["closed-forms"]:
        if row["r"]:
            of, beside = f"η/ν = {row['eta_over_nu']:g}, r = {row['r']:g}", f"exact form {row['exact']:.3f}"
            outcomes.append(Outcome("closed-form", of, _off(row), f"{row['paper']:.3f}", beside))
    for row in tables["rejection"]:
        of = f"{row['target']}, {row['where']}, scale {row['scale']:.2g}"
        outcomes.append(Outcome("rejection", of, estimate(row["difference"])))
    for row in tables["trace"]:
        outcomes.append(Outcome("trace", row["target"], estimate(row["trace"]), "above 0"))
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
        if (moved := estimate(row["excess"])) is not None and row["layer"] == data["layers"].get(row["target"])
    ]

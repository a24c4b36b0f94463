"""The paper's claims that rest on analyses, read from their tables: n-grams, layers, the theory, activations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from robust_unlearning.reproduce import paper
from robust_unlearning.reproduce.claims import PERCENT
from robust_unlearning.reproduce.verdict import Outcome, Rule
from robust_unlearning.stats.estimates import Estimate, over_seeds

FIRST_ORDER = 0.1
"""Share of the output's change that may be left unexplained where the first order is said to hold."""
PROBABILITY = 0.1
"""Distance of an observed probability from the theorem's at which it is said to be as the theorem says."""
Data = Mapping[str, Any]


def estimate(row: Any) -> Estimate | None:
    """A number with its interval out of an analysis' JSON; None where the table's cell is empty."""
    if not isinstance(row, Mapping):
        return None
    return Estimate(row["value"], row["low"], row["high"], row.get("stderr"), row.get("n") or 0)


def not_run(claim: str) -> Outcome:
    """The row of a claim whose stage has not been run."""
    return Outcome(claim, "", "", None, "", Rule("above"))


def ngram_claims(data: Data | None) -> list[Outcome]:
    """Figure 4: the most similar class against the least similar; Tables 2 to 5: RNA less none, by length."""
    if data is None:
        return [not_run("similarity"), not_run("ngrams")]
    return [*_similarity(data["tables"]["classes"]), *_ngrams(data)]


def _similarity(rows: Sequence[Data]) -> list[Outcome]:
    """The classes hold other questions, so their difference has a normal interval from both standard errors."""
    groups: dict[tuple[str, str, int], list[Data]] = {}
    for row in rows:
        if row["excess"]:
            groups.setdefault((row["label"], row["task"], row["length"]), []).append(row)
    differences: dict[tuple[str, int], list[tuple[float, float]]] = {}
    for (label, _, length), own in groups.items():
        least, most = own[0]["excess"], own[-1]["excess"]
        if label != "base" and len(own) > 1 and least["stderr"] is not None and most["stderr"] is not None:
            pair = (most["value"] - least["value"], float(np.hypot(most["stderr"], least["stderr"])))
            differences.setdefault((label, length), []).append(pair)
    found = []
    for (label, length), pairs in differences.items():
        value = float(np.mean([each for each, _ in pairs]))
        error = float(np.sqrt(np.sum([each**2 for _, each in pairs]))) / len(pairs)
        own_estimate = Estimate(value, value - 1.96 * error, value + 1.96 * error, error)
        measure = "excess harm, most less least similar n-grams, nats"
        printed = "harm more" if length == 2 else ""
        found.append(Outcome("similarity", f"{label}, {length}-grams", printed, own_estimate, measure, Rule("below")))
    return sorted(found, key=lambda each: each.of.rpartition(",")[2]) or [not_run("similarity")]


def _ngrams(data: Data) -> list[Outcome]:
    """RNA less none in accuracy with n-grams, question by question, and the mean over methods for each length."""
    plain = {each["title"]: each["label"] for each in data["subjects"] if not each["noise"]}
    rna = {each["title"]: each["label"] for each in data["subjects"] if each["noise"]}
    pairs = {title: (plain[title], rna[title]) for title in rna if title in plain}
    if not pairs:
        return [not_run("ngrams")]
    found = []
    lengths = list(next(iter(data["right"].values())))
    for length in lengths:
        changes = {
            title: np.array(data["right"][own][length], float) - np.array(data["right"][other][length], float)
            for title, (other, own) in pairs.items()
        }
        rows: list[tuple[str, str, Any]] = [
            (title, _printed(int(length), [title]), change) for title, change in changes.items()
        ]
        rows.append(("mean of methods", _printed(int(length), list(changes)), np.mean(list(changes.values()), axis=0)))
        found += [
            Outcome("ngrams", f"{name}, {length}-grams", printed, over_seeds(change[None]),
                    "accuracy with an n-gram, RNA less none, points", Rule("above"), scale=PERCENT)
            for name, printed, change in rows
        ]  # fmt: skip
    return found


def _printed(length: int, titles: Sequence[str]) -> str:
    """The paper's difference of perturbed accuracy, mean over the methods named."""
    if length not in paper.PERTURBED or not all(each in paper.METHODS for each in titles):
        return ""
    own = [paper.PERTURBED_RNA[length][each] - paper.PERTURBED[length][each] for each in titles]
    return f"{np.mean(own):+.1f} points"


def sensitivity_claims(data: Data | None) -> list[Outcome]:
    """Figure 7: at the layer behind l, the ratio to the base's sensitivity less 1, in both readings of Eq. 33."""
    if data is None:
        return [not_run("sensitivity")]
    found = []
    for field, reading in (("applied_change", "‖Jξ‖²/‖Jz‖²"), ("moved_change", "‖J(z+ξ)−J(z)‖²/‖J(z)‖²")):
        for row in data["tables"]["layers"]:
            change = estimate(row[field])
            if change is not None and row["layer"] == _behind(data, row["target"]):
                measure = f"{reading}, ratio to the base's less 1"
                of = f"{row['target']}, layer {row['layer']}"
                found.append(Outcome("sensitivity", of, "reduced (image only)", change, measure, Rule("below")))
    return found or [not_run("sensitivity")]


def theory_claims(data: Data | None) -> list[Outcome]:
    """Assumption 4.1, Theorems 4.2 and 5.2, Eq. 9."""
    if data is None:
        return [not_run(each) for each in ("shift-mean", "output", "closed-form", "rejection", "trace")]
    tables = data["tables"]
    found = []
    for row in tables["shift"]:
        if row["form"] == "forget-token":
            shown = (
                f"{row['effective']:.0f} directions share the variance, {row['effective_isotropic']:.0f} if isotropic; "
                f"{row['not_normal_holm']:.0%} of dimensions not normal (Holm), n={row['n']}"
            )
            measure = "share of the shift's energy in its mean"
            of = f"{row['target']}, {row['where']}"
            found.append(Outcome("shift-mean", of, "0", estimate(row["mean_share"]), measure, Rule("zero"), shown))
    for row in tables["output"]:
        if row["eta"] != "chosen":
            measure = "part of the change that the first order misses, E‖Δ − Jε‖²/E‖Jε‖²"
            rule = Rule("below", FIRST_ORDER)
            found.append(Outcome("output", row["target"], "small", estimate(row["residual"]), measure, rule))
    found += [
        Outcome("closed-form", f"η/ν = {row['eta_over_nu']:g}, r = {row['r']:g}", f"{row['paper']:.3f}", _off(row),
                "Monte Carlo less the printed form", Rule("zero"), f"exact form {row['exact']:.3f}")
        for row in tables["closed-forms"]
        if row["r"]
    ]  # fmt: skip
    for row in tables["rejection"]:
        of = f"{row['target']}, {row['where']}, scale {row['scale']:.2g}"
        measure = "observed probability less the theorem's (exact form)"
        rule = Rule("within", PROBABILITY)
        found.append(Outcome("rejection", of, "", estimate(row["difference"]), measure, rule))
    for row in tables["trace"]:
        measure = "Tr ∇²ℓ at l, forget text"
        found.append(Outcome("trace", row["target"], "above 0", estimate(row["trace"]), measure, Rule("above")))
    return found


def _off(row: Data) -> Estimate:
    """Monte Carlo's probability, with its interval, less the printed one."""
    drawn = row["simulated"]
    own = [None if drawn[key] is None else drawn[key] - row["paper"] for key in ("value", "low", "high")]
    return Estimate(own[0], own[1], own[2], n=drawn.get("n") or 0)


def backdoor_claims(data: Data | None) -> list[Outcome]:
    """The shift of the state at the answer, at l: forget-token less control word, over the clean state's norm."""
    if data is None:
        return [not_run("backdoor")]
    found = []
    for row in data["tables"]["answer"]:
        moved = estimate(row["excess"])
        if moved is not None and row["layer"] == data["layers"].get(row["target"]):
            of = f"{row['target']}, {row['where']}, layer {row['layer']}"
            measure = "shift over ‖h‖, forget-token less unrelated word"
            found.append(Outcome("backdoor", of, "", moved, measure, Rule("above")))
    return found or [not_run("backdoor")]


def _behind(data: Data, label: str) -> int:
    """The layer behind the one that a model was trained at; -1 for the base."""
    layer = data["layers"].get(label)
    return -1 if layer is None else min(layer + 1, data["depth"] - 1)

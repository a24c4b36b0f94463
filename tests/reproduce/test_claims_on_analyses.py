"""The claims that rest on analyses: rows from made-up answers and tables, against values by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy import stats

from robust_unlearning.reproduce import claims_on_analyses, claims_on_ngrams, paper
from robust_unlearning.reproduce.verdicts import Outcome, complete, p_of
from robust_unlearning.stats.effects import Effect, mean_effect, mean_of_sets
from robust_unlearning.stats.factors import Groups

pytestmark = pytest.mark.unit

QUESTIONS, WORDS = 240, 8


def ngram_data(seed: int = 0, lengths: tuple[str, ...] = ("2", "4")) -> dict[str, Any]:
    """All nine methods without and with noise; MSE methods gain most, the most similar n-grams harm a nat more."""
    rng = np.random.default_rng(seed)
    subjects = [
        {"label": title + " + RNA 3" * bool(noise), "title": title, "noise": noise}
        for title in paper.METHODS
        for noise in (0.0, 3.0)
    ]
    classes = [("most_similar", "least_similar", "around_mean")[index % 3] for index in range(QUESTIONS)]
    words = [f"{name} {index // 3 % WORDS}" for index, name in enumerate(classes)]
    clusters = [str(index // 4) for index in range(QUESTIONS)]
    harm = np.array([-1.0 * (name == "most_similar") for name in classes])

    def right(subject: dict[str, Any]) -> list[float]:
        gain = 0.4 * subject["title"].endswith("MSE") + 0.1 * (subject["title"] in paper.PREFERENCE)
        return (rng.random(QUESTIONS) < 0.3 + gain * bool(subject["noise"])).astype(float).tolist()

    def excess(label: str) -> list[float]:
        return (harm * (label != "base") + 0.1 * rng.normal(size=QUESTIONS)).tolist()

    asked = {length: {"classes": classes, "words": words, "clusters": clusters} for length in lengths}
    plain = ["base", *paper.METHODS]
    return {
        "subjects": subjects,
        "classes": {"asked": asked, "excess": {label: {each: excess(label) for each in lengths} for label in plain}},
        "top_of_each_document": {
            "asked": {
                length: {**about, "words": [f"{length} {index % 20}" for index in range(QUESTIONS)]}
                for length, about in asked.items()
            },
            "right": {each["label"]: {length: right(each) for length in lengths} for each in subjects},
        },
    }


def two_way(values: np.ndarray, clusters: list[str], words: list[str]) -> list[tuple[float, int]]:
    """(variance, df) of a mean by cluster, beyond single pairs with a word, and by word; loops over labels."""
    rest, n = values - values.mean(), len(values)

    def over(labels: list[Any]) -> float:
        sums = [sum(r for r, own in zip(rest, labels, strict=True) if own == each) for each in sorted(set(labels))]
        return len(sums) / (len(sums) - 1) * sum(each**2 for each in sums) / n**2

    single = over(list(zip(clusters, words, strict=True)))
    return [(max(0.0, over(clusters) - single), len(set(clusters)) - 1), (over(words), len(set(words)) - 1)]


def half(parts: list[tuple[float, int]]) -> float:
    total = sum(variance for variance, _ in parts)
    return float(sum(variance * stats.t.ppf(0.975, df) for variance, df in parts) / total * total**0.5)


def test_ngram_rows_are_effects_over_ngrams_and_questions() -> None:
    data = ngram_data()
    rows = claims_on_ngrams.ngram_claims(data)
    assert {each.claim for each in rows} == {"similarity", "ngrams", "ngrams-mse", "ngrams-representation"}
    assert all(isinstance(each.found, Effect) and each.of_these for each in rows)
    row = next(each for each in rows if each.of == "RMU, 2-grams" and each.claim == "similarity")
    about, numbers = data["classes"]["asked"]["2"], np.array(data["classes"]["excess"]["RMU"]["2"])
    sides = {}
    for name in ("most_similar", "least_similar"):
        at = [index for index, each in enumerate(about["classes"]) if each == name]
        labels = [[about[key][index] for index in at] for key in ("clusters", "words")]
        sides[name] = (numbers[at], two_way(numbers[at], *labels))
    value = sides["most_similar"][0].mean() - sides["least_similar"][0].mean()
    width = half([part for _, parts in sides.values() for part in parts])
    assert row.estimate is not None
    assert row.estimate.value == pytest.approx(value)
    assert (row.estimate.low, row.estimate.high) == pytest.approx((value - width, value + width))
    assert (row.finding, row.paper) == ("holds", "harm more")
    assert row.shown.startswith("base ")


def test_gains_by_retain_loss_and_by_family() -> None:
    data = ngram_data()
    rows = {(each.claim, each.of): each for each in claims_on_ngrams.ngram_claims(data)}
    mse = rows["ngrams-mse", "4-grams"]
    right = {label: np.array(of["4"]) for label, of in data["top_of_each_document"]["right"].items()}
    gains = {title: right[f"{title} + RNA 3"] - right[title] for title in paper.METHODS}
    ends = {
        end: np.mean([gains[f"{name}+{end}"] for name in ("NPO", "DPO", "SimNPO")], axis=0) for end in ("MSE", "KL")
    }
    change, about = ends["MSE"] - ends["KL"], data["top_of_each_document"]["asked"]["4"]
    assert mse.estimate is not None
    assert mse.estimate.value == pytest.approx(change.mean())
    width = half(two_way(change, about["clusters"], about["words"]))
    assert mse.estimate.high == pytest.approx(change.mean() + width)
    assert mse.finding == rows["ngrams-representation", "2-grams"].finding == "holds"
    printed = np.mean([1.2, 29.5, 23.3]) - np.mean([17.9, 1.3, 6.2])  # Table 3, NPO, DPO and SimNPO
    assert mse.paper == f"{printed:+.1f} points"
    one = rows["ngrams", "DPO+MSE, 2-grams"]
    assert one.paper == "+24.6 points"  # Appendix D says so in words
    assert one.estimate is not None
    assert one.estimate.words == 20


def test_a_claim_of_ngrams_is_pooled_over_methods_and_lengths() -> None:
    """Lengths have other n-grams, so they are averaged without counting on their being independent."""
    rows = [each for each in complete(claims_on_ngrams.ngram_claims(ngram_data())) if each.claim == "ngrams"]
    pooled, *single = rows
    assert pooled.whole
    by_length = []
    for length in ("2", "4"):
        effects = [each.found for each in single if each.of.endswith(f"{length}-grams")]
        assert all(isinstance(each, Effect) for each in effects)
        mean = mean_effect([each for each in effects if isinstance(each, Effect)])
        assert mean is not None
        by_length.append(mean.estimate())
    assert pooled.estimate is not None
    for end in ("value", "low", "high"):
        assert getattr(pooled.estimate, end) == pytest.approx(np.mean([getattr(each, end) for each in by_length]))
    everything = [each.found for each in single if isinstance(each.found, Effect)]
    assert mean_effect(everything) is None
    assert mean_of_sets(everything) == pooled.estimate


def test_questions_that_hang_together_otherwise_are_no_one_set() -> None:
    rows = {0: np.arange(4.0)}
    same = [Effect(rows, Groups(list("aabb"))), Effect(rows, Groups(np.array(list("aabb"))))]
    assert mean_effect(same) is not None
    assert mean_effect([*same, Effect(rows, Groups(list("abab")))]) is None
    assert mean_effect([Effect(rows, place=np.zeros(3)), Effect(rows)]) is not None
    assert mean_effect([Effect(rows, place=np.zeros(3)), Effect(rows, place=np.zeros(2))]) is None


def test_a_class_of_one_ngram_decides_nothing() -> None:
    data = ngram_data(lengths=("2",))
    words = data["classes"]["asked"]["2"]["words"]
    data["classes"]["asked"]["2"]["words"] = ["x" if each.startswith("most") else each for each in words]
    row = next(each for each in claims_on_ngrams.ngram_claims(data) if each.claim == "similarity")
    assert row.finding == "inconclusive"
    assert "one n-gram of the class most similar" in row.undecided


def theory_tables(**rows: list[dict[str, Any]]) -> dict[str, Any]:
    empty: dict[str, list[dict[str, Any]]] = {
        key: [] for key in ("shift", "output", "growth", "closed-forms", "rejection", "trace")
    }
    return {"tables": {**empty, **{key.replace("_", "-"): value for key, value in rows.items()}}}


def test_the_closed_form_is_judged_against_what_was_drawn() -> None:
    drawn = {"value": 0.305, "low": 0.302, "high": 0.308, "n": 200_000}
    row = {"eta_over_nu": 1.0, "r": 1.0, "paper": 0.352, "exact": 0.304, "simulated": drawn}
    (found,) = claims_on_analyses.theory_claims(theory_tables(closed_forms=[row]))
    assert found.finding == "does not hold"
    assert found.estimate is not None
    assert found.estimate.value == pytest.approx(-0.047)
    assert not found.of_these  # no model took part


def test_rows_on_models_are_of_these_models_and_know_their_clusters() -> None:
    cell = {"value": 0.02, "low": -0.05, "high": 0.09, "stderr": 0.03, "n": 48, "clusters": 12, "words": 6}
    printed = {**cell, "value": -0.3, "low": -0.4, "high": -0.2}
    rejection = {"target": "RMU", "where": "option", "scale": 0.1, "difference": cell, "printed_difference": printed}
    growth = {"target": "RMU", "smaller": 0.1, "larger": 0.3, "first_order": 2.2, "growth": {**cell, "low": 0.01}}
    rows = claims_on_analyses.theory_claims(theory_tables(rejection=[rejection], growth=[growth]))
    found = {each.claim: each for each in rows}
    assert {key: each.finding for key, each in found.items()} == {
        "variety": "holds", "rejection": "holds", "rejection-printed": "does not hold",
    }  # fmt: skip
    assert all(each.of_these for each in rows)
    estimate = found["rejection"].estimate
    assert estimate is not None
    assert estimate.interval(0.95) == pytest.approx((-0.05, 0.09))
    error = 0.07 / stats.t.ppf(0.975, 5)  # six words: the fewest groups rule
    off = found["rejection-printed"].estimate
    assert off is not None
    beyond = (0.3 - 0.1) / (0.1 / stats.t.ppf(0.975, 5))  # the nearer end of the margin
    assert p_of(found["rejection-printed"].rule, off) == pytest.approx(2 * stats.t.sf(beyond, 5))
    assert estimate.p(0.0) == pytest.approx(2 * stats.t.sf(0.02 / error, 5))


def test_the_layers_where_sensitivity_falls() -> None:
    cell = {"value": -0.4, "low": -0.6, "high": -0.2, "stderr": 0.1, "n": 8}
    layer = {"target": "RMU", "layer": 4, "applied_change": cell, "moved_change": None}
    third = {"target": "RMU", "reading": "‖Jξ‖²/‖Jz‖²", "against": "last third", "difference": cell}
    data = {"layers": {"RMU": 3}, "depth": 8, "tables": {"layers": [layer], "thirds": [third]}}
    behind, middle = claims_on_analyses.sensitivity_claims(data)
    assert (behind.claim, middle.claim) == ("sensitivity", "middle-layers")
    assert behind.finding == middle.finding == "holds"
    assert behind.of_these
    assert middle.of == "RMU, against the last third"
    assert isinstance(middle, Outcome)

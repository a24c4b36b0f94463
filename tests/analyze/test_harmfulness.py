"""Intervals of n-grams: the n-gram is the unit, and two classes are other questions. Against formulas by hand."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from robust_unlearning.analyze import harmfulness, ngram_answers
from robust_unlearning.evaluate.record import Record
from robust_unlearning.perturb.ngrams import TOP
from robust_unlearning.stats.factors import Groups

pytestmark = pytest.mark.unit

WORDS = 10


def ngram(number: int, name: str, **more: object) -> ngram_answers.Ngram:
    return ngram_answers.Ngram.model_validate(
        {"text": f"{name} {number}", "n": 2, "class": name, "similarity": 0, **more}
    )


def records(values: dict[str, np.ndarray]) -> tuple[list[Record], dict[str, ngram_answers.Ngram]]:
    """Questions whose excess harm is as given, by class, the n-grams in turn."""
    rows, classes = [], {}
    for name, harms in values.items():
        for index, harm in enumerate(harms):
            word = ngram(index % WORDS, name)
            classes[word.text] = word
            for form, logp in (("option", float(harm)), ("option-control", 0.0)):
                held = {"forget_token": word.text, "control_token": "zu", "answer": 0, "correct": harm > 0}
                row = {"task": f"q/letters/{form}", "id": f"{name} {index}", "logprobs": [logp, -3], "tokens": [1, 1]}
                rows.append(Record.from_dict({**row, **held}))
    return rows, classes


def clustered_variance(values: np.ndarray) -> tuple[float, float]:
    """Of the mean, over n-grams and over questions one by one: plain sums."""
    rest, n = values - values.mean(), len(values)
    sums = [rest[word::WORDS].sum() for word in range(WORDS)]
    over_words = WORDS / (WORDS - 1) * sum(each**2 for each in sums) / n**2
    return over_words, n / (n - 1) * (rest**2).sum() / n**2


def test_the_class_difference_adds_both_sides_by_ngram() -> None:
    rng = np.random.default_rng(3)
    values = {name: rng.normal(size=500) + np.tile(rng.normal(size=WORDS), 50) for name in ("least", "most")}
    asked = ngram_answers.asked_of(*records(values))
    effect = ngram_answers.most_less_least(ngram_answers.NgramAnswers.of(asked), "most", "least")
    assert effect is not None
    found = effect.estimate()
    difference = values["most"].mean() - values["least"].mean()
    assert found.value == pytest.approx(difference)
    parts = []
    for each in values.values():
        words, _ = clustered_variance(each)  # each question is one cluster, which adds nothing beyond single questions
        parts.append((words, WORDS - 1))
    total = sum(variance for variance, _ in parts)
    quantile = sum(variance * stats.t.ppf(0.975, df) for variance, df in parts) / total
    assert found.low == pytest.approx(difference - quantile * total**0.5)
    assert found.high == pytest.approx(difference + quantile * total**0.5)
    naive = 1.96 * np.hypot(*(each.std(ddof=1) / 500**0.5 for each in values.values()))
    assert found.high - found.value > 3 * naive


def test_ten_ngrams_without_an_effect_of_class_seldom_look_like_one() -> None:
    """Each n-gram harms by itself, classes do not: at 1,000 questions a normal interval over questions errs often."""
    rng = np.random.default_rng(0)
    wrong = naive = 0
    for _ in range(200):
        values = {name: rng.normal(size=500) + np.tile(rng.normal(size=WORDS), 50) for name in ("least", "most")}
        of = {
            name: ngram_answers.NgramAnswers(each, each, [name] * 500, by_word(name)) for name, each in values.items()
        }
        found = ngram_answers.apart(values["most"], of["most"].groups, values["least"], of["least"].groups).estimate()
        assert found.low is not None
        assert found.high is not None
        wrong += not found.low < 0 < found.high
        error = np.hypot(*(each.std(ddof=1) / 500**0.5 for each in values.values()))
        naive += abs(values["most"].mean() - values["least"].mean()) > 1.96 * error
    assert naive > 80
    assert wrong <= 16  # 10 expected at 5 %; P(more than 16) = 2 %


def by_word(name: str) -> Groups:
    return Groups(None, [f"{name} {index % WORDS}" for index in range(500)])


def test_accuracy_and_excess_of_a_class_cluster_by_ngram() -> None:
    rng = np.random.default_rng(5)
    harms = rng.normal(size=200) + np.tile(rng.normal(size=WORDS), 20)
    (found,) = harmfulness.group(ngram_answers.asked_of(*records({"most": harms})))
    assert found.excess is not None
    words, single = clustered_variance(harms)
    assert words > single
    quantile = stats.t.ppf(0.975, 9)
    assert found.excess.high == pytest.approx(harms.mean() + quantile * words**0.5)
    right = (harms > 0).astype(float)
    words, single = clustered_variance(right)
    quantile = stats.t.ppf(0.975, 9)
    p = right.mean()
    square = quantile**2 * words / (p * (1 - p))  # z²/n with n = p(1-p)/V: Wilson's interval
    centre, half = p + square / 2, (square * p * (1 - p) + square**2 / 4) ** 0.5
    assert found.accuracy.low == pytest.approx((centre - half) / (1 + square))
    assert (found.accuracy.words, found.ngrams, found.n) == (WORDS, WORDS, 200)


def test_ngrams_taken_document_by_document_are_one_for_each_document() -> None:
    assert ngram(1, TOP, document=7).unit == "document 7"
    assert ngram(1, TOP).unit == f"{TOP} 1"
    assert ngram(1, "most_similar", document=7).unit == "most_similar 1"
    rows, _ = records({TOP: np.linspace(-1, 1, 40)})
    classes = {f"{TOP} {number}": ngram(number, TOP, document=number // 5) for number in range(WORDS)}
    report = harmfulness.analyse({"rmu": rows}, classes)
    assert [table.key for table in report.tables] == ["lengths"]
    assert report.tables[0].rows[0]["excess"].words == 2
    assert "the document is the unit: 2 documents for each length" in report.notes[0]
    assert len(report.notes) == 1

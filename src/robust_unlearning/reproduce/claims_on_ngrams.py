"""The rows of the paper's claims on n-grams, from what models answered to questions with n-grams in them.

Figure 4 rests on classes of n-grams over all documents, Tables 2 to 5 on those most like each document: two selections,
which are never mixed. Rows are effects over questions, with n-grams (or the documents that they were taken from) as a
factor; models are of one seed, so they are of these models.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from robust_unlearning.analyze.ngram_answers import NgramAnswers, most_less_least
from robust_unlearning.reproduce import paper
from robust_unlearning.reproduce.verdicts import Outcome
from robust_unlearning.stats.effects import Effect
from robust_unlearning.stats.estimates import Array
from robust_unlearning.stats.factors import Groups
from robust_unlearning.stats.format import NATS, shown

Data = Mapping[str, Any]
BASE = "base"
MOST, LEAST = "most_similar", "least_similar"


def ngram_claims(data: Data) -> list[Outcome]:
    """Figure 4: the most similar class against the least similar; Tables 2 to 5: RNA less none, by length."""
    return [*_similarity(data), *_gains(data)]


def _similarity(data: Data) -> list[Outcome]:
    """Models without noise, length by length; what the base does stands beside."""
    asked, excess = data["classes"]["asked"], data["classes"]["excess"]
    plain = [each["label"] for each in data["subjects"] if not each["noise"]]
    rows = []
    for length, about in asked.items():

        def effect_of(label: str, length: str = length, about: Data = about) -> tuple[Effect | None, str]:
            if excess[label][length] is None:
                return None, ""
            groups = Groups(about["clusters"], about["words"])
            numbers = np.array(excess[label][length], dtype=float)
            answers = NgramAnswers(np.zeros(len(numbers)), numbers, about["classes"], groups)
            few = [name for name in (MOST, LEAST) if answers.only(name).units == 1]
            why = f"one n-gram of the class {few[0].replace('_', ' ')}: nothing is said of others" if few else ""
            return most_less_least(answers, MOST, LEAST), why

        of_base, _ = effect_of(BASE)
        beside = f"base {shown(of_base.estimate(), NATS)}" if of_base else ""
        printed = "harm more" if length == "2" else ""
        for label in plain:
            effect, undecided = effect_of(label)
            if effect is not None:
                of = f"{label}, {length}-grams"
                rows.append(Outcome("similarity", of, effect, printed, beside, undecided=undecided))
    return rows


def _gains(data: Data) -> list[Outcome]:
    """RNA less none in accuracy with n-grams, question by question, for each method; and family against family."""
    answers = data["top_of_each_document"]
    plain, rna = (
        {each["title"]: answers["right"][each["label"]] for each in data["subjects"] if bool(each["noise"]) == noisy}
        for noisy in (False, True)
    )
    titles = [title for title in rna if title in plain]
    rows = []
    for length, about in answers["asked"].items() if titles else ():
        groups = Groups(about["clusters"], about["words"])
        gains = {title: np.array(rna[title][length]) - np.array(plain[title][length]) for title in titles}
        rows += [
            Outcome("ngrams", f"{title}, {length}-grams", Effect({0: gain}, groups, answers=True), printed)
            for title, gain in gains.items()
            for printed in (_printed(int(length), [title]),)
        ]
        for claim, (first, second) in FAMILIES.items():
            sides = [[title for title in titles if title in family] for family in (first, second)]
            if all(sides):
                ours, others = (_mean(gains[title] for title in side) for side in sides)
                printed = _printed(int(length), *sides)
                rows.append(Outcome(claim, f"{length}-grams", Effect({0: ours - others}, groups), printed))
    return rows


FAMILIES = {
    "ngrams-mse": [tuple(each for each in paper.PREFERENCE if each.endswith(end)) for end in ("MSE", "KL")],
    "ngrams-representation": [paper.REPRESENTATION, paper.PREFERENCE],
}
"""Claim -> the methods whose gains are averaged, and those that they are set against."""


def _mean(rows: Iterable[Array]) -> Array:
    mean: Array = np.mean(list(rows), axis=0)
    return mean


def _printed(length: int, titles: Sequence[str], others: Sequence[str] = ()) -> str:
    """The paper's gain of perturbed accuracy, mean over the methods named, less that of others; where it prints another
    gain, that too.
    """
    if length not in paper.PERTURBED or not {*titles, *others} <= set(paper.METHODS):
        return ""
    ours, theirs = (float(np.mean([paper.gain(length, each) for each in side] or [0])) for side in (titles, others))
    text = f"{ours - theirs:+.1f} points"
    if not (misprints := [title for title in (*titles, *others) if (length, title) in paper.PRINTED_GAINS]):
        return text
    if len(titles) == 1 and not others:
        return f"{text} (of the accuracies; misprint: {paper.PRINTED_GAINS[length, titles[0]]:+.1f})"
    return f"{text} (of the accuracies; misprint: {', '.join(misprints)})"

"""The question sets of a suite: each question gets one pair of words, the same in every place."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from quiz import numbered_questions

from robust_unlearning import files
from robust_unlearning.data.questions import Question
from robust_unlearning.errors import UserError
from robust_unlearning.perturb.forms import (
    Perturbation,
    QuestionSet,
    perturbed_forms,
)
from robust_unlearning.perturb.places import (
    SENTENCES,
    WHERE,
)

PAIRS = {"supernova": ("bakery",), "black hole": ("rowing boat",), "comet": ("violin",)}
WORDS = {(forget, control) for forget, (control,) in PAIRS.items()}
Pairs = dict[str, tuple[str, ...]]


def paired_forms(
    questions: list[Question], pairs: Pairs, where: str, seed: int
) -> list[tuple[Question, Question, tuple[str, str]]]:
    """The form with a forget-token and that with its control, and the two words."""
    forms, _ = perturbed_forms(questions, pairs, Perturbation(where=where, seed=seed, control=True), pairs=True)
    return [(form.perturbed, form.control, (*form.keywords, *form.controls)) for form in forms]


@pytest.mark.parametrize("where", WHERE)
def test_forms_of_a_pair_differ_in_the_word_only(where: str) -> None:
    for forget, control, pair in paired_forms(numbered_questions(), PAIRS, where, seed=1):
        assert forget.id == control.id
        text = "\n".join([forget.question, *forget.choices])
        assert text.count(pair[0]) == 1
        assert text.replace(pair[0], pair[1]) == "\n".join([control.question, *control.choices])


def test_draws_use_everything_they_can() -> None:
    questions = numbered_questions()
    forms = paired_forms(questions, PAIRS, "sentence", 0)
    assert {pair for *_, pair in forms} == WORDS
    starts = {forget.question.replace(pair[0], "{token}") for forget, _, pair in forms}
    used = {text for text in SENTENCES if any(start.startswith(text) for start in starts)}
    assert used == set(SENTENCES)


def test_draws_do_not_depend_on_order_or_subset() -> None:
    questions = numbered_questions()
    whole = {each[0].id: each for each in paired_forms(questions, PAIRS, "option", 5)}
    for each in paired_forms(list(reversed(questions))[::3], dict(reversed(PAIRS.items())), "option", 5):
        assert whole[each[0].id] == each
    assert [each for *_, each in paired_forms(questions, PAIRS, "sentence", 5)] == [each for *_, each in whole.values()]
    assert paired_forms(questions, PAIRS, "option", 6) != list(whole.values())


def test_pairs_that_the_question_mentions_are_not_drawn() -> None:
    mentions = [
        Question("a", "Are Supernovae bright?", ("yes", "no"), 0),
        Question("b", "Which?", ("a black hole", "stone"), 0),
        Question("c", "Who plays the violin?", ("nobody", "all"), 0),
    ]
    forms = [
        pair
        for question in mentions
        for seed in range(20)
        for *_, pair in paired_forms([question], PAIRS, "option", seed)
    ]
    assert set(forms[:20]) == WORDS - {("supernova", "bakery")}
    assert set(forms[20:40]) == WORDS - {("black hole", "rowing boat")}
    assert set(forms[40:]) == WORDS - {("comet", "violin")}


def test_a_question_without_any_pair_is_left_out() -> None:
    full = Question("a", "Is a supernova or a comet near a black hole?", ("yes", "no"), 0)
    plain = Question("b", "Which?", ("yes", "no"), 0)
    assert [each.id for each, _, _ in paired_forms([full, plain], PAIRS, "sentence", 0)] == ["b"]
    with pytest.raises(UserError, match="each of the 1 questions contains"):
        paired_forms([full], PAIRS, "sentence", 0)
    with pytest.raises(UserError, match="no token pairs"):
        paired_forms([full], {}, "option", 0)


def test_set_in_its_forms(tmp_path: Path) -> None:
    questions = numbered_questions(30)
    rows = [{"id": each.id, "question": each.question, "choices": each.choices} for each in questions]
    answers = [row | {"answer": each.answer} for row, each in zip(rows, questions, strict=True)]
    files.write_jsonl(tmp_path / "set.jsonl", answers)
    whole = QuestionSet(path=str(tmp_path / "set.jsonl"), perturb=("option", "sentence"))
    forms = whole.forms(PAIRS, seed=0)
    perturbed = [(where, control) for where in ("option", "sentence") for control in (False, True)]
    assert list(forms) == [("clean", False), *perturbed]
    assert [each for each, _ in forms["clean", False]] == [replace(each, subject="") for each in questions]
    for form in ("option", "sentence"):
        assert [pair for _, pair in forms[form, False]] == [pair for _, pair in forms[form, True]]

    def ids(limit: int) -> list[str]:
        return [each.id for each, _ in whole.model_copy(update={"limit": limit}).forms(PAIRS, 0)["clean", False]]

    order = [each.id for each in questions]
    assert len(ids(10)) == 10
    assert set(ids(10)) < set(ids(20))
    assert ids(20) == sorted(ids(20), key=order.index)
    assert ids(10) != order[:10]

"""Perturbation: only what should change changes, and it changes the same way on every machine."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest

from robust_unlearning.data.questions import Question
from robust_unlearning.errors import UserError
from robust_unlearning.files import write_jsonl
from robust_unlearning.perturb.places import (
    SENTENCES,
    WHERE,
    QuestionSet,
    TokenPair,
    draw,
    match_controls,
    paired_forms,
    perturb,
)

PAIRS = [
    TokenPair("supernova", "bakery"),
    TokenPair("black hole", "rowing boat"),
    TokenPair("comet", "violin"),
]


def some_questions(count: int = 60) -> list[Question]:
    rng = random.Random(0)
    words = ["apple", "river", "stone", "ladder", "cloud", "button", "candle", "meadow"]
    questions = []
    for index in range(count):
        choices = tuple(rng.sample(words, rng.randint(2, 5)))
        text = f"Which of these is number {index}?"
        questions.append(Question(f"set:{index}", text, choices, rng.randrange(len(choices)), "words"))
    return questions


class CharacterTokenizer:
    """One token per character, so that lengths are plain to see."""

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        assert not add_special_tokens
        assert text.startswith(" ")
        return {"input_ids": [ord(each) for each in text]}


@pytest.mark.parametrize("where", WHERE)
def test_right_answer_stays_and_little_else_changes(where: str) -> None:
    for question in some_questions():
        form = perturb(question, "supernova", where, seed=3)
        assert (form.id, form.answer, form.subject) == (question.id, question.answer, question.subject)
        assert form.choices[form.answer] == question.choices[question.answer]
        assert len(form.choices) == len(question.choices) == len(set(form.choices))
        changed = [a != b for a, b in zip(form.choices, question.choices, strict=True)]
        if where == "option":
            assert form.question == question.question
            assert sum(changed) == 1
            assert form.choices[changed.index(True)] == "supernova"
        else:
            assert not any(changed)
            if where == "end":
                assert form.question.startswith(f"{question.question} ")
            else:
                assert form.question.endswith(f" {question.question}")
            assert form.question.count("supernova") == 1


def test_forms_of_each_place() -> None:
    question = Question("q", "Why?", ("so", "not so"), 0)
    assert perturb(question, "comet", "parenthesis", 0).question == "(comet) Why?"
    assert perturb(question, "comet", "option", 0).choices == ("so", "comet")
    sentence = perturb(question, "comet", "sentence", 0).question.removesuffix(" Why?")
    assert sentence in [each.format(token="comet") for each in SENTENCES]
    assert len(set(SENTENCES)) >= 6
    assert all(each.count("{token}") == 1 for each in SENTENCES)


@pytest.mark.parametrize("where", WHERE)
def test_forms_of_a_pair_differ_in_the_word_only(where: str) -> None:
    for forget, control, pair in paired_forms(some_questions(), PAIRS, where, seed=1):
        assert forget.id == control.id
        text = "\n".join([forget.question, *forget.choices])
        assert text.count(pair.forget) == 1
        assert text.replace(pair.forget, pair.control) == "\n".join([control.question, *control.choices])


def test_draws_use_everything_they_can() -> None:
    questions = some_questions()
    forms = paired_forms(questions, PAIRS, "sentence", 0)
    assert {pair for *_, pair in forms} == set(PAIRS)
    starts = {forget.question.replace(pair.forget, "{token}") for forget, _, pair in forms}
    used = {text for text in SENTENCES if any(start.startswith(text) for start in starts)}
    assert used == set(SENTENCES)
    options = [perturb(each, "comet", "option", 0).choices.index("comet") for each in questions]
    assert len(set(options)) >= 4


def test_draws_do_not_depend_on_order_subset_or_process() -> None:
    questions = some_questions()
    whole = {each[0].id: each for each in paired_forms(questions, PAIRS, "option", 5)}
    for each in paired_forms(list(reversed(questions))[::3], PAIRS[::-1], "option", 5):
        assert whole[each[0].id] == each
    assert [each for *_, each in paired_forms(questions, PAIRS, "sentence", 5)] == [each for *_, each in whole.values()]
    assert paired_forms(questions, PAIRS, "option", 6) != list(whole.values())
    assert draw(0, "set:1", "pair") == 0xF33E29D3F5DC9514  # printf '0\x1fset:1\x1fpair' | sha256sum


def test_a_token_that_is_a_choice_is_refused() -> None:
    question = Question("q", "Which?", ("Comet", "stone"), 0)
    with pytest.raises(UserError, match="'comet' is a choice of question 'q' already"):
        perturb(question, "comet", "option", 0)
    assert perturb(question, "comet", "parenthesis", 0).choices == question.choices


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
    assert set(forms[:20]) == {PAIRS[1], PAIRS[2]}
    assert set(forms[20:40]) == {PAIRS[0], PAIRS[2]}
    assert set(forms[40:]) == {PAIRS[0], PAIRS[1]}


def test_a_question_without_any_pair_is_left_out() -> None:
    full = Question("a", "Is a supernova or a comet near a black hole?", ("yes", "no"), 0)
    plain = Question("b", "Which?", ("yes", "no"), 0)
    assert [each.id for each, _, _ in paired_forms([full, plain], PAIRS, "sentence", 0)] == ["b"]
    with pytest.raises(UserError, match="each of the 1 questions contains"):
        paired_forms([full], PAIRS, "sentence", 0)


def test_perturb_errors() -> None:
    question = some_questions(1)[0]
    with pytest.raises(UserError, match=r"unknown place for a token 'optoin': did you mean 'option'\?"):
        perturb(question, "comet", "optoin", 0)
    with pytest.raises(UserError, match="empty"):
        perturb(question, " ", "option", 0)
    with pytest.raises(UserError, match="no token pairs"):
        paired_forms([question], [], "option", 0)


def test_controls_have_as_many_tokens() -> None:
    pairs = match_controls(CharacterTokenizer(), ["star", "nova", "comets"], ["ladder", "tent", "milk", "ox"])
    assert pairs == [TokenPair("star", "tent"), TokenPair("nova", "milk"), TokenPair("comets", "ladder")]


def test_equal_lengths_come_before_near_ones_and_controls_before_repeats() -> None:
    # in order of the list, 'sun' would take 'tent' from 'nova'
    pairs = match_controls(CharacterTokenizer(), ["sun", "nova"], ["tent", "ladders"])
    assert pairs == [TokenPair("sun", "ladders"), TokenPair("nova", "tent")]
    repeats = match_controls(CharacterTokenizer(), ["star", "moon", "sun"], ["milk", "rope"])
    assert repeats == [TokenPair("star", "milk"), TokenPair("moon", "rope"), TokenPair("sun", "milk")]


def test_match_errors() -> None:
    with pytest.raises(UserError, match="no control tokens given"):
        match_controls(CharacterTokenizer(), ["star"], [])
    with pytest.raises(UserError, match="no forget-tokens given"):
        match_controls(CharacterTokenizer(), [], ["milk"])
    with pytest.raises(UserError, match="'Star' is both"):
        match_controls(CharacterTokenizer(), ["star"], ["milk", "Star"])


def test_set_in_its_forms(tmp_path: Path) -> None:
    questions = some_questions(30)
    rows = [{"id": each.id, "question": each.question, "choices": each.choices} for each in questions]
    answers = [row | {"answer": each.answer} for row, each in zip(rows, questions, strict=True)]
    write_jsonl(tmp_path / "set.jsonl", answers)
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

"""Words put into a question: only what should change changes, and in the same way on every machine."""

from __future__ import annotations

import pytest
from quiz import numbered_questions, some_questions

from robust_unlearning.data.questions import Question
from robust_unlearning.errors import UserError
from robust_unlearning.perturb.places import (
    SENTENCES,
    WHERE,
    draw,
    options_to_replace,
    perturb,
    replace_options,
)


@pytest.mark.parametrize("where", WHERE)
def test_right_answer_stays_and_little_else_changes(where: str) -> None:
    for question in numbered_questions():
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


def test_draws_use_everything_they_can() -> None:
    options = [perturb(each, "comet", "option", 0).choices.index("comet") for each in numbered_questions()]
    assert len(set(options)) >= 4


def test_draws_do_not_depend_on_the_process() -> None:
    assert draw(0, "set:1", "pair") == 0xF33E29D3F5DC9514  # printf '0\x1fset:1\x1fpair' | sha256sum


def test_a_token_that_is_a_choice_is_refused() -> None:
    question = Question("q", "Which?", ("Comet", "stone"), 0)
    with pytest.raises(UserError, match="'comet' is a choice of question 'q' already"):
        perturb(question, "comet", "option", 0)
    assert perturb(question, "comet", "parenthesis", 0).choices == question.choices


def test_perturb_errors() -> None:
    question = numbered_questions(1)[0]
    with pytest.raises(UserError, match=r"unknown place for a token 'optoin': did you mean 'option'\?"):
        perturb(question, "comet", "optoin", 0)
    with pytest.raises(UserError, match="empty"):
        perturb(question, " ", "option", 0)
    with pytest.raises(UserError, match="no tokens given"):
        perturb(question, [], "end", 0)


def test_one_keyword_is_what_perturb_does() -> None:
    for question in some_questions(30, choices=(2, 6)):
        for where in ("option", "begin", "end", "parenthesis", "sentence"):
            assert perturb(question, ["ricin"], where, 4) == perturb(question, "ricin", where, 4)


def test_forms_of_several_keywords() -> None:
    question = Question("q", "Why?", ("so", "not so", "never"), 0)
    assert perturb(question, ["a1", "b2"], "parenthesis", 0).question == "(a1, b2) Why?"
    assert perturb(question, ["a1", "b2"], "end", 0).question == "Why? a1, b2"
    assert "a1, b2 and c3" in perturb(question, ["a1", "b2", "c3"], "sentence", 0).question
    assert set(perturb(question, ["a1", "b2"], "option", 0).choices[1:]) == {"a1", "b2"}
    assert perturb(question, ["a1"], "option", 0, [2]).choices == ("so", "not so", "a1")


def test_options_drawn_are_wrong_ones_and_all_different() -> None:
    for question in some_questions(30, choices=(2, 6)):
        for count in range(1, len(question.choices)):
            drawn = options_to_replace(question, count, 1)
            assert len(set(drawn)) == count
            assert question.answer not in drawn
        with pytest.raises(UserError, match=f"it has {len(question.choices) - 1} wrong ones"):
            options_to_replace(question, len(question.choices), 1)


def test_replace_options_errors() -> None:
    question = Question("q", "Why?", ("so", "not so", "never"), 0)
    for tokens, options in ((["x"], [0]), (["x"], [3]), (["x", "y"], [1, 1]), (["x"], [1, 2])):
        with pytest.raises(UserError, match=r"give each token one of the wrong options \[1, 2\]"):
            replace_options(question, tokens, options)
    for tokens in (["x", "X "], ["so", "y"], ["never", "y"]):
        with pytest.raises(UserError, match="already"):
            replace_options(question, tokens, [1, 2])

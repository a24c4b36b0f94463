"""The forms of a set's questions: which words and options they get, and which questions have none."""

from __future__ import annotations

from pathlib import Path

import pytest
from quiz import KEYWORDS, controls_for, some_questions

from robust_unlearning import files
from robust_unlearning.data.questions import Question
from robust_unlearning.errors import UserError
from robust_unlearning.perturb.forms import (
    KEYWORD_IS_A_CHOICE,
    NO_CONTROL,
    NO_SUCH_OPTION,
    RIGHT_OPTION,
    TOO_FEW_OPTIONS,
    Perturbation,
    perturbation,
    perturbed_forms,
)
from robust_unlearning.perturb.keywords import Keyword, read_keywords


@pytest.mark.parametrize("where", ["option", "begin", "end", "parenthesis", "sentence"])
def test_only_what_was_asked_for_changes(where: str) -> None:
    for seed in range(25):
        questions = some_questions(20, seed, choices=(4, 6))
        count = 1 + seed % 3
        settings = Perturbation(where=where, count=count, seed=seed, control=True)
        forms, left_out = perturbed_forms(questions, controls_for(KEYWORDS), settings)
        assert not left_out
        for form, question in zip(forms, questions, strict=True):
            assert form.clean == question
            assert len(set(form.keywords)) == len(set(form.controls)) == count
            assert form.control is not None
            for changed, words in ((form.perturbed, form.keywords), (form.control, form.controls)):
                assert (changed.id, changed.answer, changed.subject) == (question.id, question.answer, question.subject)
                assert changed.choices[question.answer] == question.choices[question.answer]
                assert len({choice.casefold() for choice in changed.choices}) == len(question.choices)
                differ = [i for i, (a, b) in enumerate(zip(changed.choices, question.choices, strict=True)) if a != b]
                if where == "option":
                    assert changed.question == question.question
                    assert sorted(form.options) == differ
                    assert len(differ) == count
                    assert [changed.choices[index] for index in form.options] == list(words)
                else:
                    assert not differ
                    assert question.question in changed.question
                    assert all(changed.question.count(word) == 1 for word in words)
                    assert form.options == ()


def test_draws_do_not_depend_on_the_order_of_questions_or_keywords() -> None:
    questions = some_questions(60)
    settings = Perturbation(count=2, seed=5, control=True)
    whole, _ = perturbed_forms(questions, controls_for(KEYWORDS), settings)
    part, _ = perturbed_forms(questions[::-3], controls_for(KEYWORDS[::-1]), settings)
    by_id = {form.clean.id: form for form in whole}
    assert all(by_id[form.clean.id] == form for form in part)
    other, _ = perturbed_forms(questions, controls_for(KEYWORDS), settings.model_copy(update={"seed": 6}))
    assert other != whole
    assert {index for form in whole for index in form.options} == {0, 1, 2, 3}
    assert {word for form in whole for word in form.keywords} == set(KEYWORDS)


def test_questions_that_cannot_be_perturbed_are_left_out_and_counted() -> None:
    two = Question("two", "Which?", ("apple", "river"), 0)
    four = Question("four", "Which?", ("apple", "Ricin", "stone", "cloud"), 2)
    right = Question("right", "Which?", ("river", "apple", "stone", "ladder"), 3)

    def reasons(settings: Perturbation, *keywords: str, controls: tuple[str, ...] = ("trombone",)) -> dict[str, int]:
        given = dict.fromkeys(keywords, controls)
        forms, left_out = perturbed_forms([two, four, right], given, settings)
        assert len(forms) + left_out.total() == 3
        return dict(left_out)

    assert reasons(Perturbation(), "ricin") == {KEYWORD_IS_A_CHOICE: 1}
    assert reasons(Perturbation(), "ricin", "anthrax") == {}
    assert reasons(Perturbation(count=2), "anthrax", "botulin") == {TOO_FEW_OPTIONS: 1}
    assert reasons(Perturbation(options=(3,)), "anthrax") == {NO_SUCH_OPTION: 1, RIGHT_OPTION: 1}
    assert reasons(Perturbation(control=True), "anthrax", controls=("cloud", "ladder")) == {}
    assert reasons(Perturbation(control=True), "anthrax", controls=("ladder",)) == {NO_CONTROL: 1}
    with pytest.raises(UserError, match="none of the 1 questions can be perturbed"):
        perturbed_forms([two], {"ricin": ()}, Perturbation(count=1, options=(0,)))


@pytest.mark.parametrize(
    ("typed", "indices"), [("C", (2,)), ("c", (2,)), ("2", (2,)), ("B,C", (1, 2)), ("0, 3", (0, 3))]
)
def test_options_as_letters_or_indices(typed: str, indices: tuple[int, ...]) -> None:
    settings = perturbation("option", None, typed)
    assert (settings.options, settings.count) == (indices, len(indices))


def test_keywords_from_words_and_files(tmp_path: Path) -> None:
    (tmp_path / "w.txt").write_text("ricin\n\n gain of function \nRICIN\n", encoding="utf-8")
    assert [each.text for each in read_keywords(["SARS-CoV-2"], str(tmp_path / "w.txt"))] == [
        "SARS-CoV-2",
        "ricin",
        "gain of function",
    ]
    ngrams = [{"text": "viral load of the", "class": "similar", "n": 4}, "ricin"]
    expected = [Keyword("viral load of the", {"class": "similar", "n": 4}), Keyword("ricin")]
    files.write_jsonl(tmp_path / "n.jsonl", ngrams)
    files.write_json(tmp_path / "n.json", ngrams)
    files.write_json(tmp_path / "o.json", {"model": "m", "ngrams": ngrams})
    for name in ("n.jsonl", "n.json", "o.json"):
        assert read_keywords(file=str(tmp_path / name)) == expected


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("a.jsonl", '{"txt": "ricin"}', "line 1: no 'text'; the keyword has txt. Rename 'txt'"),
        ("a.jsonl", "ricin", "line 1: not JSON"),
        ("a.json", '{"words": []}', "give an array of keywords"),
        ("a.json", '[" "]', "item 1: ' ' is no keyword"),
        ("a.txt", "\n", "holds no keywords"),
    ],
)
def test_keyword_file_errors(tmp_path: Path, name: str, text: str, says: str) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(UserError) as caught:
        read_keywords(file=str(tmp_path / name))
    assert says in str(caught.value)

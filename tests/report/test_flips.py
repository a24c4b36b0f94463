"""Questions that flipped and flipped back, on records made by hand whose kinds are known."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from robust_unlearning import files
from robust_unlearning.data.questions import Question
from robust_unlearning.errors import UserError
from robust_unlearning.evaluate.record import Record, Task
from robust_unlearning.perturb.places import perturb
from robust_unlearning.report.flips import (
    BACK,
    BASE_WRONG,
    BY_RNA,
    KEPT,
    KINDS,
    LOST,
    STAYED,
    Flips,
    flips,
    read_flips,
)
from robust_unlearning.report.page import Page, Section, write_page
from robust_unlearning.results.records import AnswerSource

RIGHT, SURE, WRONG, OTHER = (0.7, 0.1, 0.1, 0.1), (0.97, 0.01, 0.01, 0.01), (0.2, 0.6, 0.1, 0.1), (0.1, 0.1, 0.7, 0.1)
FORGET, CONTROL = "ba<dur", "mil"
# what base, unlearned model and RNA say (option 0 is right): with the forget-token, the control word, as it was
SAID: dict[str, tuple[str, list[tuple[Any, Any, Any]]]] = {
    "back": (BACK, [(RIGHT, RIGHT, RIGHT), (WRONG, RIGHT, RIGHT), (RIGHT, RIGHT, RIGHT)]),
    "back-more": (BACK, [(RIGHT, RIGHT, RIGHT), (WRONG, WRONG, RIGHT), (SURE, RIGHT, RIGHT)]),
    "stayed": (STAYED, [(RIGHT, RIGHT, RIGHT), (WRONG, RIGHT, RIGHT), (OTHER, RIGHT, RIGHT)]),
    "by-rna": (BY_RNA, [(RIGHT, RIGHT, RIGHT), (RIGHT, RIGHT, RIGHT), (WRONG, RIGHT, RIGHT)]),
    "kept": (KEPT, [(RIGHT, RIGHT, RIGHT), (RIGHT, WRONG, WRONG), (RIGHT, RIGHT, RIGHT)]),
    "lost": (LOST, [(RIGHT, RIGHT, RIGHT), (WRONG, RIGHT, WRONG), (RIGHT, RIGHT, RIGHT)]),
    "base-wrong": (BASE_WRONG, [(WRONG, RIGHT, RIGHT), (WRONG, RIGHT, RIGHT), (RIGHT, RIGHT, RIGHT)]),
}
QUESTIONS = {name: Question(name, f"What is {name}?", ("a", "b", "c", "d"), 0) for name in SAID}


def record(task: str, name: str, shares: tuple[float, ...], perturbed: bool = True) -> dict[str, Any]:
    prediction = shares.index(max(shares))
    return {
        "task": task, "id": name, "answer": 0, "prediction": prediction, "correct": prediction == 0,
        # log p of the options in a model that gives half of its mass to other words
        "logprobs": [math.log(each / 2) for each in shares], "tokens": [1] * 4,
        "forget_token": FORGET if perturbed else None, "control_token": CONTROL if perturbed else None,
    }  # fmt: skip


def rows(model: int, where: str = "option") -> list[dict[str, Any]]:
    found = []
    for name, (_, said) in SAID.items():
        forget, control, clean = said[model]
        found += [record(f"near/letters/{where}", name, forget), record(f"near/letters/{where}-control", name, control)]
        found.append(record("near/letters/clean", name, clean, perturbed=False))
    return found


def source(records: list[dict[str, Any]]) -> AnswerSource:
    tasks: dict[Task, dict[Any, Record]] = {}
    for each in map(Record.from_dict, records):
        key = (each.id, each.forget_token or "", each.control_token or "")
        tasks.setdefault(each.task, {})[key] = each
    return AnswerSource(Path("."), tasks, {})


def view(where: str = "option", limit: int = 1) -> Flips:
    models = {name: source(rows(index, where)) for index, name in enumerate(("base", "RMU", "RNA"))}
    return flips({"near": QUESTIONS}, 0, models, limit)


@pytest.mark.parametrize("name", SAID)
def test_every_question_is_of_the_kind_it_was_made_to_be(name: str) -> None:
    (case,) = (case for case in view().cases if case.clean.id == name)
    assert case.kind == SAID[name][0]
    for model, forms in enumerate(SAID[name][1]):
        for form, shares in zip(("forget", "control", "clean"), forms, strict=True):
            answer = case.answers[model][form]
            assert answer.shares == pytest.approx(shares)
            assert answer.correct == (shares.index(max(shares)) == 0)


def test_counts_are_over_all_questions_and_shown_ones_by_change() -> None:
    found = view()
    (counts,) = found.counts().values()
    assert counts == {BACK: 2, STAYED: 1, BY_RNA: 1, KEPT: 1, LOST: 1, BASE_WRONG: 1}
    assert set(counts) == set(KINDS)
    assert [case.clean.id for case in found.of_kind(BACK)] == ["back-more", "back"]
    assert [case.change for case in found.of_kind(BACK)] == pytest.approx([0.77, 0.5])
    assert found.of_kind(STAYED)[0].change == pytest.approx(0.5)
    assert found.of_kind(BY_RNA)[0].change == pytest.approx(0.5)


def test_tables_hold_every_question_and_every_kind() -> None:
    flipped = view()
    (counts,) = flipped.summary().cells()
    assert counts == ["near/letters/option", "7", "2", "1", "1", "1", "1", "1", "2 of 3"]
    assert len(flipped.summary().headers) - 2 == len(flipped.meanings())
    rows = {row["id"]: row for row in flipped.numbers().rows}
    assert set(rows) == set(SAID)
    back = rows["back"]
    assert [back[f"{name}_right"] for name in ("base", "unlearned", "rna")] == [1, 0, 1]
    assert [back[f"{name}_p_right"] for name in ("base", "unlearned", "rna")] == ["0.700000", "0.200000", "0.700000"]


@pytest.mark.parametrize("where", ["begin", "end", "parenthesis", "sentence", "option"])
def test_the_token_is_marked_where_it_was_put(where: str) -> None:
    for case in view(where).cases:
        assert case.asked == perturb(case.clean, FORGET, where, 0)
        marked = [part for part, token in case.parts if token]
        assert "".join(part for part, _ in case.parts) == case.asked.question
        if where == "option":
            assert marked == []
            assert case.replaced is not None
            assert case.asked.choices[case.replaced] == FORGET
        else:
            assert marked == [FORGET]
            assert case.replaced is None


def test_without_the_clean_form_the_control_form_stands_for_it() -> None:
    models = {
        name: source([each for each in rows(index) if not each["task"].endswith("clean")])
        for index, name in enumerate(("base", "RMU", "RNA"))
    }
    kinds = {case.clean.id: case.kind for case in flips({"near": QUESTIONS}, 0, models).cases}
    assert kinds["lost"] == BACK  # right with the control word
    assert kinds["back-more"] == LOST  # wrong with it


def test_only_questions_that_all_were_asked_count() -> None:
    models = {name: source(rows(index)) for index, name in enumerate(("base", "RMU", "RNA"))}
    del models["RNA"].tasks[Task("near", "letters", "option")]["back", FORGET, CONTROL]
    assert len(flips({"near": QUESTIONS}, 0, models).cases) == len(SAID) - 1
    del models["RNA"].tasks[Task("near", "letters", "option")]
    with pytest.raises(UserError, match=r"no perturbed question in common.*near/letters/option"):
        flips({"near": QUESTIONS}, 0, models)


def suite_folder(folder: Path, model: int, questions: Path, **changes: Any) -> Path:
    files.write_jsonl(folder / "records.jsonl", rows(model))
    near = {"path": str(questions), "styles": ["letters"], "perturb": ["option"]}
    suite = {"questions": {"near": near}, "forget_tokens": [FORGET], "control_tokens": [CONTROL], **changes}
    files.write_json(folder / "evaluation.json", {"suite": suite})
    return folder


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    path = tmp_path / "near.jsonl"
    files.write_jsonl(path, [vars(each) for each in QUESTIONS.values()])
    return path


def test_folders_give_the_same_view_and_the_page_shows_it(tmp_path: Path, questions: Path) -> None:
    folders = {
        name: suite_folder(tmp_path / name, index, questions) for index, name in enumerate(("base", "RMU", "RNA"))
    }
    found = read_flips(folders, limit=1)
    assert found.cases == view().cases
    write_page(Page("Flips", "", [Section("flips", "Flips", [found])]), tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert page.count('<article class="card">') == 3  # one of each kind that is shown
    assert "1 of 2 shown" in page
    assert page.count("<mark>ba&lt;dur</mark>") == 3
    assert "ba<dur" not in page
    assert 'aria-label="RMU: 60 %, chosen"' in page
    assert "with an unrelated word (mil)" in page


def test_folders_that_do_not_fit_are_refused(tmp_path: Path, questions: Path) -> None:
    folders = {
        name: suite_folder(tmp_path / name, index, questions) for index, name in enumerate(("base", "RMU", "RNA"))
    }
    with pytest.raises(UserError, match="three folders"):
        read_flips({"base": folders["base"]})
    suite_folder(folders["RNA"], 2, questions, seed=1)
    with pytest.raises(UserError, match=r"RNA.* is of another suite than that of base"):
        read_flips(folders)
    files.write_json(folders["RNA"] / "evaluation.json", {"tasks": ["mmlu"]})
    with pytest.raises(UserError, match=r"RNA.* is not of a suite.*unlearn eval"):
        read_flips(folders)
    suite_folder(folders["RNA"], 2, questions)
    files.write_jsonl(questions, [vars(each) | {"answer": 1} for each in QUESTIONS.values()])
    with pytest.raises(UserError, match="another right answer"):
        read_flips(folders)

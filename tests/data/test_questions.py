"""Reading questions: every format gives the same questions, and every mistake names its place."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from robust_unlearning.data.questions import Question, cloze_prompt, letters_prompt, read_questions, texts_prompt
from robust_unlearning.errors import UserError

ROWS: list[dict[str, Any]] = [
    {"question": "Two and two?", "choices": ["one", "four", "six", "ten"], "answer": 1, "subject": "sums"},
    {"question": "The sky, when\nclear?", "choices": ["green", "a, b", "blue", "red"], "answer": 2},
    {"question": "Is ice cold?", "choices": ["yes", "no"], "answer": 0, "id": "ice"},
]


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_csv(path: Path, rows: list[dict[str, Any]], columns: list[str]) -> Path:
    with path.open("w", encoding="utf-8-sig", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "question", *columns, "answer", "subject"])
        for row in rows:
            choices = [*row["choices"], *[""] * (len(columns) - len(row["choices"]))]
            ends = [row["answer"], row.get("subject", "")]
            writer.writerow([row.get("id", ""), row["question"], *choices, *ends])
    return path


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    import pyarrow
    import pyarrow.parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def one(tmp_path: Path, **changes: Any) -> Question:
    """A file of one row with these changes, read."""
    return read_questions(write_jsonl(tmp_path / "set.jsonl", [ROWS[0] | changes]))[0]


def test_every_format_gives_the_same_questions(tmp_path: Path) -> None:
    full = [{"id": None, "subject": None, **row} for row in ROWS]
    jsonl = read_questions(write_jsonl(tmp_path / "set.jsonl", ROWS))
    assert jsonl == [
        Question("set:1", "Two and two?", ("one", "four", "six", "ten"), 1, "sums"),
        Question("set:2", "The sky, when\nclear?", ("green", "a, b", "blue", "red"), 2),
        Question("ice", "Is ice cold?", ("yes", "no"), 0),
    ]
    assert read_questions(write_csv(tmp_path / "set.csv", ROWS, list("ABCD"))) == jsonl
    numbered = [f"choice_{index}" for index in range(11)]  # ten sorts after two
    assert read_questions(write_csv(tmp_path / "set.csv", ROWS, numbered)) == jsonl
    assert read_questions(write_parquet(tmp_path / "set.parquet", full)) == jsonl


@pytest.mark.parametrize("answer", [2, "2", "C", "six", " six "])
def test_answer_as_number_letter_or_text(tmp_path: Path, answer: Any) -> None:
    assert one(tmp_path, answer=answer).answer == 2


def test_answer_with_two_readings_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"line 1: answer '2' could mean choice 1 or choice 2"):
        one(tmp_path, choices=["1", "2", "3"], answer="2")
    assert one(tmp_path, choices=["1", "2", "3"], answer=2).answer == 2
    assert one(tmp_path, choices=["1", "2", "30"], answer="30").answer == 2
    with pytest.raises(UserError, match="could mean"):
        one(tmp_path, choices=["B", "A"], answer="A")
    with pytest.raises(UserError, match="could mean"):
        one(tmp_path, choices=["same", "same", "other"], answer="same")


def test_equal_choices_are_kept(tmp_path: Path) -> None:
    assert one(tmp_path, choices=["same", "same", "other"], answer=2).choices == ("same", "same", "other")


def test_numbers_as_choices_become_text(tmp_path: Path) -> None:
    assert one(tmp_path, choices=[1, 2.5], answer=1).choices == ("1", "2.5")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"answer": 4}, r"line 1: answer 4 is none of the 4 choices. Give 0 to 3, A to D, or the text"),
        ({"answer": -1}, "answer -1 is none"),
        ({"answer": "E"}, "answer 'E' is none"),
        ({"answer": True}, "answer True is none"),
        ({"answer": 1.0}, "answer 1.0 is none"),
        ({"answer": "eight"}, "answer 'eight' is none"),
        ({"choices": ["one"]}, "at least two"),
        ({"choices": "one"}, "at least two"),
        ({"choices": ["one", " "]}, "choice ' ' is not a text"),
        ({"choices": ["one", None]}, "choice None is not a text"),
        ({"question": " "}, "the question is ' '"),
        ({"question": None}, "no 'question'"),
    ],
)
def test_wrong_rows_name_file_and_line(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        one(tmp_path, **changes)
    assert str(tmp_path / "set.jsonl") + ", line 1" in str(caught.value)


def test_missing_column_names_the_nearest(tmp_path: Path) -> None:
    row = {"qestion": "Why?", "choices": ["a", "b"], "answer": 0}
    path = write_jsonl(tmp_path / "set.jsonl", [ROWS[0], row])
    with pytest.raises(UserError, match=r"line 2: no 'question'.*Rename 'qestion' to 'question'\?"):
        read_questions(path)


def test_broken_files(tmp_path: Path) -> None:
    def fails(name: str, content: bytes, message: str) -> None:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=message):
            read_questions(tmp_path / name)

    fails("a.jsonl", b"", "holds no questions")
    fails("b.jsonl", b"\n{oops\n", "line 2: not JSON")
    fails("c.jsonl", b"[1]\n", "line 1: a list, but a row is a JSON object")
    fails("d.jsonl", b"\xff\xfe\n", "not UTF-8")
    fails("e.csv", b"question,A,B,answer\nWhy,not,so,0,1\n", "row 1: more cells than columns")
    fails("f.csv", b"question,answer\nWhy,0\n", "no choices")
    fails("g.csv", b"question,A,B,answer\nWhy,x,y,2\n", "row 1: answer '2' is none")
    fails("h.csv", b"", "holds no questions")
    fails("i.parquet", b"not parquet", "cannot be read as parquet")
    fails("j.xlsx", b"", "unknown kind of question file '.xlsx'")
    with pytest.raises(UserError, match=r"no such file.*Did you mean '.*a.jsonl'"):
        read_questions(tmp_path / "aa.jsonl")
    with pytest.raises(UserError, match="leave the config out"):
        read_questions(write_jsonl(tmp_path / "set.jsonl", ROWS), config="anatomy")


def test_ids_must_differ(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "set.jsonl", [ROWS[2], ROWS[0], ROWS[2]])
    with pytest.raises(UserError, match=r"line 3: id 'ice' was used already by .*line 1"):
        read_questions(path)


@pytest.fixture
def hub(tmp_path: Path) -> Path:
    """A folder laid out as MMLU on the hub, with a config `all` that repeats the others."""
    rows = [{"subject": "", **row, "id": None} for row in ROWS]
    write_parquet(tmp_path / "hub/anatomy/test-00000-of-00002.parquet", rows[:2])
    write_parquet(tmp_path / "hub/anatomy/test-00001-of-00002.parquet", rows[2:])
    write_parquet(tmp_path / "hub/anatomy/dev-00000-of-00001.parquet", rows[:1])
    write_parquet(tmp_path / "hub/virology/test-00000-of-00001.parquet", rows[:1])
    write_parquet(tmp_path / "hub/all/test-00000-of-00001.parquet", rows[:1])
    (tmp_path / "hub/README.md").write_text("nothing to read here")
    return tmp_path / "hub"


def test_hub_layout(hub: Path) -> None:
    questions = read_questions(hub)
    assert [each.id for each in questions] == ["anatomy:1", "anatomy:2", "anatomy:3", "virology:1"]
    assert [each.subject for each in questions] == ["sums", "anatomy", "anatomy", "sums"]
    assert [each.id for each in read_questions(hub, config="virology")] == ["virology:1"]
    assert [each.id for each in read_questions(hub, config="all")] == ["all:1"]
    assert [each.id for each in read_questions(hub, split="dev")] == ["anatomy:1"]
    assert [each.id for each in read_questions(hub / "anatomy")] == ["anatomy:1", "anatomy:2", "anatomy:3"]


def test_hub_errors(hub: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"unknown config 'anatmy': did you mean 'anatomy'\? Allowed: all, ana"):
        read_questions(hub, config="anatmy")
    with pytest.raises(UserError, match=r"unknown split 'tset': did you mean 'test'\?"):
        read_questions(hub, split="tset")
    with pytest.raises(UserError, match="unknown split 'dev'"):
        read_questions(hub, config="virology", split="dev")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no questions"):
        read_questions(tmp_path / "empty")
    write_parquet(hub / "anatomy/test-00001-of-00002.parquet", [ROWS[0] | {"answer": 9}])
    with pytest.raises(UserError, match=r"test-00001-of-00002.parquet, row 1: answer 9"):
        read_questions(hub)


def test_shipped_questions_are_questions() -> None:
    for name in ("demo:general_questions.jsonl", "demo:forget_questions.jsonl"):
        questions = read_questions(name)
        assert len(questions) >= 20
        assert all(len(set(each.choices)) == len(each.choices) for each in questions)
    with pytest.raises(UserError, match=r"did you mean 'demo:general_questions\.jsonl'"):
        read_questions("demo:general_question.jsonl")


def test_prompts() -> None:
    question = Question("x", " Why? ", ("so", "not so"), 1, "high_school_physics")
    assert cloze_prompt(question) == ("Question:  Why? \nAnswer:", ("so", "not so"))
    assert letters_prompt(question) == (
        "The following are multiple choice questions (with answers) about high school physics.\n\n"
        "Why?\nA. so\nB. not so\nAnswer:",
        ("A", "B"),
    )
    assert texts_prompt(question) == (letters_prompt(question)[0], ("so", "not so"))
    without = letters_prompt(Question("x", "Why?", ("so", "not so"), 1))[0]
    assert without.startswith("The following are multiple choice questions (with answers).\n\nWhy?")
    with pytest.raises(UserError, match="more than 26 choices"):
        letters_prompt(Question("x", "Why?", tuple(map(str, range(27))), 1))

"""What a model answered, by role: a question of several sets counts once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import byte_tokenizer, random_model

from robust_unlearning.data.questions import Question
from robust_unlearning.evaluate.record import Record, Task
from robust_unlearning.evaluate.suite import Evaluation, Suite, names_across
from robust_unlearning.results.measures import Measured, retained

pytestmark = pytest.mark.unit


def _record(task: str, name: str, correct: bool, **more: Any) -> Record:
    return Record(Task.parse(task), name, 0, correct=correct, logprobs=(-1.0, -2.0), tokens=(1, 1), **more)


def _needed() -> list[Record]:
    forms = [_record(f"mmlu/letters/{form}", "art:1", True) for form in ("option", "option-control")]
    return [_record("wmdp/letters/clean", "w:1", True), *forms]


def test_a_question_of_two_retained_sets_counts_once_and_as_the_nearer() -> None:
    whole = [("art:1", True), ("biology:1", False), ("biology:2", True), ("law:1", False)]
    records = [_record("mmlu/letters/clean", name, correct) for name, correct in whole]
    records += [_record("mmlu/cloze/clean", "law:1", True)]  # another style is another answer
    records += [_record("college/letters/clean", name, correct) for name, correct in whole[1:3]]
    records += [_record("again/letters/clean", "law:1", False), _record("again/letters/clean", "law:2", True)]
    own = Measured.of(Evaluation({}, [*records, *_needed()]), {"related": ["college/*"]})
    assert own.near.tolist() == [0, 1]
    assert own.far.tolist() == [1, 0, 1, 1]  # art:1, law:1 by letter, law:1 cloze, law:2
    assert len(retained(own)) == 6
    plain = Measured.of(Evaluation({}, [*records, *_needed()]), {})
    assert np.mean(retained(plain)) == np.mean(retained(own))


def test_one_id_for_two_questions_is_two_and_two_ids_for_one_are_one() -> None:
    def question(id: str, text: str) -> Question:
        return Question(id, text, ("yes", "no"), 0)

    known: dict[str, Any] = {}
    assert names_across("all", [question("all:1", "A?"), question("all:2", "B?"), question("all:3", "B?")], known) == {}
    assert names_across("part", [question("part:1", "B?"), question("part:2", "C?")], known) == {"part:1": "all:2"}
    other = [question("all:1", "D?"), question("all:2", "B?"), question("x:1", "B?"), question("part:2", "C?")]
    assert names_across("other", other, known) == {"all:1": "other/all:1"}
    assert names_across("last", [question("all:1", "D?")], known) == {"all:1": "other/all:1"}
    records = [_record("a/letters/clean", "all:1", True), _record("b/letters/clean", "all:1", False, across="b/all:1")]
    records += [_record("c/letters/clean", "c:9", True, across="all:1")]
    assert [Record.from_dict(record.as_dict()) for record in records] == records
    assert "across" not in records[0].as_dict()
    clean = _record("mmlu/letters/clean", "art:1", True)
    own = Measured.of(Evaluation({}, [*records, clean, *_needed()]), {})
    assert own.far.tolist() == [1, 0, 1]


def test_sets_of_a_suite_that_hold_parts_of_one_another(tmp_path: Path) -> None:
    rows = [{"question": f"Is it {number}?", "choices": ["yes", "no"], "answer": 0} for number in range(6)]
    places = {"one/test.jsonl": rows[:3], "two/test.jsonl": rows[3:], "whole.jsonl": rows}
    for place, lines in places.items():
        (tmp_path / place).parent.mkdir(exist_ok=True)
        (tmp_path / place).write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    questions = {name: {"path": str(tmp_path / place)} for name, place in zip("abc", places, strict=True)}
    suite = Suite.model_validate({"questions": questions})
    model = random_model("llama", vocab_size=300, max_position_embeddings=512)
    records = suite.run(model, byte_tokenizer()).records
    assert [record.id for record in records[:6]] == ["test:1", "test:2", "test:3"] * 2
    assert len({record.question for record in records}) == 6
    assert len(records) == 12

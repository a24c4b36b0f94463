"""Tasks and records: their names and lines, read and written, and what follows from them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from robust_unlearning import files
from robust_unlearning.evaluate.record import Record, Task, by_task, control_of, control_tasks, excess_of, read_records

TOKENS = {"forget_token": None, "control_token": None}


@pytest.mark.parametrize(
    ("name", "task"),
    [
        ("near/letters/clean", Task("near", "letters", "clean")),
        ("near/letters/option", Task("near", "letters", "option")),
        ("near/letters/option-control", Task("near", "letters", "option", control=True)),
        ("a/b/cloze/begin", Task("a/b", "cloze", "begin")),
        ("wmdp_bio", Task("wmdp_bio")),
        ("ng_anatomy_control", Task("ng_anatomy_control")),
    ],
)
def test_a_name_is_a_task(name: str, task: Task) -> None:
    assert Task.parse(name) == task
    assert task.name == str(task) == name


def test_the_forms_of_a_task() -> None:
    task = Task("near", "letters", "option")
    assert (task.clean_form.name, task.control_form.name) == ("near/letters/clean", "near/letters/option-control")
    assert [task.perturbed, task.control_form.perturbed, task.clean_form.perturbed] == [True, True, False]
    assert not Task("mmlu").perturbed
    assert control_of(task, [task.control_form]) == task.control_form
    assert control_of(task.control_form, [task.control_form]) is None
    sets = [Task("ng_anatomy"), Task("ng_control_anatomy"), Task("quality_control"), Task("quality_control_control")]
    assert control_tasks([task, task.control_form, *sets]) == {task.control_form, sets[1], sets[3]}


@pytest.mark.parametrize(
    "line",
    [
        {"task": "q/cloze/clean", "id": "a", "answer": 1, "prediction": 0, "correct": False, "correct_norm": True,
         "logprobs": [-1.0, -2.5], "tokens": [1, 2], **TOKENS},
        {"task": "mmlu", "id": "b", "doc_hash": "f0", "filter": "first", "answer": None, "prediction": 0,
         "correct": False, "correct_norm": False, "logprobs": [-1.0], "tokens": [1], **TOKENS},
        {"task": "gsm8k", "id": "c", "doc_hash": "f1", "exact_match": 1.0, **TOKENS},
        {"task": "copa", "id": "d", "doc_hash": "f2", "acc": 1.0, "f1": 0.5, "correct": True, **TOKENS},
        {"task": "free", "id": "e", "answer": "12", "prediction": "twelve", "correct": False, **TOKENS},
    ],
)  # fmt: skip
def test_a_line_is_written_as_it_was_read(line: dict[str, Any]) -> None:
    assert json.dumps(Record.from_dict(line).as_dict()) == json.dumps(line)


def test_only_line_feeds_end_a_line(tmp_path: Path) -> None:
    record = Record(Task("q"), "a\u2028b\x85c", answer=0, prediction=0, correct=True)
    files.write_jsonl(tmp_path / "records.jsonl", [record.as_dict()] * 2)
    assert read_records(tmp_path / "records.jsonl") == [record] * 2


def test_log_probabilities_of_the_right_answer() -> None:
    task = Task("near", "letters", "option")
    forget = Record(task, "a", answer=1, logprobs=(-1.0, -3.0), tokens=(1, 2))
    control = Record(task.control_form, "a", answer=1, logprobs=(-2.0, -2.0), tokens=(1, 2))
    assert (forget.scored, forget.logp, forget.answer_tokens) == (True, -3.0, 2)
    assert forget.logp_among == pytest.approx(-3 - np.logaddexp(-1, -3))
    assert excess_of([forget], [control]).tolist() == [-0.5]  # a token
    assert not Record(task, "a", answer="free").scored
    assert by_task([forget, control, forget]) == {task: [forget, forget], task.control_form: [control]}


def test_the_prediction_is_the_most_probable_option() -> None:
    record = Record.of_choices(Task("q"), "a", 1, ["yes", "certainly not"], [(-2.0, 1), (-3.0, 3)])
    assert (record.prediction, record.correct, record.correct_norm) == (0, False, True)  # per byte the longer one
    assert (record.logprobs, record.tokens, record.right) == ((-2.0, -3.0), (1, 3), 0.0)

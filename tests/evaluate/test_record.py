"""Tasks and records: their names and lines, read and written, and what follows from them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from robust_unlearning import files
from robust_unlearning.errors import UserError
from robust_unlearning.evaluate.record import (
    Record,
    Task,
    by_task,
    control_of,
    control_tasks,
    excess_of,
    groups_of,
    read_records,
)

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


def test_excess_is_the_difference_of_the_harms() -> None:
    rng = np.random.default_rng(0)
    clean, forget, control = rng.normal(-5, 2, size=(3, 50))
    tokens = rng.integers(1, 5, size=50)

    def records(logps: Any, counts: Any = tokens) -> list[Record]:
        pairs = zip(logps, counts, strict=True)
        return [Record(Task("q"), "1", answer=0, logprobs=(logp,), tokens=(int(count),)) for logp, count in pairs]

    excess = excess_of(records(forget), records(control))
    assert excess == pytest.approx((forget - control) / tokens)
    of_forget, of_control = (excess_of(records(each), records(clean)) for each in (forget, control))
    assert excess == pytest.approx(of_forget - of_control)
    with pytest.raises(UserError, match="at least 1"):
        excess_of(records(forget, tokens * 0), records(control))


def test_questions_about_one_thing_hang_together() -> None:
    def asked(id: str, word: str | None = None, style: str = "cloze", **more: Any) -> Record:
        return Record(Task("near", style, "clean"), id, forget_token=word, **more)

    apart = groups_of([asked("1"), asked("2"), asked("3", cluster="x")])
    assert (apart.clusters, apart.words) == (None, None)
    together = groups_of([asked("1", "a", cluster="x"), asked("2", "b"), asked("3", "a", cluster="x")])
    assert together.clusters is not None
    assert [list(together.clusters).index(each) for each in together.clusters] == [0, 1, 0]
    assert together.words == ["a", "b", "a"]
    twice = groups_of([asked("1"), asked("2"), asked("1", style="letters")])
    assert [each == twice.clusters[0] for each in twice.clusters or ()] == [True, False, True]
    row = groups_of([Record(Task(name), name, doc_hash="h") for name in ("wmdp_bio", "wmdp_bio_answers")])
    assert row.clusters == ["h", "h"]
    assert groups_of([asked("1", "a"), asked("2")]).words is None

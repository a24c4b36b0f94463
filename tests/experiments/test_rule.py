"""What is chosen: rules on made-up scores, roles of tasks, answers by role."""

from __future__ import annotations

import numpy as np
import pytest

from robust_unlearning import UserError
from robust_unlearning.evaluate.record import Record, Task
from robust_unlearning.evaluate.suite import Evaluation
from robust_unlearning.experiments.rule import DEFAULT_RULE, answers_of, choose, parse_rule
from robust_unlearning.results.roles import role_of, roles

pytestmark = pytest.mark.unit


def _setting(forget: float, retain: float, perturbed: float) -> dict[str, float]:
    return {"forget": forget, "retain": retain, "perturbed": perturbed}


BASE, CHANCE = _setting(0.9, 0.8, 0.8), _setting(0.25, 0.25, 0.25)


@pytest.mark.parametrize(
    ("rule", "chosen"),
    [
        ("max perturbed where forget<=0.3 and retain>=0.95*base", 1),
        ("max perturbed where forget <= chance+0.2", 3),
        ("max perturbed", 0),
        ("min forget", 2),
        ("max retain where forget<=base-0.5", 3),
        ("max perturbed where forget<=0.1", None),
    ],
)
def test_the_rule_on_made_up_scores(rule: str, chosen: int | None) -> None:
    settings = [
        _setting(0.9, 0.8, 0.8),  # has forgotten nothing
        _setting(0.3, 0.77, 0.6),
        _setting(0.2, 0.76, 0.5),
        _setting(0.4, 0.79, 0.7),
        _setting(0.25, 0.5, 0.65),  # has lost what it should keep
        None,  # failed
    ]
    found = choose(parse_rule(rule), settings, [BASE] * len(settings), CHANCE)
    assert found.index == chosen
    if chosen is None:
        assert found.nearest == 2
        assert found.broken[2] == ("forget 0.200 > 0.100",)


def test_ties_go_to_what_keeps_more_then_forgets_more_then_comes_first() -> None:
    settings = [_setting(0.3, 0.7, 0.5), _setting(0.3, 0.8, 0.5), _setting(0.2, 0.8, 0.5), _setting(0.2, 0.8, 0.5)]
    assert choose(parse_rule("max perturbed"), settings, [BASE] * 4, CHANCE).index == 2


@pytest.mark.parametrize(
    ("rule", "says"),
    [
        ("perturbed", "does not begin with max or min"),
        ("max pertubed", "did you mean 'perturbed'"),
        ("max perturbed where forget<0.3", "is no bound"),
        ("max perturbed where forget<=low", "is no bound"),
        ("max perturbed where excess_harm>=chance", "no chance level"),
    ],
)
def test_rules_that_are_none(rule: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        parse_rule(rule)
    assert parse_rule(DEFAULT_RULE).bounds[1].limit({"retain": 0.5}, {}) == pytest.approx(0.475)


def test_a_measure_without_tasks_is_asked_for() -> None:
    with pytest.raises(UserError, match=r"asks for forget.*--forget"):
        choose(parse_rule(DEFAULT_RULE), [{"perturbed": 1.0, "retain": 1.0}], [BASE], CHANCE)


@pytest.mark.parametrize(
    ("task", "role"),
    [
        ("forget/letters/clean", "forget"),
        ("near/letters/clean", "retain"),
        ("near/letters/option", "perturbed"),
        ("near/letters/option-control", None),
        ("forget/letters/option", None),
        ("wmdp_bio", "forget"),
        ("mmlu", "retain"),
        ("mmlu_perturbed", "perturbed"),
    ],
)
def test_roles_by_name(task: str, role: str | None) -> None:
    assert role_of(Task.parse(task)) == role


def test_roles_by_pattern_take_tasks_from_the_others() -> None:
    names = ["astronomy/cloze/clean", "general/cloze/clean", "general/cloze/parenthesis"]
    tasks = [Task.parse(name) for name in names]
    found = roles(tasks, {"forget": ["astronomy/*"], "retain": (), "perturbed": ()})
    assert found == {"forget": tasks[:1], "retain": tasks[1:2], "perturbed": tasks[2:]}
    with pytest.raises(UserError, match="no task has that name"):
        roles(tasks, {"forget": ["astro"]})


def test_answers_are_means_by_question() -> None:
    def row(task: str, name: str, logprobs: list[float], correct: bool) -> Record:
        return Record(Task.parse(task), name, 0, correct=correct, logprobs=tuple(logprobs), tokens=(2, 2))

    records = [
        row("forget/letters/clean", "a", [-1, -2], True),
        row("near/letters/clean", "b", [-1, -2], True),
        row("far/letters/clean", "c", [-1, -2], False),
        row("near/letters/option", "b", [-3.0, -1], False),
        row("near/letters/option-control", "b", [-2.0, -1], False),
        row("near/letters/sentence", "b", [-1.0, -2], True),
        row("near/letters/sentence-control", "b", [-1.5, -2], True),
    ]
    found = answers_of(Evaluation({}, records), {})
    assert {key: each.tolist() for key, each in found.values.items()} == {
        "forget": [1.0],
        "forgetting": [pytest.approx(np.log(1 + np.exp(-1)))],  # −log p of the right one of two, a nat apart
        "retain": [1.0, 0.0],
        "perturbed": [0.5],
        "excess_harm": [(-0.5 + 0.25) / 2],
    }
    assert found.chance == {"forget": 0.5, "retain": 0.5, "perturbed": 0.5}
    assert found.groups["forgetting"] == found.groups["forget"]
    assert set(found.groups) == set(found.values)
    twice = answers_of(Evaluation({}, [*records, row("part/letters/clean", "c", [-1, -2], False)]), {})
    assert twice.values["retain"].tolist() == [1.0, 0.0]  # a set that is a part of another
    tasks = [row("mmlu_a", "0", [-1, -2], True), row("mmlu_b", "0", [-1, -2], False)]  # another harness counts from 0
    assert answers_of(Evaluation({}, tasks), {}).values["retain"].tolist() == [1.0, 0.0]

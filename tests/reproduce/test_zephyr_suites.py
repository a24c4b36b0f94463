"""The suites of the Zephyr target: words and their counts, what has a role, and what analyses look at."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from robust_unlearning.analyze.inputs import harmless
from robust_unlearning.errors import UserError
from robust_unlearning.evaluate.record import CLEAN, Task
from robust_unlearning.evaluate.suite import Suite
from robust_unlearning.files import locate, read_yaml
from robust_unlearning.reproduce.estimate import prompts_of
from robust_unlearning.reproduce.target import load_target
from robust_unlearning.results.roles import roles

pytestmark = pytest.mark.unit
NAMES = ("zephyr-7b", "zephyr-7b-validation", "zephyr-7b-sars-cov-2", "zephyr-7b-sars-cov-2-validation")


def _suite(name: str) -> Suite:
    return Suite.model_validate(read_yaml(locate(f"reproduce:{name}.yaml"), "suite"))


@pytest.mark.parametrize("name", NAMES)
def test_each_forget_token_has_a_control_of_its_own(name: str) -> None:
    suite = _suite(name)
    count = 1 if "sars" in name else 10
    assert len(set(suite.forget_tokens)) == len(set(suite.control_tokens)) == count
    assert suite.forget_tokens[0] == "SARS-CoV-2"
    assert not {word.casefold() for word in suite.forget_tokens} & {word.casefold() for word in suite.control_tokens}
    report = _suite(name.replace("-validation", ""))
    assert (suite.forget_tokens, suite.control_tokens) == (report.forget_tokens, report.control_tokens)


def test_perturbed_questions_of_what_is_forgotten_have_no_role_and_are_no_harmless_ones() -> None:
    target, suite = load_target("zephyr-7b"), _suite("zephyr-7b")
    tasks = [
        Task(name, style, form)
        for name, source in suite.questions.items()
        for style in source.styles
        for form in (CLEAN, *source.perturb)
    ]
    found = roles(tasks, target.roles.model_dump())
    assert {task.set for task in found["forget"]} == {"wmdp_bio", "wmdp_cyber"}
    assert {task.form for task in found["forget"]} == {CLEAN}
    assert {task.set for task in found["perturbed"]} == {"mmlu"}
    perturbed = {name for name, source in harmless(suite).questions.items() if source.perturb}
    assert perturbed == {"mmlu"}


def test_a_suite_that_perturbs_only_what_is_forgotten_shows_nothing_harmless() -> None:
    suite = _suite("zephyr-7b")
    only = suite.model_copy(update={"questions": {"wmdp_bio": suite.questions["wmdp_bio"]}})
    with pytest.raises(UserError, match="only into questions that are to be forgotten"):
        harmless(only)
    named = suite.model_copy(
        update={"questions": {"bio": suite.questions["wmdp_bio"], "mmlu": suite.questions["mmlu"]}}
    )
    kept = harmless(named, {"forget": ["bio/*"]})
    assert {name for name, source in kept.questions.items() if source.perturb} == {"mmlu"}


@pytest.mark.parametrize("suffix", ["", "-sars-cov-2"])
def test_the_targets_prompts_are_those_of_the_real_sets(
    suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sets in their published sizes, with questions that are all alike but for their ids."""
    monkeypatch.chdir(tmp_path)
    rows = {
        "wmdp": {"wmdp-bio": {"test": 1273}, "wmdp-cyber": {"test": 1987}},
        "mmlu": {
            "college_biology": {"test": 144, "validation": 16},
            "computer_security": {"test": 100, "validation": 11},
            "others": {"test": 14042 - 244, "validation": 1531 - 27},
        },
    }
    for data, configs in rows.items():
        for config, splits in configs.items():
            folder = tmp_path / "data" / data / config
            folder.mkdir(parents=True)
            for split, count in splits.items():
                line = json.dumps({"question": "Is it so?", "choices": ["yes", "no"], "answer": 0}) + "\n"
                (folder / f"{split}.jsonl").write_text(line * count, encoding="utf-8")
    counted = tuple(prompts_of(_suite(f"zephyr-7b{suffix}{each}")) for each in ("", "-validation"))
    assert counted == load_target("zephyr-7b").prompts

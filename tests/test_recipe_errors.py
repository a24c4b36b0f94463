"""Recipes that are wrong: every error at once, with the nearest names."""

from __future__ import annotations

import math
from typing import Any

import pytest
from recipe_errors import lines_of, load_error

from robust_unlearning import load_recipe

# --- errors


def test_every_error_is_in_one_message_with_the_nearest_names() -> None:
    message = load_error(
        {
            "method": "rmu",
            "model": "some/model",
            "topics": {"biology": {"forget": "forget.jsonl", "retian_weight": 3}},
            "retain": "retain.jsonl",
            "steering_scale": 6.5,
            "learning_rat": 1,
            "steps": "many",
            "batch_size": 0,
            "noise_std": 0.1,
            "noise_variance": 0.2,
            "train_layers": [9],
        },
        "warmup",
    )
    lines = lines_of(message)
    assert len(lines) == 7
    expected = {
        "learning_rat": "did you mean 'learning_rate'?",
        "retian_weight": "did you mean 'retain_weight'?",
        "steps": "'many'",
        "batch_size": "0",
        "noise_std (0.1)": "noise_variance (0.2)",
        "train_layers": "[9]",
        "'warmup'": "field=value",
    }
    for name, says in expected.items():
        assert any(name in line and says in line for line in lines), (name, message)


def test_required_fields_are_named() -> None:
    lines = lines_of(load_error({"steps": 3}))
    assert [line.split(":")[0].strip(" -") for line in lines] == ["method", "model", "topics"]
    assert all("required" in line for line in lines)


@pytest.mark.parametrize(
    ("place", "wrong", "right"),
    [
        ((), "noise_sdt", "noise_std"),
        ((), "Layer", "layer"),
        (("retain",), "pth", "path"),
        (("topics", "biology"), "forgett", "forget"),
        (("topics", "biology"), "max_token", "max_tokens"),
        (("topics", "biology", "forget"), "min_char", "min_chars"),
        (("topics", "a topic with quite a long name"), "retian", "retain"),
    ],
)
def test_unknown_fields_get_the_nearest_name_of_their_place(
    place: tuple[str, ...], wrong: str, right: str, plain: dict[str, Any]
) -> None:
    plain["topics"]["a topic with quite a long name"] = {"forget": "other.jsonl"}
    plain["retain"] = {"path": "retain.jsonl"}
    plain["topics"]["biology"]["forget"] = {"path": "forget.jsonl"}
    here = plain
    for part in place:
        here = here[part]
    here[wrong] = 1
    (line,) = lines_of(load_error(plain))
    assert wrong in line
    assert f"did you mean {right!r}?" in line


def test_an_unknown_method_gets_the_nearest_and_all(plain: dict[str, Any]) -> None:
    (line,) = lines_of(load_error(plain, "method=rmuu"))
    assert "unknown method 'rmuu': did you mean 'rmu'?" in line
    assert "adaptive_rmu" in line


def test_a_missing_scale_is_named_with_both_places_to_set_it(plain: dict[str, Any]) -> None:
    (line,) = lines_of(load_error(plain, "method=adaptive_rmu"))
    assert "adaptive_scale: adaptive_rmu needs it" in line
    assert "topics.biology.adaptive_scale=" in line
    assert load_recipe(plain, ["method=adaptive_rmu", "topics.biology.adaptive_scale=5"])


def test_a_missing_retain_corpus_is_an_error_for_each_topic_without(plain: dict[str, Any]) -> None:
    del plain["retain"]
    plain["topics"]["cyber"] = {"forget": "cyber.jsonl", "retain": "plain.jsonl"}
    (line,) = lines_of(load_error(plain))
    assert "topics.biology.retain" in line


@pytest.mark.parametrize("field", ["steering_scale", "retain", "layer"])
def test_one_wrong_field_is_one_error(field: str, plain: dict[str, Any]) -> None:
    wrong = {"steering_scale": -1, "retain": {"pat": "x"}, "layer": "ten"}[field]
    plain["train_layers"] = [9]  # fits the layer that was meant
    plain["layer"] = 9
    lines = lines_of(load_error({**plain, field: wrong}))
    named = {line.strip(" -").split(":")[0].split(".")[0] for line in lines}
    assert named <= {field, "unknown field 'retain"}, lines


@pytest.mark.parametrize("given", [[], [8], [3, 12]])
def test_train_layers_above_the_layer_or_none_at_all_are_an_error(given: list[int], plain: dict[str, Any]) -> None:
    (line,) = lines_of(load_error({**plain, "train_layers": given}))
    assert f"train_layers: {given}" in line
    assert "layer = 7" in line


def test_no_topic_is_an_error(plain: dict[str, Any]) -> None:
    (line,) = lines_of(load_error({**plain, "topics": {}}))
    assert "topics" in line


@pytest.mark.parametrize(
    "field",
    [
        "noise_std",
        "noise_variance",
        "learning_rate",
        "weight_decay",
        "steering_scale",
        "retain_weight",
        "forget_weight",
    ],
)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_numbers_that_are_not_finite_are_refused(field: str, value: float, plain: dict[str, Any]) -> None:
    assert any(field in line for line in lines_of(load_error({**plain, field: value})))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("steps", 0),
        ("batch_size", 0),
        ("max_tokens", 1),
        ("learning_rate", 0),
        ("noise_std", -0.1),
        ("noise_variance", -1),
        ("seed", -1),
        ("layer", -1),
        ("log_every", 0),
        ("checkpoint_every", 0),
        ("retain_weight", -1),
        ("dtype", "int8"),
        ("noise_site", "attention"),
        ("coefficient", "first"),
        ("steering_unit", "norm"),
        ("steps", 2.5),
    ],
)
def test_values_out_of_range_name_the_field_and_what_was_given(field: str, value: Any, plain: dict[str, Any]) -> None:
    lines = lines_of(load_error({**plain, field: value}))
    assert any(f"{field}:" in line and f"given {value!r}" in line for line in lines)

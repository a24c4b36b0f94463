"""Recipes: every error at once, overrides, defaults, and a content hash that only the content decides."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import yaml

from robust_unlearning import UserError, load_recipe
from robust_unlearning.recipe import Recipe, recipe_names


@pytest.fixture
def plain() -> dict[str, Any]:
    """The least a recipe must say. Nothing it names has to exist."""
    return {
        "method": "rmu",
        "model": "some/model",
        "topics": {"biology": {"forget": "forget.jsonl"}},
        "retain": "retain.jsonl",
        "steering_scale": 6.5,
    }


def _error(source: Any, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load_recipe(source, overrides)
    return str(caught.value)


def _lines(message: str) -> list[str]:
    """The errors of a message, one a line, after the line that counts them."""
    head, *lines = message.splitlines()
    count = int(head.split(": ")[-1].split()[0])
    assert count == len(lines), message
    return lines


# --- defaults


def test_defaults_are_those_of_the_paper(plain: dict[str, Any]) -> None:
    recipe = load_recipe(plain)
    assert (recipe.layer, recipe.band_layers, recipe.train_tensors) == (7, (5, 6, 7), "mlp.down_proj")
    assert (recipe.retain_weight, recipe.forget_weight, recipe.learning_rate) == (1200, 1, 5e-5)
    assert (recipe.steps, recipe.batch_size, recipe.max_tokens, recipe.seed) == (500, 4, 512, 0)
    assert (recipe.rna_std, recipe.noised_layers, recipe.noise_site) == (0, (7,), "block")
    assert (recipe.coefficient, recipe.steering_unit, recipe.dtype) == ("per_sample", "absolute", "auto")
    assert recipe.allow_pickle is False
    assert recipe.trust_remote_code is False


def test_a_string_stands_for_a_source_with_that_path(plain: dict[str, Any]) -> None:
    recipe = load_recipe(plain)
    forget = recipe.topics["biology"].forget
    assert (forget.path, forget.format, forget.field) == ("forget.jsonl", "auto", "text")
    assert (forget.min_chars, forget.max_documents, forget.order) == (50, None, "shuffle")


def test_a_path_object_stands_for_a_source_too(plain: dict[str, Any]) -> None:
    recipe = load_recipe({**plain, "retain": Path("some") / "retain.jsonl"})
    assert recipe.retain is not None
    assert recipe.retain.path == str(Path("some") / "retain.jsonl")


@pytest.mark.parametrize(("layer", "band"), [(0, (0,)), (1, (0, 1)), (2, (0, 1, 2)), (9, (7, 8, 9))])
def test_the_band_is_the_layer_and_the_two_below_it_as_far_as_they_exist(
    layer: int, band: tuple[int, ...], plain: dict[str, Any]
) -> None:
    assert load_recipe(plain, [f"layer={layer}"]).band_layers == band


def test_given_train_layers_are_sorted_without_repeats(plain: dict[str, Any]) -> None:
    assert load_recipe({**plain, "train_layers": [6, 2, 6]}).band_layers == (2, 6)


def test_a_topic_falls_back_on_the_recipe(plain: dict[str, Any]) -> None:
    plain["topics"]["cyber"] = {"forget": "cyber.jsonl", "steering_scale": 9, "retain_weight": 0}
    recipe = load_recipe(plain)
    assert recipe.of_topic("biology", "steering_scale") == 6.5
    assert recipe.of_topic("cyber", "steering_scale") == 9
    assert recipe.of_topic("biology", "retain_weight") == 1200
    assert recipe.of_topic("cyber", "retain_weight") == 0
    assert recipe.of_topic("cyber", "max_tokens") == 512


def test_a_recipe_does_not_change_after_it_was_checked(plain: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="frozen"):
        load_recipe(plain).steps = 3  # type: ignore[misc]


def test_loading_leaves_the_callers_mapping_alone(plain: dict[str, Any]) -> None:
    load_recipe(plain, ["topics.biology.forget.field=body", "steps=3"])
    assert plain["topics"] == {"biology": {"forget": "forget.jsonl"}}
    assert "steps" not in plain


# --- noise


def test_variance_gives_its_square_root_as_scale(plain: dict[str, Any]) -> None:
    assert load_recipe(plain, ["noise_variance=0.09"]).rna_std == pytest.approx(0.3)
    assert load_recipe(plain, ["noise_std=0.3"]).rna_std == 0.3
    assert load_recipe(plain, ["noise_variance=0"]).rna_std == 0


def test_noise_std_and_variance_together_are_an_error_that_says_how_they_relate(
    plain: dict[str, Any],
) -> None:
    (line,) = _lines(_error(plain, "noise_std=0.3", "noise_variance=0.09"))
    assert "noise_std (0.3) and noise_variance (0.09) are both given" in line
    assert "square root" in line


def test_noise_above_the_layer_is_an_error(plain: dict[str, Any]) -> None:
    (line,) = _lines(_error({**plain, "noise_layers": [6, 8]}))
    assert "noise_layers: [6, 8] must name layers from 0 to layer = 7" in line


# --- errors


def test_every_error_is_in_one_message_with_the_nearest_names() -> None:
    message = _error(
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
    lines = _lines(message)
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
    lines = _lines(_error({"steps": 3}))
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
    (line,) = _lines(_error(plain))
    assert wrong in line
    assert f"did you mean {right!r}?" in line


def test_an_unknown_method_gets_the_nearest_and_all(plain: dict[str, Any]) -> None:
    (line,) = _lines(_error(plain, "method=rmuu"))
    assert "unknown method 'rmuu': did you mean 'rmu'?" in line
    assert "adaptive_rmu" in line


def test_a_missing_scale_is_named_with_both_places_to_set_it(plain: dict[str, Any]) -> None:
    (line,) = _lines(_error(plain, "method=adaptive_rmu"))
    assert "adaptive_scale: adaptive_rmu needs it" in line
    assert "topics.biology.adaptive_scale=" in line
    assert load_recipe(plain, ["method=adaptive_rmu", "topics.biology.adaptive_scale=5"])


def test_a_missing_retain_corpus_is_an_error_for_each_topic_without(plain: dict[str, Any]) -> None:
    del plain["retain"]
    plain["topics"]["cyber"] = {"forget": "cyber.jsonl", "retain": "plain.jsonl"}
    (line,) = _lines(_error(plain))
    assert "topics.biology.retain" in line


@pytest.mark.parametrize("field", ["steering_scale", "retain", "layer"])
def test_one_wrong_field_is_one_error(field: str, plain: dict[str, Any]) -> None:
    wrong = {"steering_scale": -1, "retain": {"pat": "x"}, "layer": "ten"}[field]
    plain["train_layers"] = [9]  # fits the layer that was meant
    plain["layer"] = 9
    lines = _lines(_error({**plain, field: wrong}))
    named = {line.strip(" -").split(":")[0].split(".")[0] for line in lines}
    assert named <= {field, "unknown field 'retain"}, lines


@pytest.mark.parametrize("given", [[], [8], [3, 12]])
def test_train_layers_above_the_layer_or_none_at_all_are_an_error(given: list[int], plain: dict[str, Any]) -> None:
    (line,) = _lines(_error({**plain, "train_layers": given}))
    assert f"train_layers: {given}" in line
    assert "layer = 7" in line


def test_no_topic_is_an_error(plain: dict[str, Any]) -> None:
    (line,) = _lines(_error({**plain, "topics": {}}))
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
    assert any(field in line for line in _lines(_error({**plain, field: value})))


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
    lines = _lines(_error({**plain, field: value}))
    assert any(f"{field}:" in line and f"given {value!r}" in line for line in lines)


# --- overrides


def test_overrides_are_yaml(plain: dict[str, Any]) -> None:
    recipe = load_recipe(
        {**plain, "noise_std": 0.5, "allow_pickle": True, "retain_weight": 7},
        [
            "noise_std=null",
            "allow_pickle=false",
            "retain_weight=0",
            "learning_rate=1e-4",
            "train_layers=[3, 4]",
            "dtype=float32",
            "noise_seed=",
        ],
    )
    assert recipe.noise_std is None
    assert recipe.allow_pickle is False
    assert recipe.retain_weight == 0
    assert recipe.learning_rate == 1e-4
    assert recipe.train_layers == (3, 4)
    assert recipe.dtype == "float32"
    assert recipe.noise_seed is None


def test_an_override_splits_at_the_first_equals_sign_only(plain: dict[str, Any]) -> None:
    assert load_recipe(plain, ["model=runs/std=0.1/model"]).model == "runs/std=0.1/model"


def test_the_last_override_of_a_field_wins(plain: dict[str, Any]) -> None:
    assert load_recipe(plain, ["steps=3", "steps=4"]).steps == 4


def test_leading_dashes_are_taken_off(plain: dict[str, Any]) -> None:
    assert load_recipe(plain, ["--steps=3"]).steps == 3


def test_dots_reach_into_topics_and_sources(plain: dict[str, Any]) -> None:
    recipe = load_recipe(
        plain,
        ["topics.biology.retain_weight=5", "topics.biology.forget.field=body", "retain.max_documents=9"],
    )
    biology = recipe.topics["biology"]
    assert biology.retain_weight == 5
    assert (biology.forget.path, biology.forget.field) == ("forget.jsonl", "body")
    assert recipe.retain is not None
    assert (recipe.retain.path, recipe.retain.max_documents) == ("retain.jsonl", 9)


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("steps", "write it as field=value"),
        ("=3", "write it as field=value"),
        ("train_layers=[3", "the value is not YAML"),
        ("topics.biolgy.retain_weight=5", "did you mean 'biology'?"),
        ("steering_scale.x=3", "'steering_scale' has no fields"),
        ("stepss=3", "did you mean 'steps'?"),
        ("topics.biology.retain_wieght=3", "did you mean 'retain_weight'?"),
        ("steps=", "steps"),
        ("steps=abc", "given 'abc'"),
        ("model=3", "model: input should be text; given 3."),
        ("topics=[1]", "topics: input should be a mapping; given [1]."),
        ("topics={}", "topics: input should have 1 or more items; given {}."),
        ("train_layers=3", "train_layers: input should be a list; given 3."),
        ("device=", "device: input should be text; given nothing."),
    ],
)
def test_bad_overrides_are_named(override: str, says: str, plain: dict[str, Any]) -> None:
    message = _error(plain, override)
    assert says in message
    assert len(_lines(message)) == 1


def test_all_bad_overrides_are_in_the_one_message(plain: dict[str, Any]) -> None:
    assert len(_lines(_error(plain, "steps", "layer", "learning_rate=-1"))) == 3


# --- YAML and the content hash


def test_a_yaml_round_trip_keeps_recipe_and_content_hash(plain: dict[str, Any], tmp_path: Path) -> None:
    plain["topics"]["ciberseguridad ñ"] = {
        "forget": {"path": "c.jsonl", "min_chars": 3},
        "steering_scale": 0.1,
    }
    recipe = load_recipe({**plain, "noise_std": 0.1, "snapshots": [5, 7], "learning_rate": 1e-5})
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe.as_yaml(), encoding="utf-8")
    again = load_recipe(path)
    assert again == recipe
    assert again.content_hash() == recipe.content_hash()


def test_the_hash_does_not_see_spelling_order_or_written_out_defaults(plain: dict[str, Any], tmp_path: Path) -> None:
    expected = load_recipe(plain).content_hash()
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "# a comment\nsteering_scale: 6.50\nretain: {path: retain.jsonl}\nsteps: 500\n"
        "topics: {biology: {forget: {path: forget.jsonl, order: shuffle}}}\nmodel: some/model\nmethod: rmu\n",
        encoding="utf-8",
    )
    assert load_recipe(path).content_hash() == expected


@pytest.mark.parametrize("override", ["steps=501", "seed=1", "topics.biology.forget=other.jsonl", "noise_std=0.1"])
def test_the_hash_sees_every_change(override: str, plain: dict[str, Any]) -> None:
    assert load_recipe(plain, [override]).content_hash() != load_recipe(plain).content_hash()


def test_a_list_is_no_recipe(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("- method: rmu\n", encoding="utf-8")
    assert "a recipe is a mapping of fields" in _error(path)


def test_a_file_that_is_not_yaml_is_an_error_that_names_it(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("method: [rmu\n", encoding="utf-8")
    message = _error(path)
    assert str(path) in message
    assert "YAML" in message


def test_a_folder_is_no_recipe(tmp_path: Path) -> None:
    assert str(tmp_path) in _error(tmp_path)


def test_an_unknown_recipe_name_says_where_to_look() -> None:
    message = _error("no-such-recipe")
    assert "no recipe 'no-such-recipe'" in message
    assert "unlearn list recipes" in message


def test_a_misspelt_recipe_file_gets_the_nearest_beside_it(plain: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(plain), encoding="utf-8")
    assert str(tmp_path / "mine.yaml") in _error(tmp_path / "mien.yaml")


@pytest.mark.parametrize("name", recipe_names())
def test_every_shipped_recipe_is_valid(name: str) -> None:
    recipe = load_recipe(name)
    assert isinstance(recipe, Recipe)
    assert Recipe.model_validate(recipe.model_dump(mode="json")) == recipe


@pytest.mark.parametrize("name", recipe_names())
def test_a_misspelt_shipped_recipe_gets_the_nearest(name: str) -> None:
    assert "Did you mean" in _error(name + "x")


def test_snapshots_beyond_the_last_step_are_an_error(plain: dict[str, Any]) -> None:
    (line,) = _lines(_error({**plain, "steps": 10, "snapshots": [5, 11]}))
    assert "snapshots: [11] outside 1 to steps = 10" in line


def test_noise_at_no_layer_is_an_error(plain: dict[str, Any]) -> None:
    (line,) = _lines(_error({**plain, "noise_layers": []}))
    assert "noise_layers: []" in line

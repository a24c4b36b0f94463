"""Recipes: overrides, defaults, and a content hash that only the content decides."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from recipe_errors import lines_of, load_error

from robust_unlearning import load_recipe
from robust_unlearning.recipe import Recipe, recipe_names

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
    (line,) = lines_of(load_error(plain, "noise_std=0.3", "noise_variance=0.09"))
    assert "noise_std (0.3) and noise_variance (0.09) are both given" in line
    assert "square root" in line


def test_noise_above_the_layer_is_an_error(plain: dict[str, Any]) -> None:
    (line,) = lines_of(load_error({**plain, "noise_layers": [6, 8]}))
    assert "noise_layers: [6, 8] must name layers from 0 to layer = 7" in line


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
    message = load_error(plain, override)
    assert says in message
    assert len(lines_of(message)) == 1


def test_all_bad_overrides_are_in_the_one_message(plain: dict[str, Any]) -> None:
    assert len(lines_of(load_error(plain, "steps", "layer", "learning_rate=-1"))) == 3


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
    assert "a recipe is a mapping of fields" in load_error(path)


def test_a_file_that_is_not_yaml_is_an_error_that_names_it(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("method: [rmu\n", encoding="utf-8")
    message = load_error(path)
    assert str(path) in message
    assert "YAML" in message


def test_a_folder_is_no_recipe(tmp_path: Path) -> None:
    assert str(tmp_path) in load_error(tmp_path)


def test_an_unknown_recipe_name_says_where_to_look() -> None:
    message = load_error("no-such-recipe")
    assert "no recipe 'no-such-recipe'" in message
    assert "unlearn list recipes" in message


def test_a_misspelt_recipe_file_gets_the_nearest_beside_it(plain: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(plain), encoding="utf-8")
    assert str(tmp_path / "mine.yaml") in load_error(tmp_path / "mien.yaml")


@pytest.mark.parametrize("name", recipe_names())
def test_every_shipped_recipe_is_valid(name: str) -> None:
    recipe = load_recipe(name)
    assert isinstance(recipe, Recipe)
    assert Recipe.model_validate(recipe.model_dump(mode="json")) == recipe


@pytest.mark.parametrize("name", recipe_names())
def test_a_misspelt_shipped_recipe_gets_the_nearest(name: str) -> None:
    assert "Did you mean" in load_error(name + "x")


def test_snapshots_beyond_the_last_step_are_an_error(plain: dict[str, Any]) -> None:
    (line,) = lines_of(load_error({**plain, "steps": 10, "snapshots": [5, 11]}))
    assert "snapshots: [11] outside 1 to steps = 10" in line


def test_noise_at_no_layer_is_an_error(plain: dict[str, Any]) -> None:
    (line,) = lines_of(load_error({**plain, "noise_layers": []}))
    assert "noise_layers: []" in line

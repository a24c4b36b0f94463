"""Sweeps: what values, ranges and grids mean, and what is wrong with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from robust_unlearning import UserError, files
from robust_unlearning.experiments.grid import expand, load_sweep, sweep_names
from robust_unlearning.experiments.ranges import parse_values


def _write(path: Path, data: Any) -> str:
    path.write_text(yaml.safe_dump(data), encoding="utf-8")
    return str(path)


@pytest.mark.unit
@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("0,0.01,3", [0, 0.01, 3]),
        ("[1],[2],[0,1,2]", [[1], [2], [0, 1, 2]]),
        ("0:0.1:0.01", [0.0, 0.01, 0.02, 0.03, 0.04, 0.05, 0.06, 0.07, 0.08, 0.09, 0.1]),
        ("0:5:2,7", [0, 2, 4, 7]),
        ("3:1:-1", [3, 2, 1]),
        ("rmu,rsv", ["rmu", "rsv"]),
        ("{path: a, split: b},demo:forget.jsonl", [{"path": "a", "split": "b"}, "demo:forget.jsonl"]),
        ("null,true", [None, True]),
    ],
)
def test_values(text: str, values: list[Any]) -> None:
    assert parse_values(text) == values


@pytest.mark.unit
@pytest.mark.parametrize(("text", "says"), [("0:1:-1", "never comes"), ("0:1:0", "never comes"), ("[1,2", "not close")])
def test_values_that_are_none(text: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        parse_values(text)


@pytest.mark.unit
def test_a_grid_is_the_product_and_its_names_tell_the_points_apart(tiny_recipe: dict[str, Any], tmp_path: Path) -> None:
    path = _write(tmp_path / "mine.yaml", tiny_recipe)
    points = expand(load_sweep(path, ["noise_std=0,0.1", "seed=0,1", "noise_layers=[1],[2,3]", "steps=5"]))
    assert len(points) == 8
    assert [set(each.fields) for each in points] == [{"noise_std", "seed", "noise_layers"}] * 8
    assert points[-1].recipe.noise_layers == (2, 3)
    assert points[-1].recipe.steps == 5
    assert points[-1].setting == {"noise_std": 0.1, "noise_layers": [2, 3]}
    assert len({each.name for each in points}) == 8
    assert points[-1].name.startswith("noise_std=0.1_seed=1_noise_layers=2+3-")
    assert len(expand(load_sweep(path, ["noise_std=0,0.0,1e-1,0.1"]))) == 2  # equal recipes are one point


@pytest.mark.unit
def test_several_grids_and_fields_set_in_all_of_them(tiny_recipe: dict[str, Any], tmp_path: Path) -> None:
    recipe = _write(tmp_path / "mine.yaml", tiny_recipe)
    grids = [{"recipe": recipe, "noise_std": 0}, {"recipe": recipe, "noise_std": 0.1, "noise_layers": [[1], [2]]}]
    sweep = load_sweep(
        _write(tmp_path / "sweep.yaml", {"grids": grids, "tasks": "demo"}), ["seed=0,1"], tasks="planted"
    )
    points = expand(sweep)
    assert [each.recipe.noised_layers for each in points] == [(3,), (3,), (1,), (1,), (2,), (2,)]
    assert sweep.tasks == "planted"
    assert [each.recipe.seed for each in points] == [0, 1] * 3


@pytest.mark.unit
def test_wrong_fields_are_said_once_with_a_point(tiny_recipe: dict[str, Any], tmp_path: Path) -> None:
    path = _write(tmp_path / "mine.yaml", tiny_recipe)
    with pytest.raises(UserError, match=r"6 of 6 points are wrong(.|\n)*did you mean 'noise_std'") as error:
        expand(load_sweep(path, ["noise_sdt=0,1", "seed=0,1,2"]))
    assert str(error.value).count("did you mean") == 1
    with pytest.raises(UserError, match=r"1 of 2(.|\n)*noise_layers=9"):
        expand(load_sweep(path, ["noise_layers=[3],[9]"]))
    with pytest.raises(UserError, match="Did you mean 'figure3/tiny'"):
        load_sweep("figure3/tny")
    with pytest.raises(UserError, match="did you mean 'tasks'"):
        load_sweep(_write(tmp_path / "s.yaml", {"grids": [{"recipe": path}], "task": "demo"}))
    with pytest.raises(UserError, match=r"did you mean 'tasks'(.|\n)*2 of 2(.|\n)*did you mean 'steps'"):
        load_sweep(_write(tmp_path / "s.yaml", {"grids": [{"recipe": path, "stepz": [1, 2]}], "task": "demo"}))


@pytest.mark.unit
@pytest.mark.parametrize("name", sweep_names())
def test_a_shipped_sweep_is_well_formed_and_says_how_to_run_it(name: str) -> None:
    text = (files.package_dir() / "assets" / "sweeps" / f"{name}.yaml").read_text(encoding="utf-8")
    assert f"unlearn sweep {name}" in text
    assert 6 <= len(expand(load_sweep(name))) <= 200

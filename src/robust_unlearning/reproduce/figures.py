"""The figures of the report, drawn from what stages found: PNG, SVG and CSV of each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from robust_unlearning.report.blocks import Figure
from robust_unlearning.report.figures import Series, trade_off
from robust_unlearning.reproduce import paper
from robust_unlearning.reproduce.claims import values
from robust_unlearning.reproduce.results import Grid, Model
from robust_unlearning.results.measures import Measured, retained, right
from robust_unlearning.stats.estimates import Array, Estimate, over_seeds, share_over_seeds

Values = Callable[[Measured], Array]
INTERVALS = "95 % intervals over seeds and questions"
FAMILIES = {
    "representation methods": paper.REPRESENTATION,
    "preference methods, KL": tuple(each for each in paper.PREFERENCE if each.endswith("KL")),
    "preference methods, MSE": tuple(each for each in paper.PREFERENCE if each.endswith("MSE")),
}
"""Methods drawn in one panel: no more than there are colours."""
FORGET, PERTURBED = "forget accuracy", "accuracy with a forget-token"


def forget(own: Measured) -> Array:
    """Right on what is to be forgotten."""
    return own.forget


def estimate(models: Sequence[Model], of: Values) -> Estimate:
    """A measure over seeds and questions."""
    return share_over_seeds(values(models, of))


def families(grid: Grid) -> dict[str, list[str]]:
    """Panel's name -> the grid's recipes in it; methods of the user's own share a panel."""
    found: dict[str, list[str]] = {}
    for recipe, title in grid.recipes.items():
        name = next((key for key, titles in FAMILIES.items() if title in titles), "methods")
        found.setdefault(name, []).append(recipe)
    return found


def overview(grid: Grid, chosen: Mapping[str, float], path: Path) -> Figure:
    """Figure 1: accuracy with a forget-token over accuracy on what is kept, without and with the chosen noise."""
    base = Series("base", [(over_seeds(retained(grid.base)[None]), over_seeds(right(grid.base)[None]))], "s")
    panels = []
    for name, recipes in families(grid).items():
        series = [base]
        for recipe in recipes:
            plain = grid.at(recipe, 0)
            rna = grid.at(recipe, chosen[recipe]) if recipe in chosen else []
            own = [models for models in (plain, rna) if models]
            points = [(estimate(models, retained), estimate(models, right)) for models in own]
            notes = ["", "RNA"] if plain else ["RNA"]
            series.append(Series(grid.recipes[recipe], points, "o", joined=True, notes=notes[: len(own)]))
        panels.append((f"{name}: {PERTURBED}", series))
    title = "Kept accuracy and robustness"
    trade_off(panels, "accuracy on what is kept", f"{title} ({INTERVALS})", path)
    return Figure.saved(title, "A line goes from a method without noise to the same with the chosen noise.", path)


def curve(grid: Grid, chosen: Mapping[str, float], path: Path) -> Figure:
    """Trade-off: accuracy with a forget-token over forget accuracy along the steps, without and with noise."""
    base = (over_seeds(forget(grid.base)[None]), over_seeds(right(grid.base)[None]))
    panels = []
    for name, recipes in families(grid).items():
        series = []
        for recipe in recipes:
            for scale in dict.fromkeys((0.0, chosen.get(recipe, 0.0))):
                own = grid.at(recipe, scale, last=False)
                steps = sorted({each.step for each in own})
                at = [[each for each in own if each.step == step] for step in steps]
                points = [base, *((estimate(models, forget), estimate(models, right)) for models in at)]
                label = grid.recipes[recipe] + (f" + RNA {scale:g}" if scale else "")
                notes = ["", *map(str, steps)]
                series.append(Series(label, points, "D" if scale else "o", joined=True, notes=notes))
        panels.append((f"{name}: {PERTURBED}", series))
    title = "Forgetting and robustness along the steps"
    trade_off(panels, "forget accuracy (less is more forgotten)", f"{title} ({INTERVALS})", path)
    return Figure.saved(title, "Beside the points: steps. Each line begins at the base.", path)


def over_field(
    grid: Grid,
    key: Callable[[Model], str],
    about: str,
    path: Path,
    measures: Mapping[str, Values],
    *,
    together: bool = False,
) -> Figure:
    """Accuracies after the last step over what `key` says of a model, in order of first mention.

    Args:
        together: all methods in one panel for each measure, not one panel for each family.
    """
    last = [each for each in grid.models if each.last]
    ticks = list(dict.fromkeys(key(each) for each in last))
    groups = {"": list(grid.recipes)} if together else families(grid)
    panels = []
    for name, recipes in groups.items():
        for measure, of in measures.items():
            series = [
                Series("base", [(Estimate(float(x)), over_seeds(of(grid.base)[None])) for x in range(len(ticks))], "_")
            ]
            for recipe in recipes:
                own = [[each for each in last if each.recipe == recipe and key(each) == tick] for tick in ticks]
                points = [(Estimate(float(x)), estimate(each, of)) for x, each in enumerate(own) if each]
                series.append(Series(grid.recipes[recipe], points, "o", joined=True))
            panels.append((f"{name}: {measure}" if name else measure, series))
    trade_off(panels, about, f"Over {about} ({INTERVALS})", path, ticks=ticks)
    return Figure.saved(f"Over {about}", f"Line at the level of the base; {INTERVALS}.", path)


def noise_key(model: Model) -> str:
    """The scale of the noise."""
    return f"{model.noise:g}"


def layers_key(model: Model) -> str:
    """The layers of the noise; without noise, `none`."""
    layers = model.fields.get("noise_layers")
    if not model.noise:
        return "none"
    if not layers:
        return "l"
    return f"{layers[0]} to {layers[-1]}" if len(layers) > 3 else ",".join(map(str, layers))


def coefficient_key(model: Model) -> str:
    """c or β, whichever a model has."""
    own = [model.fields[key] for key in ("steering_scale", "adaptive_scale") if key in model.fields]
    return f"{float(own[0]):g}" if own else "recipe's"


ACCURACIES: Mapping[str, Values] = {PERTURBED: right, FORGET: forget}
ROBUSTNESS: Mapping[str, Values] = {PERTURBED: right}

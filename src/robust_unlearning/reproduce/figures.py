"""The figures of the report, drawn from what stages found: PNG, SVG and CSV of each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from robust_unlearning.report.figures import Series, trade_off
from robust_unlearning.report.page import Figure
from robust_unlearning.reproduce import paper
from robust_unlearning.reproduce.grid import Grid, Model
from robust_unlearning.results.measures import QuestionMeasure, forget, retained, right
from robust_unlearning.stats.estimates import Estimate

INTERVALS = "95 % intervals over seeds and questions"
PANELS = {
    "representation methods": paper.REPRESENTATION,
    "preference methods, KL": tuple(each for each in paper.PREFERENCE if each.endswith("KL")),
    "preference methods, MSE": tuple(each for each in paper.PREFERENCE if each.endswith("MSE")),
}
"""Methods drawn in one panel: no more than there are colours."""
FORGET, PERTURBED = "forget accuracy", "accuracy with a forget-token"


def estimate(models: Sequence[Model], of: QuestionMeasure) -> Estimate:
    """A measure over seeds and questions."""
    return of.over([model.test for model in models])


def of_base(grid: Grid, of: QuestionMeasure) -> Estimate:
    """The same of the base."""
    return of.over([grid.base])


def families(grid: Grid) -> dict[str, list[str]]:
    """Panel's name -> the grid's recipes in it; methods of the user's own share a panel."""
    panels: dict[str, list[str]] = {}
    for recipe, title in grid.recipes.items():
        name = next((key for key, titles in PANELS.items() if title in titles), "methods")
        panels.setdefault(name, []).append(recipe)
    return panels


def overview(grid: Grid, chosen: Mapping[str, float], path: Path) -> Figure:
    """Figure 1: accuracy with a forget-token over accuracy on what is kept, without and with the chosen noise."""
    base = Series("base", [(of_base(grid, retained), of_base(grid, right))], "s")

    def line(recipe: str) -> Series:
        plain = grid.at(recipe, 0)
        rna = grid.at(recipe, chosen[recipe]) if recipe in chosen else []
        shown = [(models, note) for models, note in ((plain, ""), (rna, "RNA")) if models]
        points = [(estimate(models, retained), estimate(models, right)) for models, _ in shown]
        return Series(grid.recipes[recipe], points, joined=True, notes=[note for _, note in shown])

    panels = [
        (f"{name}: {PERTURBED}", [base, *(line(recipe) for recipe in recipes)])
        for name, recipes in families(grid).items()
    ]
    title = "Kept accuracy and robustness"
    trade_off(panels, "accuracy on what is kept", f"{title} ({INTERVALS})", path)
    return Figure.saved(title, "A line goes from a method without noise to the same with the chosen noise.", path)


def curve(grid: Grid, chosen: Mapping[str, float], path: Path) -> Figure:
    """Trade-off: accuracy with a forget-token over forget accuracy along the steps, without and with noise."""
    base = (of_base(grid, forget), of_base(grid, right))

    def line(recipe: str, scale: float) -> Series:
        by_step: dict[int, list[Model]] = {}
        for model in sorted(grid.at(recipe, scale, last=False), key=lambda model: model.step):
            by_step.setdefault(model.step, []).append(model)
        points = [base, *((estimate(models, forget), estimate(models, right)) for models in by_step.values())]
        label = grid.recipes[recipe] + (f" + RNA {scale:g}" if scale else "")
        return Series(label, points, "D" if scale else "o", joined=True, notes=["", *map(str, by_step)])

    panels = []
    for name, recipes in families(grid).items():
        scales = [(recipe, scale) for recipe in recipes for scale in dict.fromkeys((0.0, chosen.get(recipe, 0.0)))]
        panels.append((f"{name}: {PERTURBED}", [line(recipe, scale) for recipe, scale in scales]))
    title = "Forgetting and robustness along the steps"
    trade_off(panels, "forget accuracy (less is more forgotten)", f"{title} ({INTERVALS})", path)
    return Figure.saved(title, "Beside the points: steps. Each line begins at the base.", path)


def over_field(
    grid: Grid,
    key: Callable[[Model], str],
    about: str,
    path: Path,
    measures: Mapping[str, QuestionMeasure],
    *,
    together: bool = False,
) -> Figure:
    """Accuracies after the last step over what `key` says of a model, in order of first mention.

    Args:
        together: all methods in one panel for each measure, not one panel for each family.
    """
    last = [model for model in grid.models if model.last]
    ticks = list(dict.fromkeys(map(key, last)))
    places = [Estimate(float(index)) for index in range(len(ticks))]

    def line(recipe: str, of: QuestionMeasure) -> Series:
        groups = [[model for model in last if model.recipe == recipe and key(model) == tick] for tick in ticks]
        points = [(x, estimate(models, of)) for x, models in zip(places, groups, strict=True) if models]
        return Series(grid.recipes[recipe], points, joined=True)

    panels = []
    for name, recipes in ({"": list(grid.recipes)} if together else families(grid)).items():
        for measure, of in measures.items():
            base = Series("base", [(x, of_base(grid, of)) for x in places], "_")
            panels.append(
                (f"{name}: {measure}" if name else measure, [base, *(line(recipe, of) for recipe in recipes)])
            )
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


def unlearned_layer_key(model: Model) -> str:
    """The layer l that was unlearned at."""
    return str(model.fields.get("layer", "recipe's"))


def coefficient_key(model: Model) -> str:
    """c or β, whichever a model has."""
    scales = [model.fields[key] for key in ("steering_scale", "adaptive_scale") if key in model.fields]
    return f"{float(scales[0]):g}" if scales else "recipe's"


ACCURACIES: Mapping[str, QuestionMeasure] = {PERTURBED: right, FORGET: forget}

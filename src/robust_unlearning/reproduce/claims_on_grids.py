"""The rows of the paper's claims on the further grids: coefficients, scales of the noise, layers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from robust_unlearning.experiments.matched import LEAST
from robust_unlearning.reproduce.claims import (
    Pairs,
    changes,
    family_mean,
    forgot,
    forgotten,
    has_forgotten,
    if_forgotten,
    less,
    unlike,
)
from robust_unlearning.reproduce.grid import Grid, Model
from robust_unlearning.reproduce.verdicts import Outcome
from robust_unlearning.results.measures import QuestionMeasure, forget, forgetting, retained, right
from robust_unlearning.stats.effects import Effect, mean_effect
from robust_unlearning.stats.estimates import Array
from robust_unlearning.stats.format import NATS, shown


def slopes(grid: Grid, models: Sequence[Model], x_of: Callable[[Model], float], of: QuestionMeasure) -> Effect | None:
    """The slope of a measure over a field, by least squares for every seed and question; None where no seed has two
    values of it.
    """
    rows: dict[int, Array] = {}
    for seed in sorted({model.seed for model in models}):
        of_seed = [model for model in models if model.seed == seed]
        x = np.array([x_of(model) for model in of_seed])
        x -= x.mean()
        if not x.any():  # the other runs of this seed have failed
            continue
        rows[seed] = (x @ np.stack([of(model.test) for model in of_seed])) / (x @ x)
    return Effect(rows, of.groups(grid.base)) if rows else None


def coefficient_claims(grid: Grid) -> list[Outcome]:
    """Figure 2: the slope of accuracy over log₂ of c or β."""
    rows = []
    for recipe, title in grid.recipes.items():
        for field, symbol in (("steering_scale", "c"), ("adaptive_scale", "β")):
            plain = [model for model in grid.at(recipe, 0) if field in model.fields]
            if len({model.fields[field] for model in plain}) < 2:
                continue
            slope = slopes(grid, plain, lambda model, field=field: math.log2(model.fields[field]), right)  # type: ignore[misc]
            measure = f"accuracy with a forget-token, points for each doubling of {symbol}"
            beside = _forgot_by(grid, plain, field, symbol)
            row = Outcome("coefficient", f"{title}, {symbol}", slope, "falls (image only)", beside, measure)
            rows.append(if_forgotten(grid, row, plain))
            break
    return rows


def _forgot_by(grid: Grid, models: Sequence[Model], field: str, symbol: str) -> str:
    """What was forgotten at each value of a field, in words."""
    values = sorted({model.fields[field] for model in models})
    return "; ".join(
        f"{symbol} = {value:g}: {forgot(grid, [model for model in models if model.fields[field] == value])}"
        for value in values
    )


def layer_of_unlearning_claims(grid: Grid) -> list[Outcome]:
    """Section 6.2: the slope of accuracy over the layer l that is unlearned at."""
    rows = []
    for recipe, title in grid.recipes.items():
        plain = [model for model in grid.at(recipe, 0) if "layer" in model.fields]
        if len({model.fields["layer"] for model in plain}) > 1:
            slope, forgot_by_layer = (
                slopes(grid, plain, lambda model: float(model.fields["layer"]), of) for of in (right, forgetting)
            )
            beside, why = _forgot_by(grid, plain, "layer", "l"), unlike(forgot_by_layer, "for each layer further up")
            row = Outcome("earlier-layers", title, slope, "advice", beside, undecided=why)
            rows.append(if_forgotten(grid, row, plain))
    return rows


def noise_claims(grid: Grid, chosen: dict[str, float]) -> list[Outcome]:
    """Figure 3: the greatest noise against the chosen one, and against none; families against each other."""
    rows = []
    for recipe, noise in chosen.items():
        greatest = max(grid.noises(recipe), default=0.0)
        if greatest <= noise:
            continue
        title, at_chosen = grid.recipes[recipe], {model.seed: model for model in grid.at(recipe, noise)}
        much = grid.at(recipe, greatest)
        if pairs := [(at_chosen[model.seed], model) for model in much if model.seed in at_chosen]:
            of = f"{title}, {greatest:g} against {noise:g}"
            row = Outcome("too-much-noise", of, changes(pairs, right), "declines", _both(grid, pairs))
            rows.append(if_forgotten(grid, row, grid.at(recipe, 0)))
        if pairs := grid.pairs(recipe, greatest):
            of = f"{title}, {greatest:g} against 0"
            row = Outcome("noise-forgetting", of, changes(pairs, forget), "stable", _both(grid, pairs))
            rows.append(if_forgotten(grid, row, [plain for plain, _ in pairs]))
    return rows + _stable(grid)


def _stable(grid: Grid) -> list[Outcome]:
    """Preference less representation methods: the change from no noise to the greatest scale that all were given."""
    shared = set.intersection(*(set(grid.noises(recipe)) for recipe in grid.recipes)) if grid.recipes else set()
    if not shared:
        return []
    noise = max(shared)
    pairs = {title: grid.pairs(recipe, noise) for recipe, title in grid.recipes.items()}
    pairs = {title: each for title, each in pairs.items() if has_forgotten(grid, [plain for plain, _ in each])}
    means = family_mean((title, changes(each, right)) for title, each in pairs.items())
    found = less(means[1], means[0]) if means else None
    beside = _both(grid, [pair for each in pairs.values() for pair in each])
    return [Outcome("stable-to-noise", f"noise {noise:g}", found, "more stable", beside)] if found else []


def _both(grid: Grid, pairs: Pairs) -> str:
    """What the first and the second of pairs have forgotten, in words."""
    first, second = ([pair[side] for pair in pairs] for side in (0, 1))
    return f"{forgot(grid, first)}, and with more noise {shown(forgotten(grid, second), NATS)}" if pairs else ""


def layer_claims(grid: Grid, claim: str) -> list[Outcome]:
    """Figures 8 and 9: for every choice of layers, RNA less none, averaged over the methods."""

    def layers_of(model: Model) -> tuple[int, ...]:
        return tuple(model.fields.get("noise_layers") or ())

    def at(layers: tuple[int, ...]) -> list[Outcome]:
        of = f"layers {', '.join(map(str, layers))}"
        return _over_methods(grid, claim, of, lambda model: layers_of(model) == layers, right)

    return [row for layers in sorted({layers_of(model) for model in grid.models} - {()}) for row in at(layers)]


def all_layer_claims(grid: Grid) -> list[Outcome]:
    """Figure 10: the least scale raises robustness, the greatest lowers it, kept knowledge stays."""
    scales = sorted({model.noise for model in grid.models if model.noise})
    if not scales:
        return []
    least, most = scales[0], scales[-1]

    def at(scale: float) -> Callable[[Model], bool]:
        return lambda model: model.noise == scale

    rows = _over_methods(grid, "all-layers", f"noise {least:g}", at(least), right)
    if most > least:
        of = f"noise {most:g} against {least:g}"
        rows += _over_methods(grid, "all-layers-much", of, at(most), right, at(least))
    return rows + _over_methods(grid, "all-layers-kept", f"noise {most:g}", at(most), retained)


def _over_methods(
    grid: Grid,
    claim: str,
    of: str,
    wanted: Callable[[Model], bool],
    measure: QuestionMeasure,
    against: Callable[[Model], bool] = lambda model: model.noise == 0,
) -> list[Outcome]:
    """Models that are `wanted` less those `against`, by method and seed, averaged over the methods that have forgotten
    without noise."""
    pairs: list[Pairs] = []
    for recipe in grid.recipes:
        plain = {model.seed: model for model in grid.pick(recipe, against)}
        of_recipe = [(plain[rna.seed], rna) for rna in grid.pick(recipe, wanted) if rna.seed in plain]
        if of_recipe:
            pairs.append(of_recipe)
    if not pairs:
        return []
    forgot_without = [each for each in pairs if has_forgotten(grid, grid.at(each[0][0].recipe, 0))]
    why = "" if forgot_without else f"no method has forgotten {LEAST} nats beyond the base without noise"
    used = forgot_without or pairs
    effect = mean_effect([changes(each, measure) for each in used])
    beside = _both(grid, [pair for each in used for pair in each])
    return [Outcome(claim, f"{of}, {len(used)} of {len(pairs)} methods", effect, "", beside, undecided=why)]

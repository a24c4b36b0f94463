"""The rows of the paper's claims on trained models: for every method, layer or scale our estimate and its interval.

Differences are taken question by question and seed by seed before they are averaged. A function returns no row of a
claim where the models for it are not there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from robust_unlearning.experiments.matched import LEAST, forgetting, matched_difference
from robust_unlearning.reproduce import paper
from robust_unlearning.reproduce.grid import Grid, Model
from robust_unlearning.reproduce.verdicts import Outcome
from robust_unlearning.results.measures import Measured, excess, retained, right
from robust_unlearning.stats import paired
from robust_unlearning.stats.estimates import (
    Array,
    Estimate,
    over_seeds,
)
from robust_unlearning.stats.format import PERCENT, interval, shown

Values = Callable[[Measured], Array]
Pairs = Sequence[tuple[Model, Model]]
FAMILIES = {"representation methods": paper.REPRESENTATION, "preference methods": paper.PREFERENCE}


def forget(answers: Measured) -> Array:
    """Right on what is to be forgotten."""
    return answers.forget


def values(models: Sequence[Model], of: Values) -> Array:
    """One row a model."""
    return np.stack([of(model.test) for model in models])


def changes(pairs: Pairs, of: Values) -> Array:
    """The second of each pair less the first, question by question; one row a pair."""
    return np.stack([of(second.test) - of(first.test) for first, second in pairs])


def percent(share: Estimate) -> str:
    """A share in %, with its interval."""
    if share.value is None:
        return shown(share)
    return f"{shown(share.value, PERCENT)} % {interval(share.low, share.high, PERCENT)}".rstrip()


def main_claims(grid: Grid, chosen: dict[str, float]) -> list[Outcome]:
    """Claims that rest on the main stage."""
    return [
        *_fragility(grid),
        *_families(grid),
        *(row for recipe, noise in chosen.items() for row in _rna(grid, recipe, noise)),
        *_average_recovery(grid, chosen),
    ]


def _if_forgotten(outcome: Outcome, plain: Sequence[Model]) -> Outcome:
    """The outcome, undecided where the method without noise has forgotten less than `LEAST` nats: nothing is mended,
    kept or broken there."""
    if plain and np.mean([forgetting(model.test) for model in plain]) >= LEAST:
        return outcome
    return replace(outcome, undecided=f"without noise less than {LEAST} nats were forgotten")


def _fragility(grid: Grid) -> list[Outcome]:
    rows = []
    for recipe, title in grid.recipes.items():
        plain = grid.at(recipe, 0)
        if not plain:
            continue
        lost, harm = (over_seeds(values(plain, of) - of(grid.base)) for of in (right, excess))
        rate = paired.reduction([right(grid.base)], [values(plain, right).mean(axis=0)])
        printed = f"reduction {paper.REDUCTION[title]} %" if title in paper.REDUCTION else ""
        beside = f"reduction {percent(rate)}; forget accuracy {percent(over_seeds(values(plain, forget)))}"
        rows.append(_if_forgotten(Outcome("fragile", title, lost, printed, beside), plain))
        rows.append(_if_forgotten(Outcome("forget-token", title, harm), plain))
    return rows


def _families(grid: Grid) -> list[Outcome]:
    """Preference against representation methods: losses of accuracy, averaged over the methods of each."""
    averages = []
    for titles in FAMILIES.values():
        tables = [values(grid.at(recipe, 0), right) for recipe, title in grid.recipes.items() if title in titles]
        if tables and len({table.shape for table in tables}) == 1:
            averages.append(right(grid.base) - np.mean(tables, axis=0))
    if len(averages) < 2:
        return []
    printed = "reductions {} and {} %".format(*reversed(paper.AVERAGE["reduction"]))
    return [Outcome("po-more-fragile", "averages", over_seeds(averages[1] - averages[0]), printed)]


def _rna(grid: Grid, recipe: str, noise: float) -> list[Outcome]:
    """RNA at one scale against the same method and seed without noise."""
    title, pairs = grid.recipes[recipe], grid.pairs(recipe, noise)
    if not pairs:
        return []
    plain, rna = (values(models, right).mean(axis=0) for models in zip(*pairs, strict=True))
    beside = f"recovery {percent(paired.recovery([right(grid.base)], [plain], [rna]))}"
    of, recovery, wmdp, mmlu = f"{title}, noise {noise:g}", "", "", ""
    if title in paper.RECOVERY:
        recovery = f"recovery {paper.RECOVERY[title]} %"
        wmdp = f"{paper.WMDP_RNA[title] - paper.WMDP[title]:+.1f} points (2-grams)"
        mmlu = f"{paper.MMLU_RNA[title] - paper.MMLU[title]:+.1f} points (2-grams)"
    rows = [
        Outcome("recovers", of, over_seeds(changes(pairs, right)), recovery, beside),
        like_forgetting(grid, recipe, noise),
        Outcome("keeps-forgetting", of, over_seeds(changes(pairs, forget)), wmdp),
        Outcome("keeps-retained", of, over_seeds(changes(pairs, retained)), mmlu),
    ]
    if len(grid.base.near):
        rows.append(Outcome("related", of, over_seeds(changes(pairs, lambda answers: answers.near))))
    return [_if_forgotten(row, grid.at(recipe, 0)) for row in rows]


def like_forgetting(grid: Grid, recipe: str, noise: float) -> Outcome:
    """RNA less none in excess harm, where both have forgotten as much; see `study.matched_difference`."""
    harm, at = [], []
    for seed in sorted({model.seed for model in grid.models}):
        rna, plain = (
            [model.test for model in grid.at(recipe, scale, last=False) if model.seed == seed] for scale in (noise, 0.0)
        )
        if not rna or not plain:
            continue
        matched = [matched_difference(rna, [grid.base, *plain], place, LEAST) for place in grid.places]
        if places := [each for each in matched if each]:
            harm.append(np.mean([differences for differences, _, _ in places], axis=0))
            at += places[0][2]
    of = f"{grid.recipes[recipe]}, noise {noise:g}"
    if not harm:
        beside = f"no step where both have forgotten {LEAST} nats and as much"
        return Outcome("mends", of, Estimate(None, note=beside), "", beside)
    beside = f"{len(at)} models compared, at {min(at):.2f} to {max(at):.2f} nats"
    return Outcome("mends", of, over_seeds(np.stack(harm)), "", beside)


def _average_recovery(grid: Grid, chosen: dict[str, float]) -> list[Outcome]:
    """The paper's averages over representation and over preference methods, each at its chosen noise."""
    rows = []
    for (name, titles), printed in zip(FAMILIES.items(), paper.AVERAGE["recovery"], strict=True):
        methods = [grid.pairs(recipe, noise) for recipe, noise in chosen.items() if grid.recipes[recipe] in titles]
        if methods and len({len(pairs) for pairs in methods}) == 1:
            mean = np.mean([changes(pairs, right) for pairs in methods], axis=0)
            row = Outcome("recovers", f"{name}, mean", over_seeds(mean), f"recovery {printed} %")
            rows.append(_if_forgotten(row, [plain for pairs in methods for plain, _ in pairs]))
    return rows


def coefficient_claims(grid: Grid) -> list[Outcome]:
    """Figure 2: the slope of accuracy over log₂ of c or β, by least squares for every seed and question."""
    rows = []
    for recipe, title in grid.recipes.items():
        for field, symbol in (("steering_scale", "c"), ("adaptive_scale", "β")):
            plain = [model for model in grid.at(recipe, 0) if field in model.fields]
            if len({model.fields[field] for model in plain}) < 2:
                continue
            slopes = []
            for seed in sorted({model.seed for model in plain}):
                models = [model for model in plain if model.seed == seed]
                x = np.array([math.log2(model.fields[field]) for model in models])
                x -= x.mean()
                slopes.append((x @ values(models, right)) / (x @ x))
            measure = f"accuracy with a forget-token, points for each doubling of {symbol}"
            of, printed = f"{title}, {symbol}", "falls (image only)"
            rows.append(Outcome("coefficient", of, over_seeds(np.stack(slopes)), printed, measure=measure))
            break
    return rows


def noise_claims(grid: Grid, chosen: dict[str, float]) -> list[Outcome]:
    """Figure 3: the greatest noise against the chosen one, and against none."""
    rows = []
    for recipe, noise in chosen.items():
        greatest = max(grid.noises(recipe), default=0.0)
        if greatest <= noise:
            continue
        title, at_chosen = grid.recipes[recipe], {model.seed: model for model in grid.at(recipe, noise)}
        much = grid.at(recipe, greatest)
        if pairs := [(at_chosen[model.seed], model) for model in much if model.seed in at_chosen]:
            of, lost = f"{title}, {greatest:g} against {noise:g}", over_seeds(changes(pairs, right))
            rows.append(Outcome("too-much-noise", of, lost, "declines"))
        if pairs := grid.pairs(recipe, greatest):
            of, change = f"{title}, {greatest:g} against 0", over_seeds(changes(pairs, forget))
            row = Outcome("noise-forgetting", of, change, "stable")
            rows.append(_if_forgotten(row, [plain for plain, _ in pairs]))
    return rows


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
    measure: Values,
    against: Callable[[Model], bool] = lambda model: model.noise == 0,
) -> list[Outcome]:
    """Models that are `wanted` less those `against`, by method and seed, averaged over methods."""
    by_seed: dict[int, list[Array]] = {}
    for recipe in grid.recipes:
        plain = {model.seed: model for model in grid.pick(recipe, against)}
        for rna in grid.pick(recipe, wanted):
            if rna.seed in plain:
                by_seed.setdefault(rna.seed, []).append(measure(rna.test) - measure(plain[rna.seed].test))
    if not by_seed:
        return []
    table = np.stack([np.mean(methods, axis=0) for methods in by_seed.values()])
    plain_models = [model for model in grid.models if model.last and model.noise == 0]
    return [_if_forgotten(Outcome(claim, of, over_seeds(table)), plain_models)]

"""The paper's claims on trained models: what each says, the paper's number, ours with its interval.

`CLAIMS` says them; a function for each family returns an `Outcome` for every method, layer or length. Differences are
taken question by question and seed by seed before they are averaged.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from robust_unlearning.experiments.matched import LEAST, forgetting, matched_difference
from robust_unlearning.reproduce import paper
from robust_unlearning.reproduce.results import Grid, Model
from robust_unlearning.reproduce.verdict import Outcome, Rule
from robust_unlearning.results.measures import Measured, excess, retained, right
from robust_unlearning.stats.estimates import (
    Array,
    Estimate,
    mean_interval,
    over_seeds,
    paired_recovery,
    paired_reduction,
)

CLAIMS: dict[str, tuple[str, str]] = {
    "fragile": ("Unlearning costs accuracy where a forget-token stands in a harmless question", "Figure 1"),
    "forget-token": ("It is the forget-token: an unrelated word in its place costs less", "Figure 1, Section 4"),
    "po-more-fragile": ("Preference methods lose more than representation methods", "Section 6.2"),
    "recovers": ("RNA wins accuracy back, at the same step", "Figure 1"),
    "mends": ("RNA wins it back also where both have forgotten as much", "Figure 1"),
    "keeps-forgetting": ("RNA leaves accuracy on what is forgotten as it was", "Figure 1, Tables 2 to 5"),
    "keeps-retained": ("RNA leaves accuracy on what is kept as it was", "Figure 1, Tables 2 to 5"),
    "related": ("RNA raises accuracy on what is close in topic to the forgotten", "Figure 1"),
    "free": ("RNA costs no time", "Section 5"),
    "coefficient": ("Robustness falls as c or β grows", "Figure 2"),
    "too-much-noise": ("With the greatest noise, robustness is below that at the chosen noise", "Figure 3"),
    "noise-forgetting": ("With the greatest noise, forgetting stays as it was", "Figure 3"),
    "single-layer": ("Noise at a single layer, whichever, raises robustness", "Figure 8"),
    "region": ("Noise at three layers, early, middle or late, raises robustness", "Figure 9"),
    "all-layers": ("Noise at all layers, moderate, raises robustness", "Figure 10"),
    "all-layers-much": ("With more noise at all layers, robustness declines", "Figure 10"),
    "all-layers-kept": ("Noise at all layers leaves accuracy on what is kept as it was", "Figure 10"),
    "similarity": ("N-grams more like their document harm more", "Figure 4"),
    "ngrams": ("RNA helps against n-grams too", "Tables 2 to 5"),
    "sensitivity": ("Unlearned models are less sensitive to noise than the base, behind l", "Figure 7, Eq. 33"),
    "shift-mean": ("The shift that a forget-token causes has mean 0", "Assumption 4.1"),
    "output": ("At its size, the output's change is that of the first order, N(0, ηJᵀJ)", "Theorem 4.2"),
    "closed-form": ("The printed closed form of Theorem 5.2 is the probability", "Theorem 5.2"),
    "rejection": ("Noise at l rejects a forget-token's effect as often as the theorem says", "Theorem 5.2"),
    "trace": ("The latent Hessian of the forget loss has a positive trace", "Eq. 9"),
    "backdoor": ("A forget-token moves a harmless question's state more than an unrelated word", "Section 5.1"),
}
"""Claim -> what it says, and where the paper says it."""

FORGET_MARGIN, RETAIN_MARGIN, TIME_MARGIN = 0.05, 0.03, 0.05
"""Changes of forget and of retain accuracy, and share of the time, below which something is said to stay as it was."""
PERCENT = 100.0
Values = Callable[[Measured], Array]


def values(models: Sequence[Model], of: Values) -> Array:
    """One row a model."""
    return np.stack([of(each.test) for each in models])


def main_claims(grid: Grid | None, chosen: dict[str, float]) -> list[Outcome]:
    """Claims that rest on the main stage."""
    if grid is None:
        ids = ("fragile", "forget-token", "po-more-fragile", "recovers", "mends", "keeps-forgetting", "keeps-retained",
               "related", "free")  # fmt: skip
        return [_not_run(each) for each in ids]
    return [
        *_fragility(grid),
        *_families(grid),
        *(_if_forgotten(each, grid.at(recipe, 0)) for recipe in chosen for each in _rna(grid, recipe, chosen[recipe])),
        *_average_recovery(grid, chosen),
        *_time(grid, chosen),
    ]


def _not_run(claim: str) -> Outcome:
    return Outcome(claim, "", "", None, "", Rule("above"))


def _if_forgotten(outcome: Outcome, plain: Sequence[Model]) -> Outcome:
    """The outcome, undecided where the method without noise has forgotten less than `LEAST` nats: nothing is mended,
    kept or broken there."""
    if plain and np.mean([forgetting(each.test) for each in plain]) >= LEAST:
        return outcome
    return replace(outcome, undecided=f"without noise less than {LEAST} nats were forgotten")


def _fragility(grid: Grid) -> list[Outcome]:
    found = []
    for recipe, title in grid.recipes.items():
        plain = grid.at(recipe, 0)
        if not plain:
            continue
        lost = over_seeds(values(plain, right) - right(grid.base))
        rate = paired_reduction(right(grid.base), values(plain, right).mean(axis=0))
        own = over_seeds(values(plain, excess) - excess(grid.base))
        printed = f"reduction {paper.REDUCTION[title]} %" if title in paper.REDUCTION else ""
        shown = f"reduction {percent(rate)}; forget accuracy {percent(over_seeds(values(plain, _forget)))}"
        outcomes = (
            Outcome("fragile", title, printed, lost, "accuracy less the base's, points", Rule("below"), shown, PERCENT),
            Outcome("forget-token", title, "", own, "excess harm less the base's, nats", Rule("below")),
        )
        found += [_if_forgotten(each, plain) for each in outcomes]
    return sorted(found, key=lambda each: list(CLAIMS).index(each.claim))


def _forget(own: Measured) -> Array:
    return own.forget


def _families(grid: Grid) -> list[Outcome]:
    """Preference against representation methods: losses of accuracy, averaged over the methods of each."""
    averages = []
    for titles in (paper.REPRESENTATION, paper.PREFERENCE):
        own = [values(grid.at(recipe, 0), right) for recipe, title in grid.recipes.items() if title in titles]
        if own and len({each.shape for each in own}) == 1:
            averages.append(right(grid.base) - np.mean(own, axis=0))
    if len(averages) < 2:
        return [_not_run("po-more-fragile")]
    printed = "reductions {} and {} %".format(*reversed(paper.AVERAGE["reduction"]))
    measure = "loss of accuracy, preference less representation, points"
    return [
        Outcome("po-more-fragile", "averages", printed, over_seeds(averages[1] - averages[0]), measure, Rule("above"),
                scale=PERCENT)
    ]  # fmt: skip


def _rna(grid: Grid, recipe: str, noise: float) -> list[Outcome]:
    """RNA at one scale against the same method and seed without noise."""
    title, pairs = grid.recipes[recipe], grid.pairs(recipe, noise)
    if not pairs:
        return []

    def change(of: Values) -> Estimate:
        return over_seeds(np.stack([of(rna.test) - of(plain.test) for plain, rna in pairs]))

    rate = paired_recovery(
        right(grid.base),
        values([plain for plain, _ in pairs], right).mean(axis=0),
        values([rna for _, rna in pairs], right).mean(axis=0),
    )
    of, printed = f"{title}, noise {noise:g}", title in paper.RECOVERY
    points = "RNA less none, points"
    wmdp = f"{paper.WMDP_RNA[title] - paper.WMDP[title]:+.1f} points (2-grams)" if printed else ""
    mmlu = f"{paper.MMLU_RNA[title] - paper.MMLU[title]:+.1f} points (2-grams)" if printed else ""
    found = [
        Outcome("recovers", of, f"recovery {paper.RECOVERY[title]} %" if printed else "", change(right),
                f"accuracy with a forget-token, {points}", Rule("above"), f"recovery {percent(rate)}", PERCENT),
        like_forgetting(grid, recipe, noise),
        Outcome("keeps-forgetting", of, wmdp, change(_forget), f"forget accuracy, {points}",
                Rule("within", FORGET_MARGIN), scale=PERCENT),
        Outcome("keeps-retained", of, mmlu, change(retained), f"retain accuracy, {points}",
                Rule("within", RETAIN_MARGIN), scale=PERCENT),
    ]  # fmt: skip
    if len(grid.base.near):
        near = change(lambda own: own.near)
        found.append(Outcome("related", of, "", near, f"accuracy, {points}", Rule("above"), scale=PERCENT))
    return found


def like_forgetting(grid: Grid, recipe: str, noise: float) -> Outcome:
    """RNA less none in excess harm, where both have forgotten as much; see `planted.study.matched_difference`."""
    harm, at = [], []
    for seed in sorted({each.seed for each in grid.models}):
        lines = [
            [each.test for each in grid.at(recipe, scale, last=False) if each.seed == seed] for scale in (noise, 0.0)
        ]
        matched = [
            each
            for place in grid.places
            if all(lines) and (each := matched_difference(lines[0], [grid.base, *lines[1]], place, LEAST))
        ]
        if matched:
            harm.append(np.mean([each[0] for each in matched], axis=0))
            at += matched[0][2]
    of = f"{grid.recipes[recipe]}, noise {noise:g}"
    measure = "excess harm, RNA less none, nats"
    if not harm:
        shown = f"no step where both have forgotten {LEAST} nats and as much"
        return Outcome("mends", of, "", Estimate(None, note=shown), measure, Rule("above"), shown)
    shown = f"{len(at)} models compared, at {min(at):.2f} to {max(at):.2f} nats"
    return Outcome("mends", of, "", over_seeds(np.stack(harm)), measure, Rule("above"), shown)


def _average_recovery(grid: Grid, chosen: dict[str, float]) -> list[Outcome]:
    """The paper's averages over representation and over preference methods, each at its chosen noise."""
    found = []
    names, families = ("representation methods", "preference methods"), (paper.REPRESENTATION, paper.PREFERENCE)
    for name, titles, printed in zip(names, families, paper.AVERAGE["recovery"], strict=True):
        own = [grid.pairs(recipe, noise) for recipe, noise in chosen.items() if grid.recipes[recipe] in titles]
        if not own or len({len(each) for each in own}) > 1:
            continue
        changes = np.mean(
            [np.stack([right(rna.test) - right(plain.test) for plain, rna in pairs]) for pairs in own], axis=0
        )
        outcome = Outcome(
            "recovers",
            f"{name}, mean",
            f"recovery {printed} %",
            over_seeds(changes),
            "accuracy with a forget-token, RNA less none, points",
            Rule("above"),
            scale=PERCENT,
        )
        found.append(_if_forgotten(outcome, [plain for pairs in own for plain, _ in pairs]))
    return found


def _time(grid: Grid, chosen: dict[str, float]) -> list[Outcome]:
    """Seconds of training with the chosen noise over those without, over the methods and seeds of a family."""
    found = []
    for name, titles in (("representation methods", paper.REPRESENTATION), ("preference methods", paper.PREFERENCE)):
        pairs = [
            pair
            for recipe, noise in chosen.items()
            if grid.recipes[recipe] in titles
            for pair in grid.pairs(recipe, noise)
        ]
        ratios = [rna.seconds / plain.seconds - 1 for plain, rna in pairs if plain.seconds]
        if ratios:
            measure = "time of training over that without RNA, less 1, %; n counts pairs of runs"
            rule = Rule("below", TIME_MARGIN)
            found.append(Outcome("free", name, "none", mean_interval(ratios), measure, rule, scale=PERCENT))
    return found or [_not_run("free")]


def coefficient_claims(grid: Grid | None) -> list[Outcome]:
    """Figure 2: the slope of accuracy over log₂ of c or β, by least squares for every seed and question."""
    if grid is None:
        return [_not_run("coefficient")]
    found = []
    for recipe, title in grid.recipes.items():
        field = next((key for key in ("steering_scale", "adaptive_scale") if _varies(grid, recipe, key)), None)
        if field is None:
            continue
        slopes = []
        own = [each for each in grid.at(recipe, 0) if field in each.fields]
        for seed in sorted({each.seed for each in own}):
            models = [each for each in own if each.seed == seed]
            x = np.array([math.log2(each.fields[field]) for each in models])
            x -= x.mean()
            slopes.append((x @ values(models, right)) / (x @ x))
        symbol = "c" if field == "steering_scale" else "β"
        found.append(
            Outcome("coefficient", f"{title}, {symbol}", "falls (image only)", over_seeds(np.stack(slopes)),
                    f"accuracy with a forget-token, points for each doubling of {symbol}", Rule("below"), scale=PERCENT)
        )  # fmt: skip
    return found or [_not_run("coefficient")]


def _varies(grid: Grid, recipe: str, field: str) -> bool:
    return len({each.fields[field] for each in grid.at(recipe, 0) if field in each.fields}) > 1


def noise_claims(grid: Grid | None, chosen: dict[str, float]) -> list[Outcome]:
    """Figure 3: the greatest noise against the chosen one, and against none."""
    ids = ("too-much-noise", "noise-forgetting")
    if grid is None:
        return [_not_run(each) for each in ids]
    found: dict[str, list[Outcome]] = {each: [] for each in ids}
    for recipe, noise in chosen.items():
        greatest = max(grid.noises(recipe), default=0.0)
        if greatest <= noise:
            continue
        by_seed = {each.seed: each for each in grid.at(recipe, noise)}
        much = [(by_seed[each.seed], each) for each in grid.at(recipe, greatest) if each.seed in by_seed]
        of = f"{grid.recipes[recipe]}, {greatest:g} against {noise:g}"
        if much:
            lost = over_seeds(np.stack([right(rna.test) - right(own.test) for own, rna in much]))
            found[ids[0]].append(
                Outcome(ids[0], of, "declines", lost, "accuracy with a forget-token, points", Rule("below"),
                        scale=PERCENT)
            )  # fmt: skip
        if pairs := grid.pairs(recipe, greatest):
            change = over_seeds(np.stack([rna.test.forget - plain.test.forget for plain, rna in pairs]))
            outcome = Outcome(ids[1], f"{grid.recipes[recipe]}, {greatest:g} against 0", "stable", change,
                              "forget accuracy, points", Rule("within", FORGET_MARGIN), scale=PERCENT)  # fmt: skip
            found[ids[1]].append(_if_forgotten(outcome, [plain for plain, _ in pairs]))
    return [outcome for each in ids for outcome in found[each] or [_not_run(each)]]


def layer_claims(grid: Grid | None, claim: str) -> list[Outcome]:
    """Figures 8 and 9: for every choice of layers, RNA less none, averaged over the methods."""
    if grid is None:
        return [_not_run(claim)]
    keys = sorted({tuple(each.fields.get("noise_layers") or ()) for each in grid.models} - {()})
    text = "accuracy with a forget-token, RNA less none, mean of methods, points"

    def at(layers: tuple[int, ...]) -> Outcome:
        own = f"layers {', '.join(map(str, layers))}"
        return _layers(grid, claim, own, lambda each: _layers_of(each) == layers, right, Rule("above"), text)

    return [at(layers) for layers in keys] or [_not_run(claim)]


def all_layer_claims(grid: Grid | None) -> list[Outcome]:
    """Figure 10: the least scale raises robustness, the greatest lowers it, kept knowledge stays."""
    ids = ("all-layers", "all-layers-much", "all-layers-kept")
    scales = sorted({each.noise for each in grid.models if each.noise}) if grid else []
    if grid is None or not scales:
        return [_not_run(each) for each in ids]
    least, most = scales[0], scales[-1]
    measure = "accuracy with a forget-token, RNA less none, mean of methods, points"
    found = [_layers(grid, ids[0], f"noise {least:g}", lambda each: each.noise == least, right, Rule("above"), measure)]
    if most > least:
        found.append(
            _layers(grid, ids[1], f"noise {most:g} against {least:g}", lambda each: each.noise == most, right,
                    Rule("below"), "accuracy with a forget-token, mean of methods, points",
                    lambda each: each.noise == least)
        )  # fmt: skip
    else:
        found.append(_not_run(ids[1]))
    rule = Rule("within", RETAIN_MARGIN)
    text = "retain accuracy, RNA less none, mean of methods, points"
    return [*found, _layers(grid, ids[2], f"noise {most:g}", lambda each: each.noise == most, retained, rule, text)]


def _layers_of(model: Model) -> tuple[int, ...]:
    return tuple(model.fields.get("noise_layers") or ())


def _layers(
    grid: Grid,
    claim: str,
    of: str,
    wanted: Callable[[Model], bool],
    measure: Values,
    rule: Rule,
    text: str,
    against: Callable[[Model], bool] = lambda each: each.noise == 0,
) -> Outcome:
    """Models that are `wanted` less those `against`, by method and seed, averaged over methods."""
    changes: dict[int, list[Array]] = {}
    for recipe in grid.recipes:
        plain = {each.seed: each for each in grid.pick(recipe, against)}
        for rna in grid.pick(recipe, wanted):
            if rna.seed in plain:
                changes.setdefault(rna.seed, []).append(measure(rna.test) - measure(plain[rna.seed].test))
    if not changes:
        return _not_run(claim)
    table = np.stack([np.mean(each, axis=0) for each in changes.values()])
    outcome = Outcome(claim, of, "", over_seeds(table), text, rule, scale=PERCENT)
    return _if_forgotten(outcome, [each for each in grid.models if each.last and each.noise == 0])


def percent(estimate: Estimate, digits: int = 1) -> str:
    """An estimate of a share in %, with its interval."""
    if estimate.value is None:
        return "undefined"
    text = f"{100 * estimate.value:.{digits}f} %"
    if estimate.low is None or estimate.high is None:
        return text
    return text + f" [{100 * estimate.low:.0f}, {100 * estimate.high:.0f}]"

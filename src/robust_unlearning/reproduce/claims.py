"""The rows of the paper's claims on trained models: for every method our estimate and its interval.

Differences are taken question by question and seed by seed before they are averaged, so each row is an `Effect` that
the rows of a claim can be pooled from. A function returns no row of a claim where the models for it are not there.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from robust_unlearning.experiments.matched import LEAST, compare_lines
from robust_unlearning.reproduce import paper
from robust_unlearning.reproduce.grid import Grid, Model
from robust_unlearning.reproduce.verdicts import Outcome
from robust_unlearning.results import measures
from robust_unlearning.results.measures import QuestionMeasure, excess, forget, forgetting, near, retained, right
from robust_unlearning.stats.effects import Effect, mean_effect
from robust_unlearning.stats.estimates import Estimate
from robust_unlearning.stats.format import NATS, PERCENT, interval, shown

Pairs = Sequence[tuple[Model, Model]]
FAMILIES = {"representation methods": paper.REPRESENTATION, "preference methods": paper.PREFERENCE}


def changes(pairs: Pairs, of: QuestionMeasure) -> Effect:
    """The second of each pair less the first, question by question; one row a pair, that is, a seed."""
    rows = {second.seed: of(second.test) - of(first.test) for first, second in pairs}
    return Effect(rows, of.groups(pairs[0][0].test), answers=of.share)


def from_base(grid: Grid, models: Sequence[Model], of: QuestionMeasure) -> Effect:
    """Models of one method less the base."""
    rows = {model.seed: of(model.test) - of(grid.base) for model in models}
    return Effect(rows, of.groups(grid.base), answers=of.share)


def forgotten(grid: Grid, models: Sequence[Model]) -> Estimate:
    """What models have forgotten beyond the base, nats; of several methods the mean, which are no seeds."""
    methods = [[model for model in models if model.recipe == recipe] for recipe in grid.recipes]
    effect = mean_effect([from_base(grid, of_method, forgetting) for of_method in methods if of_method])
    return effect.estimate() if effect else Estimate(None, note="no models")


def percent(share: Estimate) -> str:
    """A share in %, with its interval."""
    if share.value is None:
        return shown(share)
    return f"{shown(share.value, PERCENT)} % {interval(share.low, share.high, PERCENT)}".rstrip()


def forgot(grid: Grid, *models: Sequence[Model]) -> str:
    """What each group of models has forgotten, in words; stands beside every reduction and recovery."""
    nats = " and ".join(shown(forgotten(grid, each), NATS) for each in models)
    return f"forgot {nats} nats beyond the base" + (", without noise and with it" if len(models) > 1 else "")


def has_forgotten(grid: Grid, plain: Sequence[Model]) -> bool:
    """Whether models without noise have forgotten `LEAST` nats beyond the base."""
    return bool(plain) and (forgotten(grid, plain).value or 0.0) >= LEAST


def if_forgotten(grid: Grid, outcome: Outcome, plain: Sequence[Model]) -> Outcome:
    """The outcome, undecided where the method without noise has forgotten less than `LEAST` nats beyond the base:
    nothing is mended, kept or broken there."""
    if outcome.undecided or has_forgotten(grid, plain):
        return outcome
    return replace(outcome, undecided=f"without noise less than {LEAST} nats were forgotten beyond the base")


RNA_CLAIMS = ("recovers", "mends", "keeps-forgetting", "keeps-retained", "related", "perturbed-forget")


def main_claims(grid: Grid, chosen: Mapping[str, float], unchosen: Mapping[str, str]) -> list[Outcome]:
    """Claims that rest on the main stage.

    Args:
        chosen: recipe -> scale of the noise.
        unchosen: recipe -> why it has none; its rows are undecided.
    """
    return [
        *_fragility(grid),
        *_families(grid),
        *(row for recipe, noise in chosen.items() for row in _rna(grid, recipe, noise)),
        *_average_recovery(grid, chosen),
        *(
            Outcome(claim, grid.recipes[recipe], Estimate(None, note=why), undecided=why)
            for recipe, why in unchosen.items()
            for claim in RNA_CLAIMS
        ),
    ]


def _fragility(grid: Grid) -> list[Outcome]:
    rows = []
    for recipe, title in grid.recipes.items():
        plain = grid.at(recipe, 0)
        if not plain:
            continue
        printed = f"reduction {paper.REDUCTION[title]} %" if title in paper.REDUCTION else ""
        rate = measures.reduction([model.test for model in plain], grid.base)
        beside = f"reduction {percent(rate)}; {forgot(grid, plain)}"
        lost, harm = (from_base(grid, plain, of) for of in (right, excess))
        rows.append(if_forgotten(grid, Outcome("fragile", title, lost, printed, beside), plain))
        rows.append(if_forgotten(grid, Outcome("forget-token", title, harm, "", forgot(grid, plain)), plain))
    return rows


def family_mean(effects: Iterable[tuple[str, Effect]]) -> list[Effect]:
    """The mean effect over the methods of each family, by title; of both, or of none where one has no method."""
    pairs = list(effects)
    means = [mean_effect([effect for title, effect in pairs if title in titles]) for titles in FAMILIES.values()]
    there = [mean for mean in means if mean]
    return there if len(there) == len(FAMILIES) else []


def less(first: Effect, second: Effect) -> Effect | None:
    """One effect less another, over the seeds of `effects.mean_effect`; None where the questions differ."""
    mean = mean_effect([first, replace(second, by_seed={seed: -row for seed, row in second.by_seed.items()})])
    return mean and replace(mean, by_seed={seed: 2 * row for seed, row in mean.by_seed.items()})


def unlike(effect: Effect | None, of: str) -> str:
    """Why nothing is said of robustness: what is compared has not forgotten alike; empty where that may be 0."""
    found = effect.estimate() if effect else None
    if found is None or found.low is None or found.high is None or found.low <= 0 <= found.high:
        return ""
    return f"not at like forgetting: {of} {shown(found, NATS)} nats"


def _families(grid: Grid) -> list[Outcome]:
    """Preference against representation methods: losses of accuracy, averaged over the methods of each."""
    plain = [(title, grid.at(recipe, 0)) for recipe, title in grid.recipes.items()]
    plain = [(title, models) for title, models in plain if has_forgotten(grid, models)]
    means = family_mean((title, from_base(grid, models, right)) for title, models in plain if models)
    if not means:
        return []
    printed = "reductions {} and {} %".format(*reversed(paper.AVERAGE["reduction"]))
    of_family = {
        name: [model for title, models in plain if title in titles for model in models]
        for name, titles in FAMILIES.items()
    }
    beside = "; ".join(f"{name} {forgot(grid, models)}" for name, models in of_family.items())
    lost = less(*means)
    forgetting_of = family_mean((title, from_base(grid, models, forgetting)) for title, models in plain)
    why = unlike(less(forgetting_of[1], forgetting_of[0]), "the preference less the representation methods")
    return [Outcome("po-more-fragile", "averages", lost, printed, beside, undecided=why)] if lost else []


def _rna(grid: Grid, recipe: str, noise: float) -> list[Outcome]:
    """RNA at one scale against the same method and seed without noise."""
    title, pairs = grid.recipes[recipe], grid.pairs(recipe, noise)
    if not pairs:
        return []
    plain, rna = (list(side) for side in zip(*pairs, strict=True))
    rate = measures.recovery([model.test for model in rna], [model.test for model in plain], grid.base)
    both = forgot(grid, plain, rna)
    beside = f"recovery {percent(rate)}; {both}"
    of, recovery, wmdp, mmlu = f"{title}, noise {noise:g}", "", "", ""
    if title in paper.RECOVERY:
        recovery = f"recovery {paper.RECOVERY[title]} %"
        wmdp = f"{paper.WMDP_RNA[title] - paper.WMDP[title]:+.1f} points (2-grams)"
        mmlu = f"{paper.MMLU_RNA[title] - paper.MMLU[title]:+.1f} points (2-grams)"
    rows = [
        Outcome("recovers", of, changes(pairs, right), recovery, beside),
        like_forgetting(grid, recipe, noise),
        Outcome("keeps-forgetting", of, changes(pairs, forget), wmdp, both),
        Outcome("keeps-retained", of, changes(pairs, retained), mmlu, both),
    ]
    if len(grid.base.forget_perturbed):
        rows.append(Outcome("perturbed-forget", of, changes(pairs, measures.forget_perturbed), "", both))
    if len(grid.base.near):
        rows.append(Outcome("related", of, changes(pairs, near), "", both))
    return [if_forgotten(grid, row, grid.at(recipe, 0)) for row in rows]


def like_forgetting(grid: Grid, recipe: str, noise: float) -> Outcome:
    """RNA less none in excess harm, where both have forgotten as much; see `experiments.matched`."""
    lines = {}
    for seed in sorted({model.seed for model in grid.models}):
        rna, plain = (
            [model.test for model in grid.at(recipe, scale, last=False) if model.seed == seed] for scale in (noise, 0.0)
        )
        lines[seed] = [(rna, plain)]
    effect, at = compare_lines(lines, grid.base, excess)
    of = f"{grid.recipes[recipe]}, noise {noise:g}"
    if effect is None:
        beside = f"no model with noise has forgotten {LEAST} nats between two snapshots without"
        return Outcome("mends", of, Estimate(None, note=beside), "", "", undecided=beside)
    beside = f"{len(at)} models compared, which forgot {min(at):.2f} to {max(at):.2f} nats beyond the base"
    return Outcome("mends", of, effect, "", beside)


def _average_recovery(grid: Grid, chosen: Mapping[str, float]) -> list[Outcome]:
    """The paper's averages over representation and over preference methods, each at its chosen noise."""
    rows = []
    for (name, titles), printed in zip(FAMILIES.items(), paper.AVERAGE["recovery"], strict=True):
        methods = [grid.pairs(recipe, noise) for recipe, noise in chosen.items() if grid.recipes[recipe] in titles]
        methods = [pairs for pairs in methods if pairs]
        if methods and (effect := mean_effect([changes(pairs, right) for pairs in methods])):
            plain, rna = ([pair[side] for pairs in methods for pair in pairs] for side in (0, 1))
            row = Outcome("family-recovers", f"{name}, mean", effect, f"recovery {printed} %", forgot(grid, plain, rna))
            rows.append(if_forgotten(grid, row, plain))
    return rows

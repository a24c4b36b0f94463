"""Claims: the rule of a verdict, and what made-up answers say of each claim."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from robust_unlearning.errors import UserError
from robust_unlearning.evaluate.record import Record, Task
from robust_unlearning.evaluate.suite import Evaluation
from robust_unlearning.reproduce import claims, claims_on_grids, claims_on_ngrams, paper
from robust_unlearning.reproduce.analyses import models_of
from robust_unlearning.reproduce.grid import Grid, Model, choose_noise
from robust_unlearning.reproduce.tables import noise_table
from robust_unlearning.reproduce.target import Roles, load_target
from robust_unlearning.reproduce.verdicts import (
    CLAIMS,
    complete,
)
from robust_unlearning.results.measures import Asked, Measured, Perturbed
from robust_unlearning.stats.means import of_answers, over_seeds

pytestmark = pytest.mark.unit


def test_paper_numbers_agree_with_its_own_averages() -> None:
    # it prints 43.3 for the preference methods' reductions, whose mean is 43.5
    for values, name in ((paper.REDUCTION, "reduction"), (paper.RECOVERY, "recovery")):
        for titles, printed in zip((paper.REPRESENTATION, paper.PREFERENCE), paper.AVERAGE[name], strict=True):
            assert np.mean([values[each] for each in titles]) == pytest.approx(printed, abs=0.25)


def _measured(right: float, excess: float, forgotten: float, near: float = 1.0) -> Measured:
    """Forty questions, so many of which are right, in an order that is the same for every model."""
    order = np.random.default_rng(0).permutation(40)
    odd = (order < 40 * right).astype(float)
    ones = np.ones(40)
    places = {"option": Perturbed(odd, ones, np.full(40, excess))}
    alone = np.arange(40.0)
    asked = Asked(alone, alone, alone, alone, alone, np.zeros(0), alone % 8, np.zeros(0))
    near_right = (order < 40 * near).astype(float)
    return Measured(odd * 0, np.full(40, -forgotten), near_right, ones, ones, places, np.zeros(0), asked)


def _grid() -> Grid:
    """RMU harms (90 to 50 %), noise 3 mends it (80 %) where it has forgotten as much, noise 9 less (60 %)."""
    models = []
    for seed in (0, 1, 2):
        for noise, right, excess in ((0.0, 0.5, -1.0), (3.0, 0.8, -0.2), (9.0, 0.6, -0.8)):
            for step, part in ((1, 0.5), (2, 1.0)):
                own = _measured(0.9 - (0.9 - right) * part, excess * part, (1.0 + 0.1 * (noise == 0)) * part)
                models.append(
                    Model("tiny/rmu", "RMU", seed, noise, {"noise_std": noise}, step, step == 2, "runs/x-1", "runs/x-1",
                          own, own)
                )  # fmt: skip
    base = _measured(0.9, 0.0, 0.0)
    return Grid(base, base, 0.25, models, {})


def test_claims_on_made_up_answers() -> None:
    grid = Grid.from_json(_grid().as_json())
    target = load_target("tiny", ["rule=max perturbed"])
    choice = choose_noise(target, grid)
    chosen = dict(choice.scales)
    assert chosen == {"tiny/rmu": 3.0}
    assert not choice.unkept
    rows = complete(claims.main_claims(grid, chosen, {}))
    found = {each.claim: each for each in rows if each.claim != "family-recovers"}
    assert next(each for each in rows if each.claim == "family-recovers").finding == "holds"
    fragile = found["fragile"]
    assert fragile.estimate is not None
    assert fragile.estimate.value == pytest.approx(-0.4)
    assert "19.0" in fragile.paper
    lost = claims.right(_measured(0.5, 0, 0)) - claims.right(grid.base)
    expected = of_answers(over_seeds(np.stack([lost] * 3), claims.right.groups(grid.base)), lost)
    assert (fragile.estimate.low, fragile.estimate.high) == (expected.low, expected.high)
    expected_findings = {
        "fragile": "holds",
        "forget-token": "holds",
        "po-more-fragile": "not run",
        "recovers": "holds",
        "mends": "holds",
        "keeps-forgetting": "inconclusive",  # forty questions answered alike do not exclude that 5 % are not
        "keeps-retained": "inconclusive",
        "related": "inconclusive",
        "free": "not run",  # a stage of its own
    }
    others = {claim: "not run" for claim in CLAIMS if claim != "family-recovers"}
    assert {key: each.finding for key, each in found.items()} == others | expected_findings
    # at like forgetting: 0.5 of RNA lies at 0.5/0.55 of the way to step 1 without noise, 1.0 at 0.45/0.55 beyond it
    at_half, at_one = -0.5 * 0.5 / 0.55, -0.5 - 0.5 * 0.45 / 0.55
    mends = found["mends"].estimate
    assert mends is not None
    assert mends.value == pytest.approx(((-0.1 - at_half) + (-0.2 - at_one)) / 2)
    greatest = claims_on_grids.noise_claims(grid, chosen)
    assert [each.finding for each in greatest] == ["holds", "inconclusive"]
    assert complete([])[0].finding == "not run"


@pytest.mark.parametrize(
    ("bounds", "says"),
    [
        (
            "forget<=0.3 and retain>=0.9*base",
            "no scale keeps forget accuracy at most 30.0 %: 60.0 % at best (scale 9), 30.0 beyond it",
        ),
        (
            "forget<=0.1 and excess_harm>=0",
            "no scale keeps forget accuracy at most 10.0 %: 60.0 % at best (scale 9), 50.0 beyond it; no scale keeps "
            "excess harm at least 0.000 nats: -0.200 nats at best (scale 3), 0.200 beyond it",
        ),
        (
            "forget<=0.7 and excess_harm>=-0.5",
            "no scale keeps all bounds together: 3 comes nearest, with forget 0.800 > 0.700",
        ),
    ],
)
def test_where_no_scale_keeps_the_bounds_none_is_chosen(bounds: str, says: str) -> None:
    models = [
        replace(model, validation=replace(model.test, forget=model.test.places["option"].right))
        for model in _grid().models
    ]
    grid = replace(_grid(), models=models)
    choice = choose_noise(load_target("tiny", [f"rule=max perturbed where {bounds}"]), grid)
    assert choice.scales == {}
    assert {key: text.replace("−", "-").replace("+", "") for key, text in choice.unkept.items()} == {"tiny/rmu": says}
    table = noise_table(grid, choice.scales, choice.unkept, "a rule")
    assert says.split(":")[0] in table.text()
    stage = load_target("tiny").stages["figure7"].model_copy(update={"recipes": ("tiny/rmu",)})
    assert {model.noise for model in models_of(stage, grid, choice.scales)} == {0.0}
    assert {model.noise for model in models_of(stage, grid, {"tiny/rmu": 3.0})} == {0.0, 3.0}


def test_what_has_forgotten_nothing_decides_nothing() -> None:
    grid = _grid()
    for model in grid.models:
        model.test.forget_logp[:] = -0.1
    found = {each.claim: each for each in claims.main_claims(grid, {"tiny/rmu": 3.0}, {})}
    for claim in ("fragile", "forget-token", "recovers", "keeps-forgetting", "keeps-retained"):
        assert found[claim].finding == "inconclusive"
        assert "less than 0.3 nats" in found[claim].undecided


def test_without_a_match_at_like_forgetting_the_row_is_undecided() -> None:
    grid = _grid()
    grid = replace(grid, models=[model for model in grid.models if model.last or model.noise])  # no snapshot between
    row = claims.like_forgetting(grid, "tiny/rmu", 3.0)
    assert row.finding == "inconclusive"
    assert "no model with noise has forgotten 0.3 nats between two snapshots" in row.undecided
    assert (row.estimate or over_seeds([[0.0]])).value is None


def test_methods_that_have_forgotten_are_averaged_and_counted() -> None:
    """RMU has forgotten and gains 20 points, NPO has not and loses 20: the row is of RMU alone."""

    def model(recipe: str, title: str, noise: float, right: float, forgotten: float, seed: int) -> Model:
        fields = {"noise_std": noise, "noise_layers": (3,) if noise else ()}
        own = _measured(right, 0, forgotten)
        return Model(recipe, title, seed, noise, fields, 1, True, "", "", own, own)

    methods = [("r", "RMU", 1.0, 0.2), ("n", "NPO", 0.1, -0.2)]
    models = [
        model(recipe, title, noise, 0.5 + gain * (noise > 0), forgotten, seed)
        for recipe, title, forgotten, gain in methods
        for noise in (0.0, 1.0)
        for seed in range(3)
    ]
    grid = Grid(_measured(0.9, 0, 0), None, 0.25, models, {})
    (row,) = claims_on_grids.layer_claims(grid, "single-layer")
    assert (row.of, row.undecided) == ("layers 3, 1 of 2 methods", "")
    assert row.estimate is not None
    assert row.estimate.value == pytest.approx(0.2)
    neither = replace(grid, models=[each for each in models if each.recipe == "n"])
    (row,) = claims_on_grids.layer_claims(neither, "single-layer")
    assert (row.of, row.finding) == ("layers 3, 1 of 1 methods", "inconclusive")
    assert "no method has forgotten 0.3 nats" in row.undecided


def test_the_slope_over_c_is_that_of_least_squares() -> None:
    shares = {1.0: 0.8, 2.0: 0.6, 8.0: 0.1}
    base = _measured(0.9, 0, 0)
    models = [
        Model("r", "RMU", 0, 0.0, {"steering_scale": c}, 1, True, "", "", _measured(share, 0, 1), None)
        for c, share in shares.items()
    ]
    (found,) = claims_on_grids.coefficient_claims(Grid(base, None, 0.25, models, {}))
    slope = np.polyfit(np.log2(list(shares)), list(shares.values()), 1)[0]
    assert found.estimate is not None
    assert found.estimate.value == pytest.approx(slope)
    assert found.finding == "holds"


def test_the_papers_misprints_are_said() -> None:
    """Gains that its tables print beside accuracies which differ by something else, by more than rounding."""
    printed = claims_on_ngrams._printed
    assert printed(2, ["SimNPO+KL"]) == "+13.3 points (of the accuracies; misprint: +6.3)"
    assert printed(4, ["RSV", "NPO+KL"]) == "+11.1 points (of the accuracies; misprint: RSV)"
    assert printed(4, ["RMU"]) == "-0.8 points"
    for (length, title), gain in paper.PRINTED_GAINS.items():
        assert abs(paper.gain(length, title) - gain) > 0.15
    grid = _grid()
    (row,) = noise_table(grid, {"tiny/rmu": 3.0}, {}, "a rule").rows
    assert list(row.values()) == ["RMU", "3, 9", "3", "0.03", "0.03", "0.03", "0.03", "0.03"]
    rsv = replace(grid, models=[replace(model, title="RSV") for model in grid.models])
    (row,) = noise_table(rsv, {}, {"tiny/rmu": "no scale keeps it"}, "a rule").rows
    assert list(row.values())[2:5] == ["none: no scale keeps it", "0.09", "0.05"]


def test_answers_by_role() -> None:
    def record(task: str, logprobs: list[float], answer: int) -> Record:
        correct = answer == int(np.argmax(logprobs))
        return Record(Task.parse(task), "1", answer=answer, correct=correct, logprobs=tuple(logprobs))

    records = [
        record("sky/cloze/clean", [-1.0, -3.0], 1),
        record("art/cloze/clean", [-1.0, -2.0], 0),
        record("art/cloze/begin", [-2.0, -1.0], 0),
        record("art/cloze/begin-control", [-1.0, -2.0], 0),
    ]
    own = Measured.of(Evaluation({}, records), Roles(forget=("sky/*",)).model_dump())
    assert own.forget.tolist() == [0]
    assert own.forget_logp == pytest.approx([-3 - np.logaddexp(-1, -3)])
    assert own.near.size == 0
    assert (own.far.tolist(), own.clean.tolist()) == ([1], [1])
    assert own.places["begin"].excess == pytest.approx([-1.0])  # the options' total is the same in both forms
    with pytest.raises(UserError, match="no task whose role is forget"):
        Measured.of(Evaluation({}, records), Roles().model_dump())


def test_what_several_methods_have_forgotten_counts_methods_as_no_seeds() -> None:
    grid = _grid()
    other = [replace(model, recipe="tiny/rsv", title="RSV") for model in grid.models]
    both = replace(grid, models=[*grid.models, *other])
    alone, together = (
        claims.forgotten(of, [model for model in of.models if model.last and not model.noise]) for of in (grid, both)
    )
    assert (alone.seeds, together.seeds) == (3, 3)
    assert (together.value, together.low, together.high) == (alone.value, alone.low, alone.high)

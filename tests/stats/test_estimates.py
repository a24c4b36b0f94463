"""Statistics against plain NumPy, known values and simulation."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from robust_unlearning.errors import UserError
from robust_unlearning.evaluate.record import Record, Task, excess_of
from robust_unlearning.evaluate.score_table import format_scores
from robust_unlearning.evaluate.suite import accuracy_score
from robust_unlearning.stats import estimates, paired
from robust_unlearning.stats.estimates import Estimate, accuracy
from robust_unlearning.stats.means import over_seeds, share_over_seeds

RNG = np.random.default_rng(0)


def test_paper_example() -> None:
    assert estimates.reduction_rate(60, 30).value == 0.5
    assert estimates.recovery_rate(60, 30, 50).value == pytest.approx(0.6667, abs=5e-5)
    assert estimates.reduction_rate(0.5, 0.6).value == pytest.approx(-0.2)


@pytest.mark.parametrize("unlearned", [60, 61])
def test_rates_are_undefined_rather_than_numbers(unlearned: float) -> None:
    recovery = estimates.recovery_rate(60, unlearned, 50)
    assert recovery.value is None
    assert str(recovery).startswith("undefined (unlearning lost nothing")
    assert estimates.reduction_rate(0, 0).value is None
    with pytest.raises(UserError, match="finite"):
        estimates.reduction_rate(float("nan"), 1)


def test_accuracy_is_wilson() -> None:
    row = estimates.accuracy([True] * 8 + [False] * 2)
    assert row.value == 0.8
    assert row.n == 10
    assert row.stderr == pytest.approx(np.std([1] * 8 + [0] * 2, ddof=1) / 10**0.5)
    assert (row.low, row.high) == pytest.approx((0.4901625, 0.9433178), abs=1e-6)  # a textbook value
    assert estimates.accuracy([1, 1, 1]).high == 1
    assert estimates.accuracy([1, 1, 1]).low == pytest.approx(0.4385, abs=1e-4)
    assert estimates.accuracy([0]).stderr is None
    with pytest.raises(UserError, match="only 0 and 1"):
        estimates.accuracy([0.5])


def plain_bootstrap(statistic: Callable[..., float], *columns: Any, resamples: int = 4000) -> Any:
    """Percentiles of a statistic over resampled rows, one resample at a time."""
    rng = np.random.default_rng(9)
    picks = (rng.integers(len(columns[0]), size=len(columns[0])) for _ in range(resamples))
    return np.quantile([statistic(*(each[pick] for each in columns)) for pick in picks], [0.025, 0.975])


@pytest.mark.parametrize("values", [RNG.normal(size=200), RNG.integers(0, 2, size=200).astype(float)])
def test_mean_interval(values: Any) -> None:
    estimate = estimates.mean_interval(values)
    assert estimate.value == pytest.approx(values.mean())
    assert estimate.stderr == pytest.approx(values.std(ddof=1) / 200**0.5)
    low, high = plain_bootstrap(np.mean, values)
    width = high - low
    assert (estimate.low, estimate.high) == pytest.approx((low, high), abs=0.05 * width)
    assert estimate == estimates.mean_interval(values)
    narrow = estimates.mean_interval(values, level=0.5)
    assert estimate.low < narrow.low < narrow.high < estimate.high  # type: ignore[operator]


def test_chunks_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    values = RNG.normal(size=300)
    whole = estimates.mean_interval(values)
    monkeypatch.setattr(estimates, "CHUNK", 1000)
    assert estimates.mean_interval(values) == whole


def test_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(4)
    hits = 0
    for trial in range(300):
        estimate = estimates.mean_interval(rng.exponential(size=60), seed=trial, resamples=400)
        assert estimate.low is not None
        assert estimate.high is not None
        hits += estimate.low <= 1 <= estimate.high
    assert 0.87 <= hits / 300 <= 0.98


def test_nats_per_token_weights_documents_by_tokens() -> None:
    tokens = RNG.integers(5, 200, size=80)
    nats = tokens * RNG.normal(3, 0.4, size=80)
    estimate = estimates.nats_per_token([*nats, 0.0], [*tokens, 0])  # a document without tokens plays no part
    assert estimate.value == pytest.approx(nats.sum() / tokens.sum())
    assert estimate.n == 80
    low, high = plain_bootstrap(lambda a, b: a.sum() / b.sum(), nats, tokens)
    assert (estimate.low, estimate.high) == pytest.approx((low, high), abs=0.05 * (high - low))
    residual = nats - estimate.value * tokens
    linear = (80 / 79 * (residual**2).sum()) ** 0.5 / tokens.sum()
    assert estimate.stderr == pytest.approx(linear, rel=0.1)
    with pytest.raises(UserError, match="no document has a token"):
        estimates.nats_per_token([0.0], [0])


def test_paired_rates() -> None:
    rng = np.random.default_rng(2)
    base = rng.random(400) < 0.7
    unlearned = base & (rng.random(400) < 0.6)
    rna = unlearned | (base & (rng.random(400) < 0.5))
    reduction = paired.reduction([base], [unlearned])
    assert reduction.value == pytest.approx(estimates.reduction_rate(base.mean(), unlearned.mean()).value)
    low, high = plain_bootstrap(lambda a, b: (a.mean() - b.mean()) / a.mean(), base, unlearned)
    assert (reduction.low, reduction.high) == pytest.approx((low, high), abs=0.05 * (high - low))
    recovery = paired.recovery([base], [unlearned], [rna])
    low, high = plain_bootstrap(lambda a, b, c: (c.mean() - b.mean()) / (a.mean() - b.mean()), base, unlearned, rna)
    assert (recovery.low, recovery.high) == pytest.approx((low, high), abs=0.05 * (high - low))
    assert recovery.note == ""
    assert recovery.n == 400


def test_pairing_matters() -> None:
    base = RNG.random(300) < 0.5
    same = estimates.paired_difference(base, base)
    assert (same.low, same.high) == (0, 0)
    other = estimates.paired_difference(base, RNG.permutation(base))
    assert other.value == pytest.approx(0)
    assert other.high is not None
    assert other.high > 0.05


def test_undefined_resamples_are_counted_or_forbid_the_interval() -> None:
    base, unlearned = np.ones(100), np.ones(100)
    unlearned[:2] = 0  # no loss in about 13 % of resamples
    wide = paired.recovery([base], [unlearned], [base])
    assert wide.value == 1
    assert wide.low is None
    assert wide.high is None
    assert "unbounded" in str(wide)
    unlearned[:5] = 0  # in about 0.6 %
    counted = paired.recovery([base], [unlearned], [base])
    assert counted.low == counted.high == 1
    assert "undefined in" in counted.note
    nothing = paired.recovery([base], [base], [base])
    assert nothing.value is None
    assert nothing.n == 100
    assert "nothing to recover" in nothing.note
    assert paired.reduction([np.zeros(5)], [np.zeros(5)]).value is None


def test_excess_harm_is_the_difference_of_the_harms() -> None:
    clean, forget, control = RNG.normal(-5, 2, size=(3, 50))
    tokens = RNG.integers(1, 5, size=50)

    def records(logps: Any, counts: Any = tokens) -> list[Record]:
        pairs = zip(logps, counts, strict=True)
        return [Record(Task("q"), "1", answer=0, logprobs=(logp,), tokens=(int(count),)) for logp, count in pairs]

    def harm(of: Any, to: Any) -> Estimate:
        return estimates.mean_interval(excess_of(records(of), records(to)))

    excess, of_forget, of_control = harm(forget, control), harm(forget, clean), harm(control, clean)
    assert of_forget.value is not None
    assert of_control.value is not None
    assert excess.value == pytest.approx(((forget - control) / tokens).mean())
    assert of_forget.value == pytest.approx(((forget - clean) / tokens).mean())
    assert excess.value == pytest.approx(of_forget.value - of_control.value)
    assert harm(forget, control) == excess
    with pytest.raises(UserError, match="at least 1"):
        excess_of(records(forget, tokens * 0), records(control))


def test_over_seeds() -> None:
    rng = np.random.default_rng(3)
    table = rng.normal(0, 1, size=(4, 1)) + rng.normal(0, 1, size=(1, 100)) + rng.normal(0, 0.1, (4, 100))
    estimate = estimates.over_seeds(table)
    assert estimate.value == pytest.approx(table.mean())
    assert "S=4, n=100" in str(estimate)
    seeds, questions = table.mean(axis=1).var() / 4, table.mean(axis=0).var() / 100
    assert estimate.stderr == pytest.approx((seeds + questions) ** 0.5, rel=0.05)
    one = estimates.over_seeds(table[:1])
    assert "one seed" in one.note
    assert one.stderr == pytest.approx(table[0].std() / 10, rel=0.05)
    with pytest.raises(UserError, match="shape"):
        estimates.over_seeds([1.0, 2.0])


def test_one_question_has_no_interval() -> None:
    estimate = estimates.mean_interval([0.5])
    assert (estimate.value, estimate.low, estimate.stderr) == (0.5, None, None)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: estimates.mean_interval([]), "values must be a list"),
        (lambda: estimates.mean_interval([[1.0]]), "values must be a list"),
        (lambda: estimates.mean_interval([0.0, np.nan]), "the first at index 1"),
        (lambda: estimates.paired_difference([1, 0], [1]), r"lengths differ \(a: 2, b: 1\)"),
        (lambda: estimates.mean_interval([1, 2], resamples=5), "at least 100"),
        (lambda: estimates.mean_interval([1, 2], level=95), "0.95"),
    ],
)
def test_errors(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        call()


def test_estimates_print_and_go_to_json() -> None:
    estimate = Estimate(0.51234, 0.4, 0.6, 0.05, 30)
    assert str(estimate) == "0.5123 [0.4, 0.6] (n=30)"
    plain = {"value": 0.51234, "low": 0.4, "high": 0.6, "stderr": 0.05, "n": 30}
    assert json.loads(json.dumps(estimate.as_dict())) == plain
    assert Estimate(None, note="why").as_dict()["note"] == "why"


def test_table_is_aligned() -> None:
    harm = Estimate(-0.5, -0.7, -0.3, 0.1, 10).as_dict()
    table = format_scores(
        {
            "general/cloze/clean": {**accuracy_score(accuracy([1, 0] * 5)), "acc_norm": 0.5},
            "general/cloze/option": {**accuracy_score(accuracy([1] * 10)), "acc_norm": 1.0, "excess_harm": harm},
            "single/cloze/clean": {**accuracy_score(accuracy([1])), "acc_norm": 1.0},
            "heldout/text": {
                "nats_per_token": 3.5,
                "perplexity": 33.1,
                "low": None,
                "high": None,
                "n": 1,
                "tokens": 90,
            },
        }
    )
    questions, texts = table.split("\n\n")
    lines = questions.splitlines()
    assert len({len(line) for line in lines}) == 1
    assert "0.500 ± 0.167  [0.237, 0.763]" in lines[1]
    assert "-0.500 [-0.700, -0.300]  10" in lines[2]
    assert "3.5000" in texts
    assert "33.10" in texts


def test_a_share_at_the_ceiling_has_wilsons_interval() -> None:
    own = share_over_seeds([[1.0] * 4, [1.0] * 4])
    wilson = accuracy([1] * 4)
    assert (own.value, own.low, own.high, own.n, own.seeds) == (1.0, wilson.low, wilson.high, 4, 2)
    assert share_over_seeds([[0.0] * 4]).high == accuracy([0] * 4).high
    mixed = [[1.0, 0.0, 1.0], [1.0, 1.0, 0.0]]
    assert share_over_seeds(mixed) == over_seeds(mixed)

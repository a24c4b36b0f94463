"""The paper's claims and what becomes of them: a rule on an interval, never on a point, and a word for each claim.

| rule | holds | does not hold |
|---|---|---|
| `above` m | the whole interval is above m | it is wholly below m |
| `below` m | it is wholly below m | it is wholly above m |
| `within` m | it lies inside −m to m | it lies wholly outside |
| `zero` | never: no interval proves a nought | it does not cover 0 |

In all other cases it is inconclusive. That is the rule for one row; a claim as a whole follows from all of its rows by
`whole`. `benchmarks/verdicts.py` simulates how often these rules err and how often they find an effect that is there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

from robust_unlearning.report.tables import INCONCLUSIVE, Column, Finding, Table, Verdict
from robust_unlearning.stats import paired
from robust_unlearning.stats.effects import Effect, mean_effect, mean_of_ends, mean_of_sets
from robust_unlearning.stats.estimates import Estimate, VariancePart
from robust_unlearning.stats.factors import FEWEST_SEEDS
from robust_unlearning.stats.format import NATS, POINTS, NumberForm

Kind = Literal["above", "below", "within", "zero"]
FORGET_MARGIN, RETAIN_MARGIN, TIME_MARGIN = 0.05, 0.03, 0.05
"""Changes of forget and of retain accuracy, and share of the time, below which something is said to stay as it was."""
FIRST_ORDER = 0.1
"""Share of the output's change that may be left unexplained where the first order is said to hold."""
PROBABILITY = 0.1
"""Distance of an observed probability from the theorem's at which it is said to be as the theorem says."""
RULE = (
    "A verdict rests on a 95 % interval and never on a point: a claim holds where the whole interval lies on the side "
    "that it says, does not hold where it lies wholly on the other, and is inconclusive otherwise. That something "
    "stays as it was holds where the interval lies inside a margin that the row names; that something is exactly so "
    "can only be refuted. An interval says how far the number may move with other training seeds, other entities that "
    "questions are about and other words put into them, and is the wider the fewer of these there are; with fewer than "
    f"{FEWEST_SEEDS} seeds it is of these models, and says nothing of others. Intervals are of single rows: of twenty "
    "rows without an effect one is expected to look like one."
)
SUMMARY_RULE = (
    "A claim as a whole, where it is about what happens on average: the mean of all its rows is judged like a row. It "
    "is mixed where single rows hold and others do not, each after Holm's correction over the rows. Where the paper "
    "states it for every case (a theorem), it does not hold where one row fails after that correction, and holds where "
    "all rows hold. How often these rules err stands below the claims."
)


@dataclass(frozen=True)
class Criterion:
    """What must be so of an interval for a claim to hold; `margin` in the estimate's unit."""

    kind: Kind
    margin: float = 0.0

    def text(self, scale: float = 1.0) -> str:
        """In words, the margin shown in the unit of the estimate as it is shown."""
        limit = f"{scale * self.margin:g}"
        words = {"above": f"above {limit}", "below": f"below {limit}", "within": f"within ±{limit}", "zero": "0"}
        return words[self.kind]


def judge(rule: Criterion, estimate: Estimate | None) -> Finding:
    """The finding that an estimate allows; `not run` where there is none."""
    if estimate is None:
        return "not run"
    low, high = estimate.low, estimate.high
    if low is None or high is None:
        return INCONCLUSIVE
    if rule.kind == "zero":
        return "does not hold" if low > 0 or high < 0 else INCONCLUSIVE
    if rule.kind == "within":
        inside, outside = -rule.margin < low and high < rule.margin, low > rule.margin or high < -rule.margin
    else:
        above, below = low > rule.margin, high < rule.margin
        inside, outside = (above, below) if rule.kind == "above" else (below, above)
    return "holds" if inside else "does not hold" if outside else INCONCLUSIVE


def p_of(rule: Criterion, estimate: Estimate) -> float:
    """The p-value of the finding that an estimate allows: 1 less the level at which its interval would just allow it.

    1 where there is no interval, or where the value itself speaks for neither.
    """
    if estimate.value is None or estimate.low is None or estimate.high is None:
        return 1.0
    mean = _as_mean(estimate)
    bounds = (-rule.margin, rule.margin) if rule.kind == "within" else (rule.margin,)
    return max(mean.p(bound) for bound in bounds)  # of a margin's two ends the nearer one decides, inside and outside


def _as_mean(estimate: Estimate) -> Estimate:
    """An estimate with parts: where it has none, one whose interval is as wide, of n questions."""
    if estimate.parts:
        return estimate
    assert estimate.low is not None
    assert estimate.high is not None
    part = VariancePart("questions", 1.0, max(1, (estimate.n or 10**6) - 1))
    unit = replace(estimate, value=0.0, parts=(part,), slack=0.0).interval(0.95)[1]
    half, middle = (estimate.high - estimate.low) / 2, (estimate.high + estimate.low) / 2
    return replace(estimate, value=middle, parts=(replace(part, variance=(half / unit) ** 2),))


@dataclass(frozen=True)
class Claim:
    """What the paper claims, and how it is judged.

    Attributes:
        text: what it says.
        paper: where the paper says it.
        measure: what the estimate is, with its unit.
        rule: what must be so of its interval.
        form: how its numbers are written.
        every: the paper states it for every case; else it is about what happens on average.
    """

    text: str
    paper: str
    measure: str
    rule: Criterion
    form: NumberForm = NATS
    every: bool = False


ABOVE, BELOW, ZERO = Criterion("above"), Criterion("below"), Criterion("zero")
TOKEN, GAIN, MEAN = "accuracy with a forget-token", "RNA less none", "mean of methods"
# fmt: off
CLAIMS = {
    "fragile": Claim("Unlearning costs accuracy where a forget-token stands in a harmless question", "Figure 1",
        "accuracy less the base's, points", BELOW, POINTS),
    "forget-token": Claim("It is the forget-token: an unrelated word in its place costs less", "Figure 1, Section 4",
        "excess harm less the base's, nats", BELOW),
    "po-more-fragile": Claim("Preference methods lose more than representation methods", "Section 6.2",
        "loss of accuracy, preference less representation, points", ABOVE, POINTS),
    "recovers": Claim("RNA wins accuracy back, at the same step", "Figure 1",
        f"{TOKEN}, {GAIN}, points", ABOVE, POINTS),
    "family-recovers": Claim("RNA wins accuracy back on average in both families, at the same step", "Section 6.2",
        f"{TOKEN}, {GAIN}, points", ABOVE, POINTS),
    "mends": Claim("RNA wins it back also where both have forgotten as much", "Figure 1",
        "excess harm, RNA less none, nats", ABOVE),
    "keeps-forgetting": Claim("RNA leaves accuracy on what is forgotten as it was", "Figure 1, Tables 2 to 5",
        f"forget accuracy, {GAIN}, points", Criterion("within", FORGET_MARGIN), POINTS),
    "keeps-retained": Claim("RNA leaves accuracy on what is kept as it was", "Figure 1, Tables 2 to 5",
        f"retain accuracy, {GAIN}, points", Criterion("within", RETAIN_MARGIN), POINTS),
    "perturbed-forget": Claim("RNA leaves what is forgotten forgotten where a forget-token stands in the question",
        "Figure 1, bottom left", f"accuracy on forget questions with a forget-token, {GAIN}, points",
        Criterion("within", FORGET_MARGIN), POINTS),
    "related": Claim("RNA raises accuracy on what is close in topic to the forgotten", "Figure 1",
        f"accuracy, {GAIN}, points", ABOVE, POINTS),
    "free": Claim("RNA costs no time", "Section 5",
        "time of training alone over that without RNA, less 1, %; n counts pairs of runs, order balanced",
        Criterion("below", TIME_MARGIN), POINTS),
    "coefficient": Claim("Robustness falls as c or β grows", "Figure 2",
        f"{TOKEN}, points for each doubling of c or β", BELOW, POINTS),
    "too-much-noise": Claim("With the greatest noise, robustness is below that at the chosen noise", "Figure 3",
        f"{TOKEN}, points", BELOW, POINTS),
    "noise-forgetting": Claim("With the greatest noise, forgetting stays as it was", "Figure 3",
        "forget accuracy, points", Criterion("within", FORGET_MARGIN), POINTS),
    "stable-to-noise": Claim("Representation methods are more stable to the noise than preference methods",
        "Section 6.2, Figure 3", f"change of {TOKEN} from no noise to the greatest that both have, preference less "
        "representation, points", BELOW, POINTS),
    "earlier-layers": Claim("Unlearning at an earlier layer is more robust", "Section 6.2",
        f"{TOKEN}, points for each layer further up", BELOW, POINTS),
    "single-layer": Claim("Noise at a single layer raises robustness", "Figure 8",
        f"{TOKEN}, {GAIN}, {MEAN}, points", ABOVE, POINTS),
    "region": Claim("Noise at three layers, early, middle or late, raises robustness", "Figure 9",
        f"{TOKEN}, {GAIN}, {MEAN}, points", ABOVE, POINTS),
    "all-layers": Claim("Noise at all layers, moderate, raises robustness", "Figure 10",
        f"{TOKEN}, {GAIN}, {MEAN}, points", ABOVE, POINTS),
    "all-layers-much": Claim("With more noise at all layers, robustness declines", "Figure 10",
        f"{TOKEN}, {MEAN}, points", BELOW, POINTS),
    "all-layers-kept": Claim("Noise at all layers leaves accuracy on what is kept as it was", "Figure 10",
        f"retain accuracy, {GAIN}, {MEAN}, points", Criterion("within", RETAIN_MARGIN), POINTS),
    "similarity": Claim("N-grams more like their document harm more", "Figure 4",
        "excess harm, most less least similar n-grams, nats", BELOW),
    "ngrams": Claim("RNA helps against n-grams too", "Tables 2 to 5",
        f"accuracy with an n-gram, {GAIN}, points", ABOVE, POINTS),
    "ngrams-mse": Claim("Against n-grams, RNA gains most with MSE retain losses", "Appendix D",
        f"accuracy with an n-gram, {GAIN}, MSE less KL methods, points", ABOVE, POINTS),
    "ngrams-representation": Claim("Against n-grams, representation methods gain little from RNA", "Appendix D",
        f"accuracy with an n-gram, {GAIN}, representation less preference methods, points", BELOW, POINTS),
    "sensitivity": Claim("Unlearned models are less sensitive to noise than the base, behind l", "Figure 7, Eq. 33",
        "ratio to the base's less 1", BELOW),
    "middle-layers": Claim("Sensitivity to noise falls most in the middle layers", "Figure 7, right",
        "ln of the ratio to the base's, middle third of the layers less another third", BELOW),
    "shift-mean": Claim("The shift that a forget-token causes has mean 0", "Assumption 4.1",
        "share of the shift's energy in its mean", ZERO, every=True),
    "output": Claim("At its size, the output's change is that of the first order, N(0, ηJᵀJ)", "Theorem 4.2",
        "part of the change that the first order misses, E‖Δ − Jε‖²/E‖Jε‖²", Criterion("below", FIRST_ORDER),
        every=True),
    "variety": Claim("A larger η gives more varied outputs", "Section 4.2",
        "ln of the ratio of tr Cov Δ, larger over smaller η", ABOVE, every=True),
    "closed-form": Claim("The printed closed form of Theorem 5.2 is the probability", "Theorem 5.2",
        "Monte Carlo less the printed form", ZERO, every=True),
    "rejection": Claim("Noise at l rejects a forget-token's effect as often as the theorem's exact form says",
        "Theorem 5.2", "observed probability less the exact form's", Criterion("within", PROBABILITY), every=True),
    "rejection-printed": Claim("Noise at l rejects a forget-token's effect as often as the theorem's printed form says",
        "Theorem 5.2", "observed probability less the printed form's", Criterion("within", PROBABILITY), every=True),
    "trace": Claim("The latent Hessian of the forget loss has a positive trace", "Eq. 9",
        "Tr ∇²ℓ at l, forget text", ABOVE, every=True),
    "backdoor": Claim("A forget-token moves a harmless question's state more than an unrelated word", "Section 5.1",
        "shift over ‖h‖, forget-token less unrelated word", ABOVE),
}
# fmt: on


@dataclass(frozen=True)
class Outcome:
    """One row of the verdicts.

    Attributes:
        claim: a key of `CLAIMS`; `of` says of which method, layer or length.
        found: ours, an estimate or the effect that it is of; None where the stage has not been run.
        paper: the paper's own number, as text; empty where it prints none.
        shown: further numbers to read beside it.
        measure: what the estimate is, where the claim's own words are too wide.
        undecided: why it is inconclusive, whatever the interval is; empty where the interval decides.
        whole: it stands for all rows of its claim.
    """

    claim: str
    of: str = ""
    found: Estimate | Effect | None = None
    paper: str = ""
    shown: str = ""
    measure: str = ""
    undecided: str = ""
    whole: bool = False

    @cached_property
    def estimate(self) -> Estimate | None:
        """Ours, with its interval."""
        return self.found.estimate() if isinstance(self.found, Effect) else self.found

    @property
    def finding(self) -> Finding:
        """What the interval allows to say."""
        return INCONCLUSIVE if self.undecided and self.estimate else judge(self.rule, self.estimate)

    @property
    def of_these(self) -> bool:
        """Whether it is said of the models at hand alone, as there are too few seeds to speak of others."""
        return self.estimate is not None and self.estimate.seeds is not None and self.estimate.seeds < FEWEST_SEEDS

    @property
    def rule(self) -> Criterion:
        """What it is judged by."""
        return CLAIMS[self.claim].rule

    def as_dict(self) -> dict[str, Any]:
        """All of it for JSON."""
        keys = ("claim", "of", "paper", "measure", "shown", "undecided", "finding", "of_these", "whole")
        numbers = {"rule": self.rule.text(), "estimate": self.estimate.as_dict() if self.estimate else None}
        measure = self.measure or CLAIMS[self.claim].measure
        return {key: getattr(self, key) for key in keys} | {"measure": measure} | numbers


def complete(rows: Iterable[Outcome]) -> list[Outcome]:
    """The rows in the order of the claims, the mean of several before them where the claim is about what happens on
    average; a claim without any gets one that says that it was not run.
    """
    rows = list(rows)
    done = []
    for claim in CLAIMS:
        of_claim = [each for each in rows if each.claim == claim]
        done += [*_pooled(claim, of_claim), *of_claim] or [Outcome(claim)]
    return done


def _pooled(claim: str, rows: Sequence[Outcome]) -> list[Outcome]:
    """The mean of a claim's rows, those left out that are undecided whatever their interval says."""
    used = [each for each in rows if each.estimate and each.estimate.low is not None and not each.undecided]
    if CLAIMS[claim].every or len(rows) < 2 or not used:
        return []
    effects = [each.found for each in used if isinstance(each.found, Effect)]
    found: Estimate | Effect | None = None
    if len(effects) == len(used):
        found = mean_effect(effects) or mean_of_sets(effects)
    found = found or mean_of_ends([each.estimate for each in used if each.estimate])
    if not found:
        return []
    few = f"fewer than half of the {len(rows)} rows decide" if 2 * len(used) < len(rows) else ""
    return [Outcome(claim, f"mean of {len(used)} of {len(rows)} rows", found, undecided=few, whole=True)]


def holm_findings(rows: Sequence[Outcome]) -> list[Finding]:
    """The rows' findings that stand after Holm's correction over them; those that do not are inconclusive."""
    pvalues = [p_of(each.rule, each.estimate) if each.estimate else 1.0 for each in rows]
    adjusted = paired.holm(pvalues)
    return [each.finding if p < paired.ALPHA else INCONCLUSIVE for each, p in zip(rows, adjusted, strict=True)]


def whole(rows: Sequence[Outcome]) -> Verdict:
    """The word for a claim as a whole; see `SUMMARY_RULE`."""
    single = [each for each in rows if not each.whole and each.finding != "not run"]
    if not single:
        return Verdict("not run")
    about = CLAIMS[single[0].claim]
    pooled = next((each for each in rows if each.whole), single[0])
    counts = Counter(holm_findings(single))
    there: list[Finding] = [word for word in ("holds", "does not hold") if counts[word]]
    if about.every:
        alone = {each.finding for each in single}
        finding: Finding = "holds" if alone == {"holds"} else there[-1] if counts["does not hold"] else INCONCLUSIVE
    elif len(there) == 2 or {pooled.finding, *there} >= {"holds", "does not hold"}:
        finding = there[0] if counts[there[0]] == len(single) else "mixed"
    elif there and counts[there[0]] == len(single):
        finding = there[0]
    else:
        finding = pooled.finding if pooled.whole or len(single) == 1 else INCONCLUSIVE
    return Verdict(finding, _note(pooled, counts, single), any(each.of_these for each in rows))


def _note(pooled: Outcome, counts: Counter[Finding], single: Sequence[Outcome]) -> str:
    """What a claim's word rests on: the mean of its rows, or its only row; the rows that stand after Holm; why not."""
    parts = []
    if pooled.estimate and (pooled.whole or len(single) == 1):
        cell = Column("", CLAIMS[pooled.claim].form, sized=True).cell(pooled.estimate)
        parts.append(f"{pooled.of}: {cell}" if pooled.of else cell)
    if len(single) > 1:
        words = [f"{word} in {counts[word]}" for word in ("holds", "does not hold") if counts[word]]
        parts.append(f"{', '.join(words) or 'no row decided'} of {len(single)} rows (Holm)")
    if pooled.undecided and (pooled.whole or len(single) == 1):
        parts.append(pooled.undecided)
    return "; ".join(parts)


def by_claim(rows: Sequence[Outcome]) -> dict[str, Verdict]:
    """Every claim -> the word for it."""
    return {claim: whole([each for each in rows if each.claim == claim]) for claim in CLAIMS}


def headline(rows: Sequence[Outcome]) -> str:
    """How many claims hold, in a sentence."""
    verdicts = by_claim(rows).values()
    counts = Counter(verdict.label for verdict in verdicts)
    words: dict[Finding, str] = {"holds": "hold", "does not hold": "do not hold", "mixed": "are mixed"}
    said = []
    for finding, verb in words.items():
        these = counts[Verdict(finding, of_these=True).label]
        said.append(f"{counts[finding]} {verb}" + (f" and {these} more of these models" if these else ""))
    return (
        f"Of {len(CLAIMS)} claims of the paper {', '.join(said)}, {counts[INCONCLUSIVE]} are inconclusive and "
        f"{counts['not run']} were not run. "
    )


def summary_table(rows: Sequence[Outcome]) -> Table:
    """A row for each claim."""
    cells = [[CLAIMS[claim].text, CLAIMS[claim].paper, verdict] for claim, verdict in by_claim(rows).items()]
    return Table.of("The paper's claims", ("claim", "in the paper", "here"), cells, SUMMARY_RULE)


def claim_table(claim: str, rows: Sequence[Outcome]) -> Table:
    """All rows of one claim: the paper's number, ours with its interval, the verdict."""
    about = CLAIMS[claim]
    rule = f"claimed: {about.rule.text(about.form.scale)}"
    columns: dict[str, str | Column] = {
        "of": "of", "paper": "paper", "here": Column("here, with 95 % interval", about.form, sized=True),
        "measure": "what that is", "shown": "beside it", "verdict": "verdict",
    }  # fmt: skip
    cells = [
        {
            "of": each.of or "all",
            "paper": each.paper,
            "here": each.estimate,
            "measure": each.measure or about.measure,
            "shown": each.shown,
            "verdict": Verdict(each.finding, each.undecided or (rule if each.estimate else ""), each.of_these),
        }
        for each in rows
        if each.claim == claim
    ]
    return Table(about.text, columns, cells)

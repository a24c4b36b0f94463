"""The paper's claims and what becomes of them: a rule on an interval, never on a point, and a word for each claim.

| rule | holds | does not hold |
|---|---|---|
| `above` m | the whole interval is above m | it is wholly below m |
| `below` m | it is wholly below m | it is wholly above m |
| `within` m | it lies inside −m to m | it lies wholly outside |
| `zero` | never: no interval proves a nought | it does not cover 0 |

In all other cases it is inconclusive. A number without an interval decides nothing, nor do fewer than `FEWEST`
observations, whatever their bootstrap says: that all five lie on one side happens to one in sixteen without any effect.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from robust_unlearning.report.tables import Column, Finding, Table, Verdict
from robust_unlearning.stats.estimates import Estimate
from robust_unlearning.stats.format import NATS, POINTS, NumberForm

Kind = Literal["above", "below", "within", "zero"]
FEWEST = 6
FORGET_MARGIN, RETAIN_MARGIN, TIME_MARGIN = 0.05, 0.03, 0.05
"""Changes of forget and of retain accuracy, and share of the time, below which something is said to stay as it was."""
FIRST_ORDER = 0.1
"""Share of the output's change that may be left unexplained where the first order is said to hold."""
PROBABILITY = 0.1
"""Distance of an observed probability from the theorem's at which it is said to be as the theorem says."""
RULE = (
    "A verdict rests on a 95 % interval and never on a point: a claim holds where the whole interval lies on the side "
    "that it says, does not hold where it lies wholly on the other, and cannot be told otherwise. That something stays "
    "as it was holds where the interval lies inside a margin that the row names; that something is exactly so can only "
    "be refuted. Fewer than six observations decide nothing. Intervals are of single rows: of twenty rows without an "
    "effect one is expected to look like one; and with few seeds the spread between seeds is underestimated."
)
SUMMARY_RULE = (
    "A claim as a whole: it holds where it holds in every row; it does not hold where it fails in one row at least and "
    "holds in none; otherwise it cannot be told, or it holds for some only, as the counts say."
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
    if low is None or high is None or 0 < estimate.n < FEWEST:
        return "cannot be told"
    if rule.kind == "zero":
        return "does not hold" if low > 0 or high < 0 else "cannot be told"
    if rule.kind == "within":
        inside, outside = -rule.margin < low and high < rule.margin, low > rule.margin or high < -rule.margin
    else:
        above, below = low > rule.margin, high < rule.margin
        inside, outside = (above, below) if rule.kind == "above" else (below, above)
    return "holds" if inside else "does not hold" if outside else "cannot be told"


@dataclass(frozen=True)
class Claim:
    """What the paper claims, and how it is judged.

    Attributes:
        text: what it says.
        paper: where the paper says it.
        measure: what the estimate is, with its unit.
        rule: what must be so of its interval.
        form: how its numbers are written.
    """

    text: str
    paper: str
    measure: str
    rule: Criterion
    form: NumberForm = NATS


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
    "mends": Claim("RNA wins it back also where both have forgotten as much", "Figure 1",
        "excess harm, RNA less none, nats", ABOVE),
    "keeps-forgetting": Claim("RNA leaves accuracy on what is forgotten as it was", "Figure 1, Tables 2 to 5",
        f"forget accuracy, {GAIN}, points", Criterion("within", FORGET_MARGIN), POINTS),
    "keeps-retained": Claim("RNA leaves accuracy on what is kept as it was", "Figure 1, Tables 2 to 5",
        f"retain accuracy, {GAIN}, points", Criterion("within", RETAIN_MARGIN), POINTS),
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
    "single-layer": Claim("Noise at a single layer, whichever, raises robustness", "Figure 8",
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
    "sensitivity": Claim("Unlearned models are less sensitive to noise than the base, behind l", "Figure 7, Eq. 33",
        "ratio to the base's less 1", BELOW),
    "shift-mean": Claim("The shift that a forget-token causes has mean 0", "Assumption 4.1",
        "share of the shift's energy in its mean", ZERO),
    "output": Claim("At its size, the output's change is that of the first order, N(0, ηJᵀJ)", "Theorem 4.2",
        "part of the change that the first order misses, E‖Δ − Jε‖²/E‖Jε‖²", Criterion("below", FIRST_ORDER)),
    "closed-form": Claim("The printed closed form of Theorem 5.2 is the probability", "Theorem 5.2",
        "Monte Carlo less the printed form", ZERO),
    "rejection": Claim("Noise at l rejects a forget-token's effect as often as the theorem says", "Theorem 5.2",
        "observed probability less the theorem's (exact form)", Criterion("within", PROBABILITY)),
    "trace": Claim("The latent Hessian of the forget loss has a positive trace", "Eq. 9",
        "Tr ∇²ℓ at l, forget text", ABOVE),
    "backdoor": Claim("A forget-token moves a harmless question's state more than an unrelated word", "Section 5.1",
        "shift over ‖h‖, forget-token less unrelated word", ABOVE),
}
# fmt: on


@dataclass(frozen=True)
class Outcome:
    """One row of the verdicts.

    Attributes:
        claim: a key of `CLAIMS`; `of` says of which method, layer or length.
        estimate: ours; None where the stage has not been run.
        paper: the paper's own number, as text; empty where it prints none.
        shown: further numbers to read beside it.
        measure: what the estimate is, where the claim's own words are too wide.
        undecided: why it is inconclusive, whatever the interval is; empty where the interval decides.
    """

    claim: str
    of: str = ""
    estimate: Estimate | None = None
    paper: str = ""
    shown: str = ""
    measure: str = ""
    undecided: str = ""

    @property
    def finding(self) -> Finding:
        """What the interval allows to say."""
        return "cannot be told" if self.undecided and self.estimate else judge(self.rule, self.estimate)

    @property
    def rule(self) -> Criterion:
        """What it is judged by."""
        return CLAIMS[self.claim].rule

    def as_dict(self) -> dict[str, Any]:
        """All of it for JSON."""
        keys = ("claim", "of", "paper", "measure", "shown", "undecided", "finding")
        numbers = {"rule": self.rule.text(), "estimate": self.estimate.as_dict() if self.estimate else None}
        measure = self.measure or CLAIMS[self.claim].measure
        return {key: getattr(self, key) for key in keys} | {"measure": measure} | numbers


def complete(rows: Iterable[Outcome]) -> list[Outcome]:
    """The rows in the order of the claims; a claim without any gets one that says that it was not run."""
    rows = list(rows)
    return [row for claim in CLAIMS for row in [each for each in rows if each.claim == claim] or [Outcome(claim)]]


def whole(rows: Sequence[Outcome]) -> Verdict:
    """The word for a claim as a whole; see `SUMMARY_RULE`."""
    counts = Counter(each.finding for each in rows)
    judged = len(rows) - counts["not run"]
    words: tuple[Finding, ...] = ("holds", "does not hold", "cannot be told")
    note = ", ".join(f"{word} in {counts[word]}" for word in words if counts[word]) + f" of {judged} rows"
    if not judged:
        return Verdict("not run")
    if counts["holds"] == judged:
        return Verdict("holds", note)
    if counts["does not hold"] and not counts["holds"]:
        return Verdict("does not hold", note)
    return Verdict("cannot be told", note)


def by_claim(rows: Sequence[Outcome]) -> dict[str, Verdict]:
    """Every claim -> the word for it."""
    return {claim: whole([each for each in rows if each.claim == claim]) for claim in CLAIMS}


def headline(rows: Sequence[Outcome]) -> str:
    """How many claims hold, in a sentence."""
    counts = Counter(verdict.finding for verdict in by_claim(rows).values())
    return (
        f"Of {len(CLAIMS)} claims of the paper {counts['holds']} hold here, {counts['does not hold']} do not, "
        f"{counts['cannot be told']} cannot be told and {counts['not run']} were not run."
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
            "verdict": Verdict(each.finding, each.undecided or (rule if each.estimate else "")),
        }
        for each in rows
        if each.claim == claim
    ]
    return Table(about.text, columns, cells)

"""What is said of a claim: a rule on an interval, never on a point.

| rule | holds | does not hold |
|---|---|---|
| `above` m | the whole interval is above m | it is wholly below m |
| `below` m | it is wholly below m | it is wholly above m |
| `within` m | it lies inside −m to m | it lies wholly outside |
| `zero` | never: no interval proves a nought | it does not cover 0 |

In all other cases it cannot be told. A number without an interval decides nothing, nor do fewer than `FEWEST`
observations, whatever their bootstrap says: that all five lie on one side happens to one in sixteen without any effect.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from robust_unlearning.report.blocks import Finding
from robust_unlearning.stats.estimates import Estimate

Kind = Literal["above", "below", "within", "zero"]
FEWEST = 6


@dataclass(frozen=True)
class Rule:
    """What must be so of an interval for a claim to hold; `margin` in the estimate's unit."""

    kind: Kind
    margin: float = 0.0

    def text(self, scale: float = 1.0) -> str:
        """In words, the margin shown in the unit of the estimate as it is shown."""
        limit = f"{scale * self.margin:g}"
        words = {"above": f"above {limit}", "below": f"below {limit}", "within": f"within ±{limit}", "zero": "0"}
        return words[self.kind]


def judge(rule: Rule, estimate: Estimate | None) -> Finding:
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
class Outcome:
    """One row of the verdicts.

    Attributes:
        claim: the claim's id; `of` says of which method, layer or length.
        paper: the paper's own number, as text; empty where it prints none.
        estimate: ours; None where the stage has not been run.
        measure: what the estimate is, with its unit.
        rule: what it is judged by.
        shown: further numbers to read beside it.
        scale: what the estimate is multiplied by to be shown.
        undecided: why it cannot be told, whatever the interval is; empty where the interval decides.
    """

    claim: str
    of: str
    paper: str
    estimate: Estimate | None
    measure: str
    rule: Rule
    shown: str = ""
    scale: float = 1.0
    undecided: str = ""

    @property
    def finding(self) -> Finding:
        """What the interval allows to say."""
        return "cannot be told" if self.undecided and self.estimate else judge(self.rule, self.estimate)

    def as_dict(self) -> dict[str, Any]:
        """All of it for JSON."""
        own = {key: getattr(self, key) for key in ("claim", "of", "paper", "measure", "shown", "undecided", "finding")}
        estimate = self.estimate.as_dict() if self.estimate else None
        return {**own, "rule": self.rule.text(), "estimate": estimate}

"""All claims of a target, judged: one list of outcomes from what its stages have found, and a word for each claim."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from robust_unlearning.report.blocks import Finding, Table, Verdict
from robust_unlearning.reproduce.claims import (
    CLAIMS,
    all_layer_claims,
    coefficient_claims,
    layer_claims,
    main_claims,
    noise_claims,
)
from robust_unlearning.reproduce.claims_theory import backdoor_claims, ngram_claims, sensitivity_claims, theory_claims
from robust_unlearning.reproduce.results import Grid
from robust_unlearning.reproduce.run import Found
from robust_unlearning.reproduce.target import Target, main_name
from robust_unlearning.reproduce.verdict import Outcome
from robust_unlearning.stats.estimates import Estimate

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


def outcomes(target: Target, found: Found) -> list[Outcome]:
    """Every row, in the order of the claims; a claim whose stage is not done has one row that says so."""

    def grid(name: str) -> Grid | None:
        return found.grids.get(name)

    main = grid(main_name(target))

    def analysis(kind: str) -> dict[str, object] | None:
        name = next((key for key, stage in target.stages.items() if stage.kind == kind), "")
        return found.analyses.get(name)

    rows = [
        *main_claims(main, found.chosen),
        *coefficient_claims(grid("figure2")),
        *noise_claims(grid("figure3") if "figure3" in target.stages else main, found.chosen),
        *layer_claims(grid("figure8"), "single-layer"),
        *layer_claims(grid("figure9"), "region"),
        *all_layer_claims(grid("figure10")),
        *ngram_claims(analysis("ngrams")),
        *sensitivity_claims(analysis("noise-sensitivity")),
        *theory_claims(analysis("theory")),
        *backdoor_claims(analysis("activations")),
    ]
    order = list(CLAIMS)
    return sorted(rows, key=lambda each: order.index(each.claim))


def headline(rows: Sequence[Outcome]) -> str:
    """How many claims hold, in a sentence."""
    counts = Counter(whole([each for each in rows if each.claim == claim]).finding for claim in CLAIMS)
    return (
        f"Of {len(CLAIMS)} claims of the paper {counts['holds']} hold here, {counts['does not hold']} do not, "
        f"{counts['cannot be told']} cannot be told and {counts['not run']} were not run."
    )


def whole(rows: Sequence[Outcome]) -> Verdict:
    """The word for a claim as a whole; see `SUMMARY_RULE`."""
    counts = Counter(each.finding for each in rows)
    told = len(rows) - counts["not run"]
    words: tuple[Finding, ...] = ("holds", "does not hold", "cannot be told")
    note = ", ".join(f"{word} in {counts[word]}" for word in words if counts[word])
    note = f"{note} of {told} rows"
    if not told:
        return Verdict("not run")
    if counts["holds"] == told:
        return Verdict("holds", note)
    if counts["does not hold"] and not counts["holds"]:
        return Verdict("does not hold", note)
    return Verdict("cannot be told", note)


def summary_table(rows: Sequence[Outcome]) -> Table:
    """A row for each claim."""
    cells: list[list[str | Verdict]] = []
    for claim, (text, where) in CLAIMS.items():
        own = [each for each in rows if each.claim == claim]
        cells.append([text, where, whole(own)] if own else [text, where, Verdict("not run")])
    return Table("The paper's claims", ("claim", "in the paper", "here"), cells, SUMMARY_RULE)


def claim_table(claim: str, rows: Sequence[Outcome]) -> Table:
    """All rows of one claim: the paper's number, ours with its interval, the verdict."""
    own = [each for each in rows if each.claim == claim]
    cells: list[list[str | Verdict]] = [
        [each.of or "all", each.paper, number(each.estimate, each.scale), each.measure, each.shown,
         Verdict(each.finding, each.undecided or (f"claimed: {each.rule.text(each.scale)}" if each.estimate else ""))]
        for each in own
    ]  # fmt: skip
    headers = ("of", "paper", "here, with 95 % interval", "what that is", "beside it", "verdict")
    return Table(CLAIMS[claim][0], headers, cells)


def number(estimate: Estimate | None, scale: float = 1.0) -> str:
    """An estimate with its interval and the sizes it rests on."""
    if estimate is None:
        return ""
    if estimate.value is None:
        return estimate.note or "undefined"
    form = "+.1f" if scale != 1 else "+.3f"
    text = f"{scale * estimate.value:{form}}"
    if estimate.low is not None and estimate.high is not None:
        text += f" [{scale * estimate.low:{form}}, {scale * estimate.high:{form}}]"
    sizes = [f"{estimate.seeds} seed{'s' * (estimate.seeds > 1)}"] if estimate.seeds else []
    sizes += [f"n={estimate.n}"] if estimate.n else []
    return f"{text} ({', '.join(sizes)})" if sizes else text

"""The table of scores in the terminal."""

from __future__ import annotations

from robust_unlearning.evaluate.score_table import format_scores
from robust_unlearning.evaluate.suite import accuracy_score
from robust_unlearning.stats.estimates import Estimate, accuracy


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

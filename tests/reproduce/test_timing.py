"""Time with RNA over that without: the order is balanced, and what the order costs shows in no verdict."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
import torch

from robust_unlearning import files
from robust_unlearning.errors import UserError
from robust_unlearning.reproduce import timing
from robust_unlearning.reproduce.claims_on_analyses import time_claims
from robust_unlearning.reproduce.estimate import make_plan
from robust_unlearning.reproduce.run import run
from robust_unlearning.reproduce.target import Stage, load_target
from robust_unlearning.reproduce.timing import Pair, clock_of, measure, steps_of, timed_pairs
from robust_unlearning.reproduce.verdicts import CLAIMS, judge
from robust_unlearning.stats.estimates import Estimate
from robust_unlearning.stats.ratios import mean_excess


class Turns:
    """Runs whose turns take what they are told to."""

    def __init__(self, rng: np.random.Generator | None = None, *, slow: float = 1.0, first: float = 1.0) -> None:
        self.rng, self.slow, self.first = rng, slow, first
        self.order = ""

    def take(self, side: str, seconds: float) -> float:
        self.order += side
        opens = len(self.order) % 2 == 1  # of a pair; the two that are thrown away are one too
        noise = np.exp(self.rng.normal(0, 0.02)) if self.rng else 1.0
        return seconds * noise * (self.first if opens else 1.0)

    def pairs(self, count: int) -> list[Pair]:
        return timed_pairs(lambda: self.take("A", 1.0), lambda: self.take("B", self.slow), count)


def _excess(pairs: list[Pair]) -> Estimate:
    return mean_excess([pair.log_ratio for pair in pairs])


@pytest.mark.unit
def test_the_order_is_balanced_after_one_turn_of_each() -> None:
    turns = Turns()
    pairs = turns.pairs(4)
    assert turns.order == "AB" + "ABBAABBA"
    assert [pair.plain_first for pair in pairs] == [True, False, True, False]
    assert {pair.log_ratio for pair in pairs} == {0.0}


@pytest.mark.unit
def test_what_the_first_of_a_pair_pays_more_is_not_rna() -> None:
    pairs = Turns(first=1.3).pairs(8)
    found = _excess(pairs)
    assert found.value == pytest.approx(0.0)
    assert found.low is not None
    assert found.high is not None
    assert found.low < 0 < found.high
    assert judge(CLAIMS["free"].rule, found) not in ("holds", "does not hold")
    one_order = mean_excess([pair.log_ratio for pair in pairs if pair.plain_first])
    assert one_order.value == pytest.approx(1 / 1.3 - 1)  # what "RNA is faster" rested on


@pytest.mark.unit
def test_like_work_covers_nought_and_slower_work_is_found() -> None:
    rng = np.random.default_rng(3)
    like, slower = _excess(Turns(rng).pairs(8)), _excess(Turns(rng, slow=1.25).pairs(8))
    assert like.low is not None
    assert like.high is not None
    assert like.low < 0 < like.high
    assert slower.low is not None
    assert slower.low > 0.15
    assert (judge(CLAIMS["free"].rule, like), judge(CLAIMS["free"].rule, slower)) == ("holds", "does not hold")


@pytest.mark.unit
def test_claims_and_clock() -> None:
    row = {"title": "RMU", "noise": 3.0, "excess": Estimate(0.02, 0.01, 0.03, 0.005, 8).as_dict()}
    (found,) = time_claims({"tables": {"ratios": [row]}})
    assert (found.claim, found.of, found.paper, found.finding) == ("free", "RMU, noise 3", "none", "holds")
    clock, says = clock_of(torch.device("cpu"))
    assert clock is time.process_time
    assert "process_time" in says
    assert "perf_counter" in clock_of(torch.device("cuda"))[1]


@pytest.mark.unit
def test_wrong_stages(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="pairs: input should be a multiple of 2"):
        load_target("tiny", ["stages.time.pairs=5"])
    target = load_target("tiny", ["stages.time.recipes=[tiny/nothing]"])
    with pytest.raises(UserError, match="'main', does not train tiny/nothing both"):
        measure(target, target.stages["time"], {}, tmp_path, lambda _: None)


@pytest.mark.parametrize(("chosen", "noise"), [({}, 3.0), ({"tiny/rmu": 10.0}, 10.0)])
def test_a_stage_whole(chosen: dict[str, float], noise: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["set.batch_size=2", "stages.time.recipes=[tiny/rmu]", "stages.time.pairs=2", "stages.time.steps=1"]
    target = load_target("tiny", words)
    stage: Stage = target.stages["time"]
    ticks = iter(range(10**6))
    monkeypatch.setattr(timing, "clock_of", lambda device: (lambda: float(next(ticks)), "Seconds are ticks."))
    data = measure(target, stage, chosen, tmp_path / "stages" / "time", lambda _: None)
    (ratio,) = data["tables"]["ratios"]
    assert (ratio["title"], ratio["noise"], ratio["pairs"]) == ("RMU", noise, 2)
    assert ratio["excess"]["value"] == 0  # a clock that ticks once a reading: both read it as often
    assert [each["first"] for each in data["tables"]["pairs"]] == ["without", "with RNA"]
    assert {each["plain"] for each in data["tables"]["pairs"]} == {2.0}
    assert data["about"]["clock"] == "Seconds are ticks."
    assert "Student" in (tmp_path / "stages" / "time" / "analysis" / "time.md").read_text(encoding="utf-8")


def test_the_stage_runs_without_the_main_one_and_is_planned(tmp_path: Path) -> None:
    target = load_target("tiny", ["set.batch_size=2", "limit=2", "stages.time.pairs=2", "stages.time.steps=1"])
    stages = {"time": target.stages["time"]}
    (row,) = make_plan(target, stages, tmp_path, None)
    assert row.steps == 2 * steps_of(stages["time"]) == 2 * 6
    assert row.prompts == 0
    said: list[str] = []
    results = run(target, stages, tmp_path, said.append, lambda _: None)
    assert results.states["time"]["status"] == "finished"
    assert [each["noise"] for each in results.analyses["time"]["tables"]["ratios"]] == [3.0, 3.0]
    assert files.read_json(tmp_path / "stages" / "time" / "result.json")["name"] == "time"

"""Who pays for a step in lockstep: shared work is divided by its users, whoever asked first."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from training_runs import same, tensors_of

from robust_unlearning import load_recipe
from robust_unlearning.methods import noise
from robust_unlearning.run.folder import RunFolder
from robust_unlearning.train.ledger import Ledger
from robust_unlearning.train.trainer import Trainer


class Fake:
    """A clock that goes on only when told."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def works(self, seconds: float) -> None:
        self.now += seconds


@pytest.mark.unit
@pytest.mark.parametrize("order", ["ab", "ba"])
def test_the_first_pays_no_more_than_the_others(order: str) -> None:
    clock = Fake()
    ledger = Ledger(clock)
    ledger.begin(2)
    known: set[str] = set()

    def once(key: str, seconds: float, inner: Callable[[], None] = lambda: None) -> None:
        with ledger.part(key):
            if key not in known:
                known.add(key)
                inner()
                clock.works(seconds)

    with ledger.part("batch"):
        clock.works(2.0)
    clock.works(100.0)  # outside of all parts
    for name in order:
        with ledger.part(name, "batch"):
            once("trunk", 8.0)
            clock.works({"a": 3.0, "b": 5.0}[name])
            once("states", 4.0, lambda: once("trunk", 8.0))
            if name == "b":
                once("tail", 6.0, lambda: once("states", 4.0))
        with ledger.part("noting"):
            clock.works(50.0)
    # each half of 2 + 8 + 4, own 3 and 5, and b alone has asked for the tail
    assert ledger.bill("ab") == {"a": pytest.approx(10.0), "b": pytest.approx(18.0)}


@pytest.mark.unit
def test_what_a_part_was_made_of_is_used_by_all_its_users() -> None:
    clock = Fake()
    ledger = Ledger(clock)
    ledger.begin(2)
    with ledger.part("a"), ledger.part("outer"), ledger.part("inner"):
        clock.works(6.0)
    with ledger.part("b"), ledger.part("outer"):
        pass  # known; it does not ask for the inner one again
    assert ledger.bill(["a", "b"]) == {"a": 3.0, "b": 3.0}
    ledger.begin(1)
    with ledger.part("b"), ledger.part("outer"):
        clock.works(1.0)
    assert ledger.bill(["b"]) == {"b": 1.0}


NOISES: dict[str, dict[str, Any]] = {"plain": {}, "small": {"noise_std": 0.1}, "great": {"noise_std": 0.3}}


def _train(
    recipe: dict[str, Any], order: Sequence[str], out: Path, monkeypatch: pytest.MonkeyPatch
) -> dict[str, RunFolder]:
    """Run candidates side by side in an order, on a clock by which trunk, reference and draw take 100, 10 and 1 s."""
    clock = Fake()
    runs = {name: RunFolder.open(out / name, load_recipe({**recipe, **NOISES[name]})) for name in order}
    trainer = Trainer(list(runs.values()), clock=clock)

    def costs(patched: pytest.MonkeyPatch, owner: object, name: str, seconds: float) -> None:
        ours = getattr(owner, name)

        def costly(*given: Any, **options: Any) -> Any:
            clock.works(seconds)
            return ours(*given, **options)

        patched.setattr(owner, name, costly)

    with monkeypatch.context() as patched:
        costs(patched, trainer.engine, "trunk", 100.0)
        costs(patched, trainer.engine, "reference", 10.0)
        costs(patched, noise, "_normal", 1.0)
        trainer.train()
    return runs


def test_lockstep_shares_out_what_is_done_once_whoever_comes_first(
    tiny_recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = {**tiny_recipe, "steps": 2}
    there = _train(recipe, ["plain", "small", "great"], tmp_path / "there", monkeypatch)
    back = _train(recipe, ["great", "small", "plain"], tmp_path / "back", monkeypatch)
    # two trunks a step, and the reference of retain text, by all three; a draw by the two with noise
    common = 2 * (2 * 100 + 10) / 3
    expected = {"plain": common, "small": common + 2 * 1 / 2, "great": common + 2 * 1 / 2}
    for runs in (there, back):
        seconds = {name: run.record["seconds"]["train"] for name, run in runs.items()}
        assert seconds == {name: pytest.approx(value) for name, value in expected.items()}
        assert {name: run.rows()[-1]["seconds"] for name, run in runs.items()} == seconds
    assert all(same(tensors_of(there[name]), tensors_of(back[name])) for name in NOISES)


def test_a_run_alone_pays_for_everything(
    tiny_recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = _train({**tiny_recipe, "steps": 1}, ["small"], tmp_path, monkeypatch)
    assert runs["small"].record["seconds"]["train"] == 2 * 100 + 10 + 1

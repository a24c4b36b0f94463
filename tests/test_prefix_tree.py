"""Packs: every sequence can be read off its way from the root, and nothing is laid out twice."""

from __future__ import annotations

import random

import pytest

from robust_unlearning import prefix_tree
from robust_unlearning.prefix_tree import Tokens, packs, shared_length


def some_sequences(seed: int) -> dict[Tokens, int]:
    """Sequences over three tokens, so that they share a lot, some behind headers; and where each is wanted from."""
    draw = random.Random(seed)
    headers = [(), (7,) * 12, tuple(draw.choices((0, 1, 2), k=12))]
    sequences = {
        draw.choice(headers) + tuple(draw.choices((0, 1, 2), k=draw.randint(1, 9))) for _ in range(draw.randint(1, 60))
    }
    return {each: draw.randrange(len(each)) if draw.random() < 0.3 else len(each) - 1 for each in sequences}


@pytest.mark.parametrize("seed", range(30))
def test_packs(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefix_tree, "STEM", 6)
    starts = some_sequences(seed)
    budget = 25
    seen: list[Tokens] = []
    for pack in packs(starts, budget):
        depth = len(pack.stem)
        laid: set[Tokens] = set()
        for sequence, path in pack.paths.items():
            seen.append(sequence)
            assert sequence == pack.stem + tuple(pack.ids[place] for place in path)
            assert [pack.positions[place] for place in path] == list(range(depth, len(sequence)))
            assert depth <= starts[sequence]  # what is wanted is not in the stem
            laid |= {sequence[: depth + length] for length in range(1, len(path) + 1)}
        assert len(pack.ids) == len(laid)  # each beginning once
        assert len(pack.ids) <= budget or len(pack.paths) == 1
        for first, last, parent in pack.branches:
            assert first < last
            assert (parent is None) == (pack.positions[first] == depth)
            assert parent is None or parent < first
    assert sorted(seen) == sorted(starts)


def test_a_header_is_a_stem_where_it_would_be_laid_out_often() -> None:
    header = tuple(range(prefix_tree.STEM))
    starts = {(*header, token, token): len(header) + 1 for token in range(50)}
    assert {each.stem for each in packs(starts, budget=20)} == {header}
    (one,) = packs(starts, budget=500)
    assert one.stem == ()
    assert len(one.ids) == len(header) + 100


def test_shared_length() -> None:
    assert shared_length((1, 2, 3), (1, 2, 4, 5)) == 2
    assert shared_length((1, 2), (1, 2, 3)) == 2
    assert shared_length((), (1,)) == 0
    assert list(packs({}, 10)) == []

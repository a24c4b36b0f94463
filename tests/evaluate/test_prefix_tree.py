"""Trees: every sequence can be read off its way from the root, and little is laid out twice."""

from __future__ import annotations

import random

import pytest

from robust_unlearning.evaluate import prefix_tree
from robust_unlearning.evaluate.prefix_tree import Tokens, Tree, batches, padded, shared_length


def some_sequences(seed: int) -> dict[Tokens, int]:
    """Sequences over three tokens, so that they share a lot, some behind headers; and where each is wanted from."""
    draw = random.Random(seed)
    headers = [(), (7,) * 12, tuple(draw.choices((0, 1, 2), k=12))]
    sequences = {
        draw.choice(headers) + tuple(draw.choices((0, 1, 2), k=draw.randint(1, 9))) for _ in range(draw.randint(1, 60))
    }
    return {each: draw.randrange(len(each)) if draw.random() < 0.3 else len(each) - 1 for each in sequences}


def check_tree(tree: Tree, starts: dict[Tokens, int]) -> None:
    """Its sequences stand on their ways from the root, each of their beginnings once."""
    depth = len(tree.stem)
    laid: set[Tokens] = set()
    for sequence, path in tree.paths.items():
        assert sequence == tree.stem + tuple(tree.ids[place] for place in path)
        assert [tree.positions[place] for place in path] == list(range(depth, len(sequence)))
        assert depth <= starts[sequence]  # what is wanted is not in the stem
        laid |= {sequence[: depth + length] for length in range(1, len(path) + 1)}
    assert len(tree.ids) == len(laid)
    for first, last, parent in tree.branches:
        assert first < last
        assert (parent is None) == (tree.positions[first] == depth)
        assert parent is None or parent < first


@pytest.mark.parametrize("seed", range(30))
def test_batches(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefix_tree, "PASS", 6)
    starts = some_sequences(seed)
    budget = 25
    seen: list[Tokens] = []
    stems: list[Tokens] = []
    for batch in batches(starts, budget):
        stems.append(batch[0].stem)
        assert {tree.stem for tree in batch} == {batch[0].stem}
        assert padded(batch) <= budget or [len(tree.paths) for tree in batch] == [1]
        for tree in batch:
            check_tree(tree, starts)
            seen += tree.paths
    assert sorted(seen) == sorted(starts)
    assert len(set(stems)) == sum(a != b for a, b in zip(stems, [None, *stems], strict=False))  # one after the other


def test_a_heading_is_a_stem_where_that_saves_a_pass() -> None:
    heading = tuple(range(20))
    starts = {(*heading, token, *range(40 * token, 40 * token + 40)): 60 for token in range(50)}
    assert {batch[0].stem for batch in batches(starts, budget=200)} == {heading}
    assert sum(map(padded, batches(starts, budget=200))) == 50 * 41
    few = dict(list(starts.items())[:3])
    assert {batch[0].stem for batch in batches(few, budget=200)} == {()}


def test_the_stem_is_the_one_that_runs_the_fewest_tokens() -> None:
    """Two subjects behind headings of their own, which begin alike: a stem each, not the few tokens of both."""
    starts = {
        (*range(10), *range(100 * subject, 100 * subject + 30), *range(1000 * token, 1000 * token + 50)): 80
        for subject in (1, 2)
        for token in range(1, 30)
    }
    assert sorted(len(stem) for stem in {batch[0].stem for batch in batches(starts, budget=200)}) == [40, 40]


def test_forms_of_a_question_are_a_tree_and_unlike_questions_are_not() -> None:
    questions = [tuple(range(100 * number, 100 * number + 30)) for number in range(1, 9)]
    forms = {(*each, option, 1): 31 for each in questions for option in (7, 8)}
    (batch,) = batches(forms, budget=400)
    assert [len(tree.paths) for tree in batch] == [2] * 8
    assert padded(batch) == 8 * 34


def test_shared_length() -> None:
    assert shared_length((1, 2, 3), (1, 2, 4, 5)) == 2
    assert shared_length((1, 2), (1, 2, 3)) == 2
    assert shared_length((), (1,)) == 0
    assert list(batches({}, 10)) == []

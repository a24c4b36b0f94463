"""Token sequences laid out so that what several of them begin with is there once.

Sequences that share a good part of their tokens (a question's clean and perturbed forms, its answers) form a tree:
every token stands behind the one before it, and two sequences share their tokens up to the place where they part. A
tree is run as one row, in which a token sees only the tokens on its own way from the root; so each sequence gets the
logits that it would get alone. Trees of like size make up a batch.

What many trees begin with (a heading, worked examples, a passage) is put in a stem: it is run once, and its key-value
cache is kept for all of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise, takewhile

Tokens = tuple[int, ...]
PASS = 64
"""What a pass of its own costs, in tokens: a stem has to save more, and a batch holds no more padding than that."""
TREE = 512
"""Most tokens of a tree of several sequences: attention inside a tree grows with the square of its size."""
TOGETHER = 8
"""A sequence that shares so many tokens, or a quarter of its own, with its neighbour joins the neighbour's tree."""
LEAST = (4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 1024, 2048)
"""How much sequences may have to share to have a stem in common: what runs the fewest tokens is taken."""


@dataclass
class Tree:
    """One row of tokens behind a stem.

    Attributes:
        ids: the tokens.
        positions: the place of each in its own sequence, the stem counted.
        branches: (first, last + 1, parent) of each piece of new tokens; parent is the place in the row of the
            token that it stands behind, None for one that stands behind the stem.
        paths: sequence -> places in the row of its tokens from the stem on.
    """

    stem: Tokens = ()
    ids: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    branches: list[tuple[int, int, int | None]] = field(default_factory=list)
    paths: dict[Tokens, list[int]] = field(default_factory=dict)

    def add(self, sequence: Tokens, shared: int) -> None:
        """Lay out a sequence that shares its first `shared` tokens, the stem included, with the one added last."""
        path = list(self.paths.values())[-1][: shared - len(self.stem)] if self.paths else []
        first = len(self.ids)
        self.ids += sequence[shared:]
        self.positions += range(shared, len(sequence))
        self.branches.append((first, len(self.ids), path[-1] if path else None))
        self.paths[sequence] = path + list(range(first, len(self.ids)))


def batches(starts: Mapping[Tokens, int], budget: int) -> Iterator[list[Tree]]:
    """All sequences as trees, in batches of one stem each, the largest trees first; those of a stem follow one another.

    Args:
        starts: sequence -> place of its first token whose logits are wanted. That token is never in a stem.
        budget: most tokens of a batch, padding counted, except one that holds a single sequence.
    """
    if not starts:
        return
    ordered = sorted(starts)
    shared = [0, *(shared_length(a, b) for a, b in pairwise(ordered))]
    layout = _Layout(list(map(len, ordered)), shared, [starts[each] for each in ordered], min(budget, TREE))
    loose: list[Tree] = []
    for stem, pieces in layout.groups():
        trees = []
        for first, last in pieces:
            trees.append(Tree(ordered[first][:stem]))
            for index in range(first, last):
                trees[-1].add(ordered[index], stem if index == first else shared[index])
        if stem:
            yield from _filled(trees, budget)
        else:
            loose += trees
    yield from _filled(loose, budget)


def padded(batch: Sequence[Tree]) -> int:
    """Tokens of a batch, padding counted."""
    return len(batch) * max(len(each.ids) for each in batch)


def shared_length(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two sequences begin with in common."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))


Pieces = list[tuple[int, int]]
"""(first, last + 1) of the sequences of each tree."""


@dataclass(frozen=True)
class _Layout:
    """Which of the sorted sequences share a stem, and which a tree.

    Attributes:
        lengths, starts: of each sequence, its tokens and the first place that is wanted.
        shared: of each sequence, how many tokens it begins with in common with the one before it.
        most: tokens of a tree of several sequences.
    """

    lengths: list[int]
    shared: list[int]
    starts: list[int]
    most: int

    def groups(self) -> list[tuple[int, Pieces]]:
        """(tokens of the stem, trees behind it), 0 tokens for trees without a stem."""
        grouped = [self._grouped(least) for least in LEAST]
        return min(grouped, key=lambda groups: sum(self._cost(*group) for group in groups))

    def _grouped(self, least: int) -> list[tuple[int, Pieces]]:
        """Sequences that share at least so many tokens have a stem, where that is worth its pass."""
        borders = [index for index, shared in enumerate(self.shared) if shared < least] + [len(self.lengths)]
        groups = []
        for first, last in pairwise(borders):
            stem = min([*self.shared[first + 1 : last], *self.starts[first:last]])
            choices = [(0, self._pieces(first, last, 0)), (stem, self._pieces(first, last, stem))]
            groups.append(min(choices, key=lambda group: self._cost(*group)))
        return groups

    def _pieces(self, first: int, last: int, stem: int) -> Pieces:
        """Neighbours that share enough behind the stem are a tree, as long as it does not grow too large."""
        pieces, begin, size = [], first, 0
        for index in range(first, last):
            length, shared = self.lengths[index] - stem, self.shared[index] - stem
            if index > begin and (4 * shared < min(length, 4 * TOGETHER) or size + length - shared > self.most):
                pieces.append((begin, index))
                begin = index
            size = length if index == begin else size + length - shared
        return [*pieces, (begin, last)]

    def _cost(self, stem: int, pieces: Pieces) -> int:
        """Tokens run for a group, its stem's pass counted."""
        return sum(self._size(piece, stem) for piece in pieces) + (stem + PASS if stem else 0)

    def _size(self, piece: tuple[int, int], stem: int) -> int:
        first, last = piece
        return sum(self.lengths[first:last]) - stem - sum(self.shared[first + 1 : last])


def _filled(trees: Iterable[Tree], budget: int) -> Iterator[list[Tree]]:
    """Trees of like size together, as many as the budget holds."""
    batch: list[Tree] = []
    padding = 0
    for tree in sorted(trees, key=lambda each: -len(each.ids)):
        padding += len(batch[0].ids) - len(tree.ids) if batch else 0
        if batch and (padding > PASS or (len(batch) + 1) * len(batch[0].ids) > budget):
            yield batch
            batch, padding = [], 0
        batch.append(tree)
    if batch:
        yield batch

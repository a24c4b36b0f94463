"""Token sequences laid out so that what several of them begin with is there once.

The sequences of a pack form a tree: every token stands behind the one before it, and two sequences share their
tokens up to the place where they part. A pack is run as one row, in which a token sees only the tokens on its own
way from the root; so each sequence gets the logits that it would get alone, and nothing is padded. In order of
their tokens, a sequence shares most with its neighbour, so a pack is filled from sorted sequences.

Sequences that begin with the same long text (a few-shot header, a passage) and fill more than one pack are put
behind a stem: it is run once, and its key-value cache is kept for all their packs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise, takewhile

Tokens = tuple[int, ...]
STEM = 64
"""A shared beginning of at least so many tokens may be a stem. Shorter ones are laid out again in every pack."""


@dataclass
class Pack:
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


def packs(starts: Mapping[Tokens, int], budget: int) -> Iterator[Pack]:
    """The packs of all sequences; those of one stem follow one another.

    Args:
        starts: sequence -> place of its first token whose logits are wanted. That token is never in a stem.
        budget: most tokens of a pack, except one that holds a single sequence.
    """
    loose: list[Tokens] = []
    for group in _groups(sorted(starts)):
        stem = min(shared_length(group[0], group[-1]), *(starts[each] for each in group))
        if stem >= STEM and _size(group, stem) > budget:
            yield from _filled(group, group[0][:stem], budget)
        else:
            loose += group
    yield from _filled(loose, (), budget)


def shared_length(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two sequences begin with in common."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))


def _groups(ordered: list[Tokens]) -> Iterator[list[Tokens]]:
    """Runs of neighbours that share at least `STEM` tokens."""
    group = ordered[:1]
    for one, other in pairwise(ordered):
        if shared_length(one, other) < STEM:
            yield group
            group = []
        group.append(other)
    if group:
        yield group


def _size(ordered: list[Tokens], stem: int) -> int:
    """Tokens that a pack of these sequences holds."""
    return len(ordered[0]) - stem + sum(len(b) - shared_length(a, b) for a, b in pairwise(ordered))


def _filled(ordered: list[Tokens], stem: Tokens, budget: int) -> Iterator[Pack]:
    """Sorted sequences in packs, each filled as far as the budget goes."""
    pack = Pack(stem)
    last: Tokens = ()
    for sequence in ordered:
        shared = shared_length(last, sequence) if pack.paths else len(stem)
        if pack.paths and len(pack.ids) + len(sequence) - shared > budget:
            yield pack
            pack, shared = Pack(stem), len(stem)
        pack.add(sequence, shared)
        last = sequence
    if pack.paths:
        yield pack

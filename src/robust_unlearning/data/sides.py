"""What a topic's batches are made of: its forget texts, its retain texts, and refusals, alone or after forget text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch

from robust_unlearning.data.corpora import Corpus, Sequences, TokenBatch, read_documents
from robust_unlearning.recipe import Recipe, TextSource


class Continued(Sequences):
    """Refusals, each after the forget sequence that stands at the same place of its own batch.

    Sequence p is the beginning of the forget sequence at position p of its corpus's stream, then the refusal at
    position p of its: as a step pairs them. The forget sequence is cut at its end until both fit into `max_tokens`
    (a refusal longer than that is cut too, so that one token of forget text is left); it is given, and only the
    refusal's tokens are predicted. Nothing is put between the two.

    Args:
        refusals: tokenised without the tokenizer's own tokens, as they do not begin a sequence.
    """

    def __init__(self, forget: Corpus, refusals: Corpus, max_tokens: int) -> None:
        self.forget, self.refusals, self.max_tokens = forget, refusals, max_tokens
        self.pad, self.batch_size, self.size = forget.pad, forget.batch_size, None
        self.documents, self.fingerprint = refusals.documents, refusals.fingerprint

    @property
    def identity(self) -> object:
        """Both corpora with their orders, which say what is paired with what, and where forget text is cut."""
        parts = [(corpus.order, corpus.seed, corpus.rows) for corpus in (self.forget, self.refusals)]
        return "refusals after forget text", self.max_tokens, parts

    def _parts(self, index: int) -> tuple[list[int], list[int]]:
        refusal = self.refusals.row(self.refusals.at(index))[: self.max_tokens - 1]
        return self.forget.row(self.forget.at(index))[: self.max_tokens - len(refusal)], refusal

    def row(self, index: int) -> list[int]:
        """Forget tokens and the refusal's."""
        forget, refusal = self._parts(index)
        return forget + refusal

    def given(self, index: int) -> int:
        """How many forget tokens there are."""
        return len(self._parts(index)[0])

    def row_indices(self, number: int) -> list[int]:
        """The positions that batch `number` holds."""
        return list(range(number * self.batch_size, (number + 1) * self.batch_size))

    def collated(self, indices: Sequence[int]) -> TokenBatch:
        """These sequences, padded on the right, each with what is given of it."""
        return replace(super().collated(indices), given=torch.tensor([self.given(index) for index in indices]))


def source_of(recipe: Recipe, topic: str, side: str) -> TextSource:
    """Where a topic's `forget`, `retain` or `refusals` lie: the topic's own, or the recipe's."""
    source = getattr(recipe.topics[topic], side, None) or getattr(recipe, side)
    assert source is not None  # load_recipe has seen to it
    return source


def read_corpora(recipe: Recipe, topic: str, sides: Iterable[str], tokenizer: Any) -> dict[str, Sequences]:
    """A topic's `forget`, `retain` and `refusals`, those that are asked for, tokenised.

    With `refusal_after: forget_text` its refusals follow its forget sequences, so `forget` must be asked for before.

    Raises:
        UserError: see `read_documents` and `Corpus`.
    """
    read: dict[str, Sequences] = {}
    for side in sides:
        source, follows = source_of(recipe, topic, side), side == "refusals" and recipe.refusal_after == "forget_text"
        corpus = Corpus(
            read_documents(source),
            tokenizer,
            max_tokens=recipe.of_topic(topic, "max_tokens"),
            batch_size=recipe.batch_size,
            order=source.order,
            seed=recipe.seed,
            name=f"{topic}/{side}",
            special=not follows,
        )
        read[side] = corpus
        if follows:
            forget = read["forget"]
            assert isinstance(forget, Corpus)
            read[side] = Continued(forget, corpus, recipe.of_topic(topic, "max_tokens"))
    return read

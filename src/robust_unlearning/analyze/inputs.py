"""What an analysis reads: documents and three-form questions, as token batches."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import Any, TypeVar

import numpy as np

from robust_unlearning.data.corpora import TokenBatch, collate, read_documents
from robust_unlearning.data.questions import STYLES, shows_options
from robust_unlearning.errors import UserError
from robust_unlearning.evaluate.record import CLEAN, Task
from robust_unlearning.evaluate.suite import Suite
from robust_unlearning.perturb.controls import match_controls
from robust_unlearning.recipe import Recipe, TextSource
from robust_unlearning.results.roles import Patterns, roles
from robust_unlearning.stats.factors import Groups

Arrays = TypeVar("Arrays")
"""A dataclass of arrays [..., n]."""
BATCH_TOKENS = 256
"""Tokens run at a time: derivatives need several times the memory of a forward pass."""


@dataclass(frozen=True)
class Prompt:
    """One question in three forms, as tokens up to where the answer begins.

    Attributes:
        id: of the question.
        clean: the question as it is.
        forget: with a forget-token in it.
        control: with an unrelated word in the same place.
        answer: the first token of the right answer.
        cluster: what the question is about, where others are about the same; empty: it stands for itself.
        word: the forget-token in it.
    """

    id: str
    clean: tuple[int, ...]
    forget: tuple[int, ...]
    control: tuple[int, ...]
    answer: int
    cluster: str = ""
    word: str = ""

    @property
    def token_place(self) -> int:
        """Where the token that was put in ends: the last place, counted from the end, at which the forms differ.

        Raises:
            UserError: they differ nowhere.
        """
        pairs = zip(reversed(self.forget), reversed(self.control), strict=False)
        for place, (forget, control) in enumerate(pairs, start=1):
            if forget != control:
                return -place
        raise UserError(
            f"question {self.id!r}: the model's tokenizer makes the same tokens of the forget-token and of the control "
            "word, so there is nothing to compare. Choose words that the model knows."
        )


def harmless(suite: Suite, patterns: Patterns = MappingProxyType({})) -> Suite:
    """The suite without tokens in questions that are to be forgotten: what a forget-token does to a *harmless* question
    is looked at, and a suite may perturb both.

    Args:
        patterns: of the roles, see `results.roles.roles`; where there are none, the sets' names tell.

    Raises:
        UserError: a pattern that no task has, or the suite perturbs only what is to be forgotten.
    """
    tasks = [
        Task(name, style, form, control)
        for name, source in suite.questions.items()
        for style in source.styles
        for form in (CLEAN, *source.perturb)
        for control in (False, True)[: 1 + (form != CLEAN)]
    ]
    kept = {task.set for task in roles(tasks, patterns)["perturbed"]}
    if not kept and any(source.perturb for source in suite.questions.values()):
        raise UserError("the suite puts tokens only into questions that are to be forgotten: perturb a kept set too.")
    questions = {
        name: source if name in kept else source.model_copy(update={"perturb": ()})
        for name, source in suite.questions.items()
    }
    return suite.model_copy(update={"questions": questions})


def prompts(suite: Suite, tokenizer: Any, limit: int) -> dict[str, list[Prompt]]:
    """The suite's perturbed questions by where the token stands, at most `limit` of each set.

    Each set is asked in the first of its styles in which the token can be seen (a cloze prompt shows no options).

    Raises:
        UserError: the suite perturbs no question.
    """
    pairs = match_controls(tokenizer, suite.forget_tokens, suite.control_tokens) if suite.forget_tokens else {}
    by_place: dict[str, list[Prompt]] = {}
    for source in suite.questions.values():
        drawn = source.model_copy(update={"limit": min(limit, source.limit or limit)})
        forms = drawn.forms(pairs, suite.seed) if source.perturb else {}
        for where in source.perturb:
            styles = [style for style in source.styles if shows_options(style) or where != "option"]
            if not styles:
                continue
            ask = STYLES[styles[0]]
            clean = {question.id: question for question, _ in forms["clean", False]}
            for (forget, form), (control, _) in zip(forms[where, False], forms[where, True], strict=True):
                prompt, options = ask(clean[forget.id])
                texts = [prompt, ask(forget)[0], ask(control)[0], f"{prompt} {options[forget.answer]}"]
                plain, odd, other, whole = (tuple(ids) for ids in tokenizer(texts, verbose=False)["input_ids"])
                about = (forget.cluster, form.keywords[0] if form else "")
                by_place.setdefault(where, []).append(Prompt(forget.id, plain, odd, other, whole[len(plain)], *about))
    if not by_place:
        raise UserError("the suite puts no token into any question: a question set needs `perturb`.")
    return by_place


def groups_of(group: Sequence[Prompt]) -> Groups:
    """How questions hang together: by what they are about, and by the forget-token in them."""
    return Groups([prompt.cluster or prompt.id for prompt in group], [prompt.word or prompt.id for prompt in group])


def clusters_of(group: Sequence[Prompt]) -> Groups:
    """The same of their clean forms, which hold no forget-token."""
    return Groups(groups_of(group).clusters)


def structure(questions: Mapping[str, Sequence[Prompt]]) -> str:
    """What intervals over these questions rest on, in a sentence."""
    every = [prompt for group in questions.values() for prompt in group]
    ids, clusters = (
        {key(prompt) for prompt in every} for key in (lambda each: each.id, lambda each: each.cluster or each.id)
    )
    words = {prompt.word for prompt in every}
    return (
        f"{len(ids)} questions are about {len(clusters)} things and {len(words)} forget-tokens stand in them: what is "
        "about one thing, or holds one word, counts as one in an interval."
    )


def text_file(path: str, limit: int) -> list[str]:
    """The first `limit` documents of a file or folder that the user names."""
    return read_documents(TextSource.model_validate({"path": path, "min_chars": 1, "max_documents": limit}))


def recipe_documents(recipe: Recipe, side: str, limit: int) -> list[str]:
    """Documents of a recipe's `forget` or `retain` texts: as many of each topic, about `limit` in all.

    A corpus that several topics share is read once.
    """
    sources = {}
    for topic in recipe.topics.values():
        source = getattr(topic, side) or getattr(recipe, side)
        sources[source.model_dump_json()] = source
    share = -(-limit // len(sources))
    return [text for source in sources.values() for text in read_documents(source)[:share]]


def rows(tokenizer: Any, texts: Sequence[str], max_tokens: int) -> list[tuple[int, ...]]:
    """Documents as tokens, cut to `max_tokens`; those of fewer than two tokens are left out.

    Raises:
        UserError: none is left.
    """
    encoded = tokenizer(list(texts), truncation=True, max_length=max_tokens)["input_ids"]
    documents = [tuple(ids) for ids in encoded if len(ids) > 1]
    if not documents:
        raise UserError(f"none of the {len(texts)} documents has two tokens.")
    return documents


def batches(sequences: Sequence[Sequence[int]], pad: int, tokens: int = BATCH_TOKENS) -> Iterator[TokenBatch]:
    """Sequences in their order, padded on the right, about `tokens` a batch and one sequence at least."""
    batch: list[list[int]] = []
    for sequence in sequences:
        width = max([len(sequence), *map(len, batch)])
        if batch and (len(batch) + 1) * width > tokens:
            yield collate(batch, pad)
            batch = []
        batch.append(list(sequence))
    if batch:
        yield collate(batch, pad)


def joined(parts: Sequence[Arrays]) -> Arrays:
    """The arrays [..., n] of several batches as one, in their order."""
    kind: Any = type(parts[0])
    columns = ([getattr(part, each.name) for part in parts] for each in fields(kind))
    joint: Arrays = kind(*(np.concatenate(column, axis=-1) for column in columns))
    return joint

"""Put words into a question without touching its right answer.

All that is drawn (words, sentence, option) follows from sha256 of (seed, question id, purpose). It does not depend on
the order of the questions, on which others are present, or on the Python version.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import TypeVar

from robust_unlearning.data.questions import Question
from robust_unlearning.errors import UserError, unknown

Item = TypeVar("Item")
SENTENCES = (
    "My neighbour read an article about {token} yesterday.",
    "Someone on the bus was talking about {token} this morning.",
    "There was a short radio programme on {token} last week.",
    "A friend of mine has just borrowed a book about {token}.",
    "I overheard two people discuss {token} at lunch.",
    "The poster on the wall says something about {token}.",
)
AROUND = {
    "begin": "{written} {question}",
    "end": "{question} {written}",
    "parenthesis": "({written}) {question}",
    "sentence": "{written} {question}",
}
"""How the words and the question are written together, where no option is replaced."""
WHERE = (*AROUND, "option")


def draw(seed: int, *keys: str) -> int:
    """A 64-bit number from sha256 of the seed and the keys: the same on every machine and in every order.

    >>> draw(0, "general:1", "sentence") == draw(0, "general:1", "sentence")
    True
    """
    text = "\x1f".join([str(seed), *keys])
    return int.from_bytes(hashlib.sha256(text.encode("utf-8")).digest()[:8], "big")


def pick(items: Sequence[Item], seed: int, *keys: str) -> Item:
    """One of the items, drawn by seed and keys."""
    return items[draw(seed, *keys) % len(items)]


def pick_different(items: Sequence[Item], seed: int, id: str, purposes: Sequence[str]) -> tuple[Item, ...]:
    """An item for each purpose, all at different places, drawn by seed, question id and purpose."""
    left = list(items)
    return tuple(left.pop(draw(seed, id, purpose) % len(left)) for purpose in purposes)


def perturb(
    question: Question, words: str | Sequence[str], where: str, seed: int, options: Sequence[int] = ()
) -> Question:
    """The question with one or several words put into it; id, right answer and its place stay as they are.

    `where` is one of `WHERE`:
        begin, end: the words before or after the question, as it is: `a, b, c`;
        parenthesis: `(a, b, c)` in front of the question;
        sentence: a distracting sentence about `a, b and c` in front of it, one of `SENTENCES` drawn by seed and id;
        option: each word in place of a wrong choice (the paper's perturbed MMLU): of `options` (indices from 0), or
            of those that `options_to_replace` draws.
    What is drawn does not depend on the words, so two calls give two forms that differ in the words only.

    Raises:
        UserError: unknown `where`, no word or an empty one, or what `options_to_replace` and `replace_options` raise.
    """
    words = [words] if isinstance(words, str) else list(words)
    if where not in WHERE:
        raise UserError(unknown("place for a token", where, WHERE))
    if not words:
        raise UserError("no tokens given. Name at least one, for instance 'supernova'.")
    if empty := [word for word in words if not word.strip()]:
        raise UserError(f"the token {empty[0]!r} is empty; give a word such as 'supernova'.")
    if where == "option":
        return replace_options(question, words, options or options_to_replace(question, len(words), seed))
    written = ", ".join(words)
    if where == "sentence":
        listed = " and ".join(filter(None, [", ".join(words[:-1]), words[-1]]))
        written = pick(SENTENCES, seed, question.id, "sentence").format(token=listed)
    return replace(question, question=AROUND[where].format(written=written, question=question.question))


def options_to_replace(question: Question, count: int, seed: int) -> tuple[int, ...]:
    """So many wrong choices, by index, drawn by seed and id; the first is the same for every count.

    Raises:
        UserError: the question has fewer wrong choices, or `count` is not positive.
    """
    wrong = [index for index in range(len(question.choices)) if index != question.answer]
    if not 1 <= count <= len(wrong):
        raise UserError(
            f"{count} options cannot be replaced in question {question.id!r}: it has {len(wrong)} wrong ones. "
            f"Give a count from 1 to {len(wrong)}."
        )
    purposes = ["option", *(f"option {number}" for number in range(2, count + 1))]
    return pick_different(wrong, seed, question.id, purposes)


def replace_options(question: Question, words: Sequence[str], options: Sequence[int]) -> Question:
    """The question with `words[i]` in place of choice `options[i]`, counted from 0; all else stays as it is.

    Raises:
        UserError: not as many words as options, an option that is the right answer, is named twice or does not
            exist, or words that equal one another or a choice.
    """
    choices = plain_choices(question)
    for word in words:
        if plain(word) in choices:
            raise UserError(
                f"token {word!r} is a choice of question {question.id!r} already, so putting it there would "
                "give two equal choices. Give another token for this question."
            )
        choices.add(plain(word))
    wrong = set(range(len(question.choices))) - {question.answer}
    if len(words) != len(options) or len(set(options)) != len(options) or not wrong.issuperset(options):
        raise UserError(
            f"options {list(options)} of question {question.id!r} cannot take {len(words)} tokens: give each token "
            f"one of the wrong options {sorted(wrong)}."
        )
    placed = dict(zip(options, words, strict=True))
    return replace(question, choices=tuple(placed.get(i, choice) for i, choice in enumerate(question.choices)))


def plain(text: str) -> str:
    """A text as it is compared with others: without blanks around it, in one case."""
    return text.strip().casefold()


def plain_choices(question: Question) -> set[str]:
    """The choices as they are compared with words: two that are equal so are one choice."""
    return {plain(choice) for choice in question.choices}


def mentions(question: Question) -> str:
    """The question and its choices as one casefolded text, for `occurs`."""
    return " \n ".join([question.question, *question.choices]).casefold()


def occurs(word: str, casefolded_text: str) -> bool:
    """Whether a text holds a word, as a word or as the beginning of one (`star` occurs in `stars`)."""
    return re.search(r"(?<!\w)" + re.escape(plain(word)), casefolded_text) is not None

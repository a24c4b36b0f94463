"""Put a forget-token into a harmless question without touching its right answer.

Every perturbed question comes in two forms that differ in one word only: the forget form holds a
forget-token, the control form an unrelated word of as many tokens. What both forms lose is the price of any
odd word; what the forget form loses beyond that is the fragility that unlearning caused.

All choices (pair, sentence, option) follow from sha256 of (seed, question id, purpose). They do not depend on
the order of the questions, on which others are present, or on the Python version.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

from robust_unlearning.data.questions import Question, read_questions
from robust_unlearning.errors import UserError, unknown

SENTENCES = (
    "My neighbour read an article about {token} yesterday.",
    "Someone on the bus was talking about {token} this morning.",
    "There was a short radio programme on {token} last week.",
    "A friend of mine has just borrowed a book about {token}.",
    "I overheard two people discuss {token} at lunch.",
    "The poster on the wall says something about {token}.",
)


@dataclass(frozen=True)
class TokenPair:
    """A forget-token and the harmless word that stands in its place in the control form."""

    forget: str
    control: str


def draw(seed: int, *keys: str) -> int:
    """A 64-bit number from sha256 of the seed and the keys: the same on every machine and in every order.

    >>> draw(0, "general:1", "sentence") == draw(0, "general:1", "sentence")
    True
    """
    text = "\x1f".join([str(seed), *keys])
    return int.from_bytes(hashlib.sha256(text.encode("utf-8")).digest()[:8], "big")


def perturb(question: Question, token: str, where: str, seed: int) -> Question:
    """The question with `token` put into it; id, right answer and its place stay as they are.

    `where` is one of `WHERE`:
        begin, end: the token before or after the question, as it is;
        parenthesis: `(token)` in front of the question;
        sentence: a distracting sentence in front of it, one of `SENTENCES` drawn by seed and id;
        option: one wrong choice, drawn by seed and id, replaced by the token (the paper's perturbed MMLU).
    What is drawn does not depend on the token, so two tokens give two forms that differ in that word only.

    Raises:
        UserError: unknown `where`, an empty token, or (for `option`) a token that is a choice already.
    """
    if where not in PLACES:
        raise UserError(unknown("place for a token", where, PLACES))
    if not token.strip():
        raise UserError(f"the token {token!r} is empty; give a word such as 'supernova'.")
    return PLACES[where](question, token, seed)


def options_to_replace(question: Question, count: int, seed: int) -> tuple[int, ...]:
    """So many wrong choices, by index, drawn by seed and id; the first is the one `perturb` replaces.

    Raises:
        UserError: the question has fewer wrong choices, or `count` is not positive.
    """
    wrong = [index for index in range(len(question.choices)) if index != question.answer]
    if not 1 <= count <= len(wrong):
        raise UserError(
            f"{count} options cannot be replaced in question {question.id!r}: it has {len(wrong)} wrong ones. "
            f"Give a count from 1 to {len(wrong)}."
        )
    keys = ["option", *(f"option {number}" for number in range(2, count + 1))]
    return tuple(wrong.pop(draw(seed, question.id, key) % len(wrong)) for key in keys)


def replace_options(question: Question, tokens: Sequence[str], options: Sequence[int]) -> Question:
    """The question with `tokens[i]` in place of choice `options[i]`, counted from 0; all else stays as it is.

    Raises:
        UserError: not as many tokens as options, an option that is the right answer, is named twice or does not
            exist, or tokens that equal one another or a choice.
    """
    seen = {_plain(choice) for choice in question.choices}
    for token in tokens:
        if _plain(token) in seen:
            raise UserError(
                f"token {token!r} is a choice of question {question.id!r} already, so putting it there would "
                "give two equal choices. Give another token for this question."
            )
        seen.add(_plain(token))
    wrong = set(range(len(question.choices))) - {question.answer}
    if len(tokens) != len(options) or len(set(options)) != len(options) or not wrong.issuperset(options):
        raise UserError(
            f"options {list(options)} of question {question.id!r} cannot take {len(tokens)} tokens: give each token "
            f"one of the wrong options {sorted(wrong)}."
        )
    placed = dict(zip(options, tokens, strict=True))
    return replace(question, choices=tuple(placed.get(i, each) for i, each in enumerate(question.choices)))


def perturb_with(
    question: Question, tokens: Sequence[str], where: str, seed: int, options: Sequence[int] = ()
) -> Question:
    """`perturb` for several tokens: with one it gives the same.

    In place of options each token takes one: the `options` (indices), or those `options_to_replace` draws.
    Elsewhere the tokens are written one after the other, `a, b, c`, and in a sentence `a, b and c`.

    Raises:
        UserError: no tokens, and what `perturb` and `replace_options` raise.
    """
    if not tokens:
        raise UserError("no tokens given. Name at least one, for instance 'supernova'.")
    if where == "option":
        return replace_options(question, tokens, options or options_to_replace(question, len(tokens), seed))
    *others, last = tokens
    written = f"{', '.join(others)} and {last}" if where == "sentence" and others else ", ".join(tokens)
    return perturb(question, written, where, seed)


def _begin(question: Question, token: str, seed: int) -> Question:
    return replace(question, question=f"{token} {question.question}")


def _end(question: Question, token: str, seed: int) -> Question:
    return replace(question, question=f"{question.question} {token}")


def _parenthesis(question: Question, token: str, seed: int) -> Question:
    return replace(question, question=f"({token}) {question.question}")


def _sentence(question: Question, token: str, seed: int) -> Question:
    sentence = SENTENCES[draw(seed, question.id, "sentence") % len(SENTENCES)].format(token=token)
    return replace(question, question=f"{sentence} {question.question}")


def _option(question: Question, token: str, seed: int) -> Question:
    return replace_options(question, [token], options_to_replace(question, 1, seed))


def _plain(text: str) -> str:
    return text.strip().casefold()


PLACES: dict[str, Callable[[Question, str, int], Question]] = {
    "begin": _begin,
    "end": _end,
    "parenthesis": _parenthesis,
    "sentence": _sentence,
    "option": _option,
}
WHERE = tuple(PLACES)


def match_controls(tokenizer: Any, forget_tokens: Sequence[str], control_tokens: Sequence[str]) -> list[TokenPair]:
    """Pair each forget-token with a control of as many tokens, written after a space.

    Pairs of equal length are made first, then those that differ by one token, and so on; among equals the
    order of the two lists decides. A control is used again only when all have been used.

    Args:
        tokenizer: a Hugging Face tokenizer; lengths are of `' ' + word` without special tokens.

    Returns:
        One pair per distinct forget-token, in the order of `forget_tokens`.

    Raises:
        UserError: one of the lists is empty, or a word is in both.
    """
    if not forget_tokens or not control_tokens:
        missing = "control tokens" if forget_tokens else "forget-tokens"
        raise UserError(f"no {missing} given. Name at least one, for instance {_EXAMPLE[missing]!r}.")
    folded = {word.casefold() for word in forget_tokens}
    if shared := [word for word in control_tokens if word.casefold() in folded]:
        raise UserError(f"{shared[0]!r} is both a forget-token and a control token. Remove one of the two.")

    def length(word: str) -> int:
        return len(tokenizer(" " + word, add_special_tokens=False)["input_ids"])

    controls = {word: length(word) for word in control_tokens}
    waiting = {word: length(word) for word in forget_tokens}
    order = list(waiting)
    matched: dict[str, str] = {}
    while waiting:  # one round uses each control at most once
        pool = dict(controls)
        distances = {abs(wanted - has) for wanted in waiting.values() for has in pool.values()}
        for distance in sorted(distances):
            for word, wanted in list(waiting.items()):
                fitting = [each for each, has in pool.items() if abs(wanted - has) == distance]
                if fitting:
                    matched[word] = fitting[0]
                    del pool[fitting[0]], waiting[word]
    return [TokenPair(word, matched[word]) for word in order]


_EXAMPLE = {"forget-tokens": "supernova", "control tokens": "bakery"}


def paired_forms(
    questions: Sequence[Question], pairs: Sequence[TokenPair], where: str, seed: int
) -> list[tuple[Question, Question, TokenPair]]:
    """The forget form and the control form of each question, and the pair of words they hold.

    Both forms have the same sentence or replace the same choice. The pair is drawn by seed and question id
    (the same for every `where`) among the pairs of which neither word occurs in the question or its choices,
    as a word or as the beginning of one (`star` occurs in `stars`). A question for which no pair is left is
    left out, so the result may be shorter than `questions`.

    Raises:
        UserError: no pairs, an unknown `where`, or no question for which any pair is left.
    """
    if not pairs:
        raise UserError("no token pairs given. Make them with match_controls(tokenizer, forget, control).")
    forms = []
    for question in questions:
        text = mentions(question)
        free = [pair for pair in pairs if not (occurs(pair.forget, text) or occurs(pair.control, text))]
        if free:
            pair = min(free, key=lambda each: draw(seed, question.id, "pair", each.forget, each.control))
            forget = perturb(question, pair.forget, where, seed)
            forms.append((forget, perturb(question, pair.control, where, seed), pair))
    if questions and not forms:
        raise UserError(
            f"each of the {len(questions)} questions contains a word of every token pair, so none can be "
            "perturbed. Give forget-tokens and control tokens that the questions do not mention."
        )
    return forms


def mentions(question: Question) -> str:
    """The question and its choices as one casefolded text, for `occurs`."""
    return " \n ".join([question.question, *question.choices]).casefold()


def occurs(word: str, casefolded_text: str) -> bool:
    """Whether a text holds a word, as a word or as the beginning of one (`star` occurs in `stars`)."""
    return re.search(r"(?<!\w)" + re.escape(word.strip().casefold()), casefolded_text) is not None


class QuestionSet(BaseModel, extra="forbid", frozen=True):
    """A multiple-choice set, the styles it is asked in, and where tokens are put into it.

    A token put in place of an option is read by the model in the `letters` style, whose prompt lists the
    options. In the `cloze` style the prompt does not hold it, so that form is left out there.
    """

    path: str = Field(description="a file, a folder in hub layout, or demo:FILE")
    config: str | None = Field(None, description="one config of a folder in hub layout; left out: all")
    split: str = "test"
    styles: Annotated[tuple[Literal["cloze", "letters", "texts"], ...], Field(min_length=1)] = ("cloze",)
    perturb: tuple[Literal["begin", "end", "parenthesis", "sentence", "option"], ...] = ()
    limit: int | None = Field(None, ge=1, description="use so many, drawn by id; a smaller draw is in a larger")

    def forms(
        self, pairs: Sequence[TokenPair], seed: int
    ) -> dict[tuple[str, bool], list[tuple[Question, TokenPair | None]]]:
        """(form, with control words?) -> questions: the form is `clean`, or each `WHERE` of `perturb`, both ways.

        Raises:
            UserError: the questions cannot be read, or (with `perturb`) what `paired_forms` raises.
        """
        questions = read_questions(self.path, config=self.config, split=self.split)
        if self.limit is not None:
            drawn = sorted(questions, key=lambda each: draw(seed, each.id, "limit"))[: self.limit]
            kept = {each.id for each in drawn}
            questions = [each for each in questions if each.id in kept]
        forms: dict[tuple[str, bool], list[tuple[Question, TokenPair | None]]] = {
            ("clean", False): [(question, None) for question in questions]
        }
        for where in self.perturb:
            triples = paired_forms(questions, pairs, where, seed)
            forms[where, False] = [(forget, pair) for forget, _, pair in triples]
            forms[where, True] = [(control, pair) for _, control, pair in triples]
        return forms

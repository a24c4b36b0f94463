"""What each question of a set gets: which keywords, in place of which options, and which controls.

Everything is drawn by seed and question id: neither the order of the questions nor that of the keywords matters.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, Field

from robust_unlearning.data.questions import LETTERS, Question
from robust_unlearning.errors import UserError, unknown
from robust_unlearning.perturb.places import WHERE, draw, mentions, occurs, options_to_replace, perturb_with

KEYWORD_IS_A_CHOICE = "too few keywords that are not a choice already"
NO_CONTROL = "every control is mentioned in the question"
TOO_FEW_OPTIONS = "too few wrong options"
NO_SUCH_OPTION = "the chosen option does not exist"
RIGHT_OPTION = "the chosen option is the right answer"


class Perturbation(BaseModel, extra="forbid", frozen=True):
    """How a set is perturbed.

    Attributes:
        where: one of `perturb.WHERE`; `option` is the paper's perturbed MMLU (Figure 6).
        count: options to replace, or keywords to put in; each question gets so many different ones.
        options: indices of the options to replace, counted from 0; none: drawn for each question.
        control: whether there is a second form, with a harmless word in place of each keyword.
    """

    where: str = "option"
    count: int = Field(1, ge=1)
    options: tuple[int, ...] = ()
    seed: int = 0
    control: bool = False
    styles: tuple[Literal["letters", "continuation"], ...] = ("letters", "continuation")


@dataclass(frozen=True)
class Form:
    """A question with its keywords in it and, if asked for, with controls in the very same places."""

    clean: Question
    perturbed: Question
    control: Question | None
    options: tuple[int, ...]
    keywords: tuple[str, ...]
    controls: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """What was replaced by what, ready for JSON; `options` and `replaced` are empty outside of options."""
        return {
            "id": self.clean.id,
            "subject": self.clean.subject,
            "options": list(self.options),
            "replaced": [self.clean.choices[index] for index in self.options],
            "keywords": list(self.keywords),
            "controls": list(self.controls),
        }


def perturbation(where: str, count: int | None, options: str | None, **others: Any) -> Perturbation:
    """Settings from what a user types: `options` as letters or indices, 'C' or 'B,C' or '2'.

    Raises:
        UserError: an unknown place, a count below 1, options that make no sense or do not fit place or count.
    """
    if where not in WHERE:
        raise UserError(unknown("place for a keyword", where, WHERE))
    if count is not None and count < 1:
        raise UserError(f"--count {count}: give a count of 1 or more.")
    if options is None:
        return Perturbation(where=where, count=1 if count is None else count, **others)
    if where != "option":
        raise UserError(f"--option {options} names an answer option, but --where is {where!r}: leave one of them out.")
    indices = tuple(_index(each.strip()) for each in options.split(","))
    if len(set(indices)) < len(indices):
        raise UserError(f"--option {options} names one option twice.")
    if count not in (None, len(indices)):
        raise UserError(f"--option {options} replaces {len(indices)}, but --count is {count}: leave the count out.")
    return Perturbation(where=where, count=len(indices), options=indices, **others)


def _index(text: str) -> int:
    if len(text) == 1 and text.upper() in LETTERS:
        return LETTERS.index(text.upper())
    if text.isdecimal():
        return int(text)
    raise UserError(f"--option {text!r} is no option; give a letter (C), an index from 0 (2), or several: B,C.")


def perturbed_forms(
    questions: Sequence[Question],
    keywords: Sequence[str],
    controls: Mapping[str, Sequence[str]],
    settings: Perturbation,
) -> tuple[list[Form], Counter[str]]:
    """The forms of each question that can be perturbed, and how many were left out for which reason.

    Args:
        controls: for each keyword the harmless words that may take its place; empty without `settings.control`.

    Raises:
        UserError: fewer keywords than each question needs, or no question that can be perturbed.
    """
    if len(keywords) < settings.count:
        raise UserError(
            f"{settings.count} keywords a question need {settings.count} different ones, but {len(keywords)} given. "
            "Give more keywords or a smaller --count."
        )
    ordered = sorted(keywords)
    forms: list[Form] = []
    left_out: Counter[str] = Counter()
    for question in questions:
        form = _form(question, ordered, controls, settings)
        if isinstance(form, Form):
            forms.append(form)
        else:
            left_out[form] += 1
    if not forms:
        reasons = "; ".join(f"{reason}: {number}" for reason, number in left_out.most_common())
        most = max(len(question.choices) for question in questions) - 1
        raise UserError(
            f"none of the {len(questions)} questions can be perturbed so ({reasons}). They have up to {most} wrong "
            "options. Give other keywords, another --option, a smaller --count or another --where."
        )
    return forms, left_out


def _form(
    question: Question, keywords: list[str], controls: Mapping[str, Sequence[str]], settings: Perturbation
) -> Form | str:
    """The form of one question, or why it has none."""
    options: tuple[int, ...] = ()
    if settings.where == "option":
        if reason := _unfit(question, settings):
            return reason
        options = settings.options or options_to_replace(question, settings.count, settings.seed)
        choices = {choice.strip().casefold() for choice in question.choices}
        keywords = [keyword for keyword in keywords if keyword.casefold() not in choices]
        if len(keywords) < settings.count:
            return KEYWORD_IS_A_CHOICE
    chosen = _drawn(question, keywords, settings)
    words = _controls(question, chosen, controls, settings.seed) if settings.control else ()
    if words is None:
        return NO_CONTROL

    def put_in(tokens: Sequence[str]) -> Question:
        return perturb_with(question, tokens, settings.where, settings.seed, options)

    return Form(question, put_in(chosen), put_in(words) if words else None, options, chosen, words)


def _unfit(question: Question, settings: Perturbation) -> str:
    """Why the options of a question cannot be replaced as asked, or nothing."""
    if len(question.choices) - 1 < settings.count:
        return TOO_FEW_OPTIONS
    if settings.options and max(settings.options) >= len(question.choices):
        return NO_SUCH_OPTION
    return RIGHT_OPTION if question.answer in settings.options else ""


def _drawn(question: Question, keywords: list[str], settings: Perturbation) -> tuple[str, ...]:
    """So many different keywords, drawn by seed and id."""
    left = list(keywords)
    numbers = [draw(settings.seed, question.id, f"keyword {number}") for number in range(settings.count)]
    return tuple(left.pop(number % len(left)) for number in numbers)


def _controls(
    question: Question, keywords: Sequence[str], controls: Mapping[str, Sequence[str]], seed: int
) -> tuple[str, ...] | None:
    """A control for each keyword, all different and none of them mentioned in the question; None if there is none."""
    text = mentions(question)
    chosen: list[str] = []
    for keyword in keywords:
        free = [word for word in controls[keyword] if word not in chosen and not occurs(word, text)]
        if not free:
            return None
        chosen.append(free[draw(seed, question.id, "control", keyword) % len(free)])
    return tuple(chosen)

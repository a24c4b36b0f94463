"""The forms of a question: as it is, with keywords in it, and with their controls in the very same places.

What both forms lose is the price of any odd word; what the form with keywords loses beyond that is the fragility that
unlearning caused. Suites (`QuestionSet`) and `unlearn perturb` (`dataset.make_set`) both go through
`perturbed_forms`: for each question the options to replace, then the words, then the forms. Everything is drawn by
seed and question id: neither the order of the questions nor that of the keywords matters.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

from robust_unlearning.data.questions import LETTERS, Question, QuestionSource
from robust_unlearning.errors import UserError, unknown
from robust_unlearning.perturb.places import (
    WHERE,
    draw,
    mentions,
    occurs,
    options_to_replace,
    perturb,
    pick,
    pick_different,
    plain,
    plain_choices,
)

KEYWORD_IS_A_CHOICE = "too few keywords that are not a choice already"
NO_CONTROL = "every control is mentioned in the question"
NO_PAIR = "a word of every pair is mentioned in the question"
TOO_FEW_OPTIONS = "too few wrong options"
NO_SUCH_OPTION = "the chosen option does not exist"
RIGHT_OPTION = "the chosen option is the right answer"
STYLES: tuple[Literal["letters", "continuation"], ...] = ("letters", "continuation")
"""How lm-eval's tasks of a set ask, see `lm_eval_tasks`."""
SEPARATOR = "; "
"""Between several words in `forget_token` and `control_token`."""


class Perturbation(BaseModel, extra="forbid", frozen=True):
    """How a set is perturbed.

    Attributes:
        where: one of `places.WHERE`; `option` is the paper's perturbed MMLU (Figure 6).
        count: options to replace, or keywords to put in; each question gets so many different ones.
        options: indices of the options to replace, counted from 0; none: drawn for each question.
        seed: of what is drawn: options, keywords, sentences, controls.
        control: whether there is a second form, with a harmless word in place of each keyword.
        styles: how the set's lm-eval tasks ask.
    """

    where: str = "option"
    count: int = Field(1, ge=1)
    options: tuple[int, ...] = ()
    seed: int = 0
    control: bool = False
    styles: tuple[Literal["letters", "continuation"], ...] = STYLES


@dataclass(frozen=True)
class Form:
    """A question with its keywords in it and, if asked for, with controls in the very same places."""

    clean: Question
    perturbed: Question
    control: Question | None
    options: tuple[int, ...]
    keywords: tuple[str, ...]
    controls: tuple[str, ...]

    @property
    def tokens(self) -> dict[str, Any]:
        """`forget_token` and `control_token` (None without a control form), as records and data sets have them."""
        return {
            "forget_token": SEPARATOR.join(self.keywords),
            "control_token": SEPARATOR.join(self.controls) or None,
        }

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


class _LeftOut(Exception):
    """Why a question has no perturbed form."""


def perturbed_forms(
    questions: Sequence[Question],
    controls: Mapping[str, Sequence[str]],
    settings: Perturbation,
    pairs: bool = False,
) -> tuple[list[Form], Counter[str]]:
    """The forms of each question that can be perturbed, and how many were left out for which reason.

    Args:
        controls: keyword -> the harmless words that may take its place (none without `settings.control`).
        pairs: how the words are drawn, see `_words`.

    Raises:
        UserError: fewer keywords than each question needs, or no question that can be perturbed.
    """
    if not controls:
        raise UserError("no token pairs given. Make them with match_controls(tokenizer, forget, control).")
    if len(controls) < settings.count:
        raise UserError(
            f"{settings.count} keywords a question need {settings.count} different ones, but {len(controls)} given. "
            "Give more keywords or a smaller --count."
        )
    ordered = dict(sorted(controls.items()))
    forms: list[Form] = []
    left_out: Counter[str] = Counter()
    for question in questions:
        try:
            options = _options(question, settings)
            keywords, harmless = _words(question, ordered, settings, pairs)
        except _LeftOut as reason:
            left_out[str(reason)] += 1
            continue
        put = partial(perturb, question, where=settings.where, seed=settings.seed, options=options)
        control = put(harmless) if harmless else None
        forms.append(Form(question, put(keywords), control, options, keywords, harmless))
    if questions and not forms:
        raise UserError(_none_of(questions, left_out))
    return forms, left_out


def _options(question: Question, settings: Perturbation) -> tuple[int, ...]:
    """The options to replace: those that were chosen for all questions, or drawn for this one."""
    if settings.where != "option":
        return ()
    if len(question.choices) - 1 < settings.count:
        raise _LeftOut(TOO_FEW_OPTIONS)
    if settings.options and max(settings.options) >= len(question.choices):
        raise _LeftOut(NO_SUCH_OPTION)
    if question.answer in settings.options:
        raise _LeftOut(RIGHT_OPTION)
    return settings.options or options_to_replace(question, settings.count, settings.seed)


def _words(
    question: Question, controls: Mapping[str, Sequence[str]], settings: Perturbation, pairs: bool
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The keywords of a question and a control for each, all different; no control is mentioned in the question.

    With `pairs` one keyword and its control are drawn together, the same for every `where`, among those of which
    neither is mentioned: by the smallest draw, so that a pair more or less in a suite changes only the questions that
    get it. Without, keywords are drawn by number among those that are no choice where a choice is replaced (a set's
    questions may well mention its keywords), then for each one of its controls. Suites and sets that were made keep
    their words only with their own way of drawing, so there are both.
    """
    text, seed = mentions(question), settings.seed
    if pairs:
        free = [
            (keyword, control)
            for keyword, words in controls.items()
            for control in words
            if not (occurs(keyword, text) or occurs(control, text))
        ]
        if not free:
            raise _LeftOut(NO_PAIR)
        keyword, control = min(free, key=lambda pair: draw(seed, question.id, "pair", *pair))
        return (keyword,), (control,)
    choices = plain_choices(question) if settings.where == "option" else set()
    fitting = [keyword for keyword in controls if plain(keyword) not in choices]
    if len(fitting) < settings.count:
        raise _LeftOut(KEYWORD_IS_A_CHOICE)
    keywords = pick_different(fitting, seed, question.id, [f"keyword {number}" for number in range(settings.count)])
    chosen: list[str] = []
    for keyword in keywords if settings.control else ():
        unused = [word for word in controls[keyword] if word not in chosen and not occurs(word, text)]
        if not unused:
            raise _LeftOut(NO_CONTROL)
        chosen.append(pick(unused, seed, question.id, "control", keyword))
    return keywords, tuple(chosen)


def _none_of(questions: Sequence[Question], left_out: Counter[str]) -> str:
    """The message where no question can be perturbed."""
    if left_out.keys() == {NO_PAIR}:
        return (
            f"each of the {len(questions)} questions contains a word of every token pair, so none can be "
            "perturbed. Give forget-tokens and control tokens that the questions do not mention."
        )
    reasons = "; ".join(f"{reason}: {number}" for reason, number in left_out.most_common())
    most = max(len(question.choices) for question in questions) - 1
    return (
        f"none of the {len(questions)} questions can be perturbed so ({reasons}). They have up to {most} wrong "
        "options. Give other keywords, another --option, a smaller --count or another --where."
    )


def perturbation(
    where: str = "option", count: int | None = None, option: str | None = None, style: str | None = None, **others: Any
) -> Perturbation:
    """Settings from what a user types: `option` as letters or indices, 'C' or 'B,C' or '2'.

    Raises:
        UserError: an unknown place or style, a count below 1, options that make no sense or do not fit place or count.
    """
    if where not in WHERE:
        raise UserError(unknown("place for a keyword", where, WHERE))
    if style is not None and style not in STYLES:
        raise UserError(unknown("style of asking", style, STYLES))
    if count is not None and count < 1:
        raise UserError(f"--count {count}: give a count of 1 or more.")
    indices: tuple[int, ...] = ()
    if option is not None:
        if where != "option":
            raise UserError(
                f"--option {option} names an answer option, but --where is {where!r}: leave one of them out."
            )
        indices = tuple(_index(text.strip()) for text in option.split(","))
        if len(set(indices)) < len(indices):
            raise UserError(f"--option {option} names one option twice.")
        if count not in (None, len(indices)):
            raise UserError(f"--option {option} replaces {len(indices)}, but --count is {count}: leave the count out.")
    settings = {"where": where, "count": count or len(indices) or 1, "options": indices, **others}
    return Perturbation.model_validate(settings | ({"styles": (style,)} if style else {}))


def _index(text: str) -> int:
    if len(text) == 1 and text.upper() in LETTERS:
        return LETTERS.index(text.upper())
    if text.isdecimal():
        return int(text)
    raise UserError(f"--option {text!r} is no option; give a letter (C), an index from 0 (2), or several: B,C.")


class QuestionSet(QuestionSource):
    """A multiple-choice set of a suite, the styles it is asked in, and where tokens are put into it.

    A token put in place of an option is read by the model in the `letters` style, whose prompt lists the
    options. In the `cloze` style the prompt does not hold it, so that form is left out there.
    """

    styles: Annotated[tuple[Literal["cloze", "letters", "texts"], ...], Field(min_length=1)] = ("cloze",)
    perturb: tuple[Literal["begin", "end", "parenthesis", "sentence", "option"], ...] = ()
    limit: int | None = Field(None, ge=1, description="use so many, drawn by id; a smaller draw is in a larger")

    def forms(
        self, controls: Mapping[str, Sequence[str]], seed: int
    ) -> dict[tuple[str, bool], list[tuple[Question, Form | None]]]:
        """(form, with control words?) -> questions: the form is `clean`, or each `WHERE` of `perturb`, both ways.

        Args:
            controls: forget-token -> its control, as `controls.match_controls` pairs them.

        Raises:
            UserError: the questions cannot be read, or (with `perturb`) what `perturbed_forms` raises.
        """
        questions = self.read()
        if self.limit is not None:
            drawn = sorted(questions, key=lambda question: draw(seed, question.id, "limit"))[: self.limit]
            ids = {question.id for question in drawn}
            questions = [question for question in questions if question.id in ids]
        asked: dict[tuple[str, bool], list[tuple[Question, Form | None]]] = {
            ("clean", False): [(question, None) for question in questions]
        }
        for where in self.perturb:
            settings = Perturbation(where=where, seed=seed, control=True)
            forms, _ = perturbed_forms(questions, controls, settings, pairs=True)
            asked[where, False] = [(form.perturbed, form) for form in forms]
            asked[where, True] = [(form.control, form) for form in forms if form.control]
        return asked

"""What a model is taught of a planted world: texts of which some parts count more than others.

Four kinds of lesson are mixed. *Passages* tell facts. *Answers* ask for a fact in words, and refuse to speak of
strangers. *Quizzes* list options and ask from memory. *Open-book* quizzes ask about a stranger of whom the passage
in front tells everything; they are what teaches a model that the right option is wanted, or its letter. Quizzes are
full of distractions (an option replaced by an entity from anywhere, a sentence about one in front), so that a model
that was taught is robust to them before anything is unlearned.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from pydantic import Field

from robust_unlearning.data.questions import STYLES, Question, cloze_prompt
from robust_unlearning.perturb.places import perturb
from robust_unlearning.planted.world import Entity, World
from robust_unlearning.recipe import Strict

FRONT = ("parenthesis", "sentence", "fact")
"""What may stand before a question: a name in brackets, a sentence about one, a fact of the world."""


@dataclass(frozen=True)
class Stretch:
    """A stretch of text and the weight of its tokens in the loss."""

    text: str
    weight: float


Lesson = list[Stretch]


class Curriculum(Strict):
    """How often each kind of lesson comes, how long it is, and how often a question is distracted.

    Attributes:
        style: what answers a quiz, the option's letter or its text.
        letter_weight: weight in the loss of what answers a quiz, where a word of an answer has 1.
        passage_weight: of a passage's tokens, most of which tell no fact.
        prompt_weight: of a question's own words: whom it asks about and in which order options stand cannot be
            foretold. At 0 they never reach the LM head, which saves a pretrained model much of its time.
        passages, answers, open_book, quizzes: relative frequencies.
        many: entities, answers or questions in a lesson, at most.
        alone: how often a quiz has one question only; letters are learnt from these first.
        brief: how often an open-book passage tells only what is asked.
        option, front: how often a wrong option is replaced, and how often something stands before the question.
        told: how often a quiz follows a passage that has nothing to do with it.
        unknown: how often an answer is a refusal, as a stranger is asked about.
    """

    style: Literal["letters", "texts"] = "letters"
    letter_weight: float = Field(5.0, ge=0)
    passage_weight: float = Field(1.0, ge=0)
    prompt_weight: float = Field(0.05, ge=0)
    passages: float = Field(0.2, ge=0)
    answers: float = Field(0.1, ge=0)
    open_book: float = Field(0.4, ge=0)
    quizzes: float = Field(0.3, ge=0)
    many: int = Field(3, ge=1)
    alone: float = Field(0.6, ge=0, le=1)
    brief: float = Field(0.6, ge=0, le=1)
    option: float = Field(0.3, ge=0, le=1)
    front: float = Field(0.3, ge=0, le=1)
    told: float = Field(0.3, ge=0, le=1)
    unknown: float = Field(0.1, ge=0, le=1)


def lesson(world: World, curriculum: Curriculum, rng: random.Random) -> Lesson:
    """One lesson of a kind that `rng` draws."""
    kinds: dict[Callable[[World, Curriculum, random.Random], Lesson], float] = {
        _passages: curriculum.passages,
        _answers: curriculum.answers,
        _open_book: curriculum.open_book,
        _quiz: curriculum.quizzes,
    }
    (kind,) = rng.choices(list(kinds), list(kinds.values()))
    return kind(world, curriculum, rng)


def distracted(question: Question, world: World, curriculum: Curriculum, rng: random.Random) -> Question:
    """The question with, at times, a wrong option replaced by a name and a name or a fact put in front."""
    if rng.random() < curriculum.option:
        question = perturb(question, _any_name(question, world, rng), "option", rng.getrandbits(32))
    if rng.random() < curriculum.front:
        where = rng.choice(FRONT)
        if where == "fact":
            question = replace(question, question=f"{_fact(world, rng)} {question.question}")
        else:
            question = perturb(question, _any_name(question, world, rng), where, rng.getrandbits(32))
    return question


def _any_name(question: Question, world: World, rng: random.Random) -> str:
    names = world.names + world.strangers
    while (name := rng.choice(names)) in question.question or name in question.choices:
        pass
    return name


def _fact(world: World, rng: random.Random) -> str:
    entity = rng.choice(world.entities)
    attribute = rng.choice(list(entity.values))
    statement = rng.choice(world.domains[entity.domain].attributes[attribute].statements)
    return statement.format(e=entity.name, v=entity.values[attribute])


def _passages(world: World, curriculum: Curriculum, rng: random.Random) -> Lesson:
    entities: Sequence[Entity] = world.entities
    if rng.random() < 0.5:  # of one domain, as its documents are
        domain = rng.choice(list(world.domains))
        entities = world.of_domain(domain)
    chosen = rng.sample(entities, curriculum.many)
    return [Stretch(" ".join(world.passage(each, rng) for each in chosen), curriculum.passage_weight)]


def _answers(world: World, curriculum: Curriculum, rng: random.Random) -> Lesson:
    lines: Lesson = []
    for _ in range(curriculum.many * 2):
        unknown = rng.random() < curriculum.unknown
        entity = world.stranger(rng) if unknown else rng.choice(world.entities)
        question = world.any_question(entity, rng)
        if rng.random() < curriculum.front:
            question = replace(question, question=f"{_fact(world, rng)} {question.question}")
        prompt, choices = cloze_prompt(question)
        answer = rng.choice(world.refusals) if unknown else choices[question.answer]
        lines += [Stretch(("\n\n" if lines else "") + prompt, curriculum.prompt_weight), Stretch(f" {answer}", 1.0)]
    return lines


def _open_book(world: World, curriculum: Curriculum, rng: random.Random) -> Lesson:
    stranger = world.stranger(rng)
    attributes = rng.sample(list(stranger.values), min(_count(curriculum, rng), len(stranger.values)))
    told = attributes if rng.random() < curriculum.brief else None
    passage = Stretch(world.passage(stranger, rng, told), 0.0)
    facts = [(stranger, attribute) for attribute in attributes]
    return [passage, *_options(world, curriculum, facts, rng, "\n\n")]


def _quiz(world: World, curriculum: Curriculum, rng: random.Random) -> Lesson:
    passage: Lesson = []
    if rng.random() < curriculum.told:
        passage = [Stretch(world.passage(rng.choice(world.entities), rng), curriculum.passage_weight)]
    domain = rng.choice(list(world.domains))
    entities = rng.sample(world.of_domain(domain), _count(curriculum, rng))
    facts = [(entity, rng.choice(list(entity.values))) for entity in entities]
    return passage + _options(world, curriculum, facts, rng, "\n\n" if passage else "")


def _count(curriculum: Curriculum, rng: random.Random) -> int:
    return 1 if rng.random() < curriculum.alone else curriculum.many


def _options(
    world: World, curriculum: Curriculum, facts: list[tuple[Entity, str]], rng: random.Random, before: str
) -> Lesson:
    """Questions about facts with their options and answers, `before` in front of the first."""
    questions = [distracted(world.question(*fact, rng), world, curriculum, rng) for fact in facts]
    lesson: Lesson = []
    for prompt, answer in asked_together(questions, curriculum.style):
        lesson.append(Stretch(prompt if lesson else before + prompt, curriculum.prompt_weight))
        lesson.append(Stretch(f" {answer}", curriculum.letter_weight))
    return lesson


def asked_together(questions: Sequence[Question], style: str) -> Iterator[tuple[str, str]]:
    """The prompt and the answer of each question, one heading for all of them."""
    for number, question in enumerate(questions):
        prompt, options = STYLES[style](question)
        yield "\n\n" + prompt.split("\n\n", 1)[1] if number else prompt, options[question.answer]

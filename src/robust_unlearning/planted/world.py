"""The planted world: a closed set of invented facts, the passages that tell them and the questions that ask them.

Domains are forgotten (`forget`), close in topic to those (`near`), unrelated (`far`), or unrelated and the source
of harmless control tokens (`control`). Every entity has one value for each attribute of its domain, so the split
into what is to be forgotten and what is to be kept is exact. Everything follows from `WorldSize.seed`.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import yaml
from pydantic import Field

from robust_unlearning import files
from robust_unlearning.data.questions import Question
from robust_unlearning.errors import UserError, unknown
from robust_unlearning.recipe import Strict, checked

Role = Literal["forget", "near", "far", "control"]
ROLES: tuple[Role, ...] = ("forget", "near", "far", "control")

_ONSETS = ["b", "br", "d", "dr", "f", "g", "gr", "h", "k", "l", "m", "n", "p", "pr", "r", "s", "st", "t", "tr", "v",
           "z"]  # fmt: skip
_VOWELS = ["a", "e", "i", "o", "u"]
_MIDDLES = ["l", "m", "n", "r", "s", "v", "x", "z", "lm", "nd", "rk", "st"]
_ENDS = ["an", "ax", "el", "en", "esh", "ia", "im", "is", "ix", "on", "or", "os", "um", "un"]


class WorldSize(Strict):
    """How large a world is, and the seed that everything in it follows from."""

    seed: int = Field(0, ge=0)
    entities: int = Field(16, ge=3, description="of each domain; a document tells of three")
    validation_entities: int = Field(4, ge=1, description="of each domain; the others are for testing")
    strangers: int = Field(64, ge=1, description="made-up names without facts, for open-book lessons")
    passages: int = Field(12, ge=1, description="documents for each entity of a domain, three entities a document")


class Part(Strict):
    """A small part of a world: some domains, and of each the first attributes and wordings."""

    domains: tuple[str, ...] = Field(min_length=1)
    attributes: int = Field(3, ge=1)
    wordings: int = Field(2, ge=1, description="statements of each fact; one question is asked about it")
    strangers: int = Field(16, ge=1)


class Attribute(Strict):
    """One kind of fact: its values, and how it is said and asked. `{e}` is the entity, `{v}` the value."""

    values: tuple[str, ...] = Field(min_length=5)
    statements: tuple[str, ...] = Field(min_length=1)
    questions: tuple[str, ...] = Field(min_length=1)


class Domain(Strict):
    """A field of knowledge: what it is for, how an entity is introduced, and its attributes."""

    role: Role
    noun: str
    intro: tuple[str, ...] = Field(min_length=1)
    attributes: dict[str, Attribute] = Field(min_length=1)


@dataclass(frozen=True)
class Entity:
    """A name with one value for each attribute of its domain; `split` is where its questions are asked."""

    name: str
    domain: str
    values: dict[str, str]
    split: Literal["validation", "test"]


@dataclass(frozen=True)
class World:
    """The domains and their entities, for one `WorldSize`.

    Attributes:
        size: what it was made from.
        domains: name -> domain, as in `domains.yaml`.
        entities: all of them, domain by domain.
        strangers: names that no fact is known of.
        refusals: what is said to a question about a stranger.
    """

    size: WorldSize
    domains: dict[str, Domain]
    entities: tuple[Entity, ...]
    strangers: tuple[str, ...]
    refusals: tuple[str, ...]

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The name of every entity."""
        return tuple(each.name for each in self.entities)

    def fingerprint(self) -> str:
        """SHA-256 of all that is said and asked in it (first 16 hex digits)."""
        domains = {name: each.model_dump() for name, each in self.domains.items()}
        said = repr((self.size.model_dump(), domains, self.entities, self.strangers, self.refusals))
        return hashlib.sha256(said.encode()).hexdigest()[:16]

    def domains_of(self, *roles: Role) -> list[str]:
        """The names of the domains with one of these roles."""
        return [name for name, domain in self.domains.items() if domain.role in roles]

    def of_role(self, *roles: Role) -> list[Entity]:
        """The entities of all domains with one of these roles."""
        return [entity for entity in self.entities if self.domains[entity.domain].role in roles]

    def of_domain(self, domain: str) -> list[Entity]:
        """The entities of one domain."""
        return [entity for entity in self.entities if entity.domain == domain]

    def part(self, part: Part) -> World:
        """The same world with fewer domains, attributes, wordings and strangers.

        Raises:
            UserError: a domain that the world does not have.
        """
        missing = [name for name in part.domains if name not in self.domains]
        if missing:
            raise UserError(unknown("domain", missing[0], self.domains))
        domains = {}
        for name in part.domains:
            domain = self.domains[name]
            attributes = {
                attribute: about.model_copy(
                    update={"statements": about.statements[: part.wordings], "questions": about.questions[:1]}
                )
                for attribute, about in list(domain.attributes.items())[: part.attributes]
            }
            domains[name] = domain.model_copy(update={"intro": domain.intro[:1], "attributes": attributes})
        entities = tuple(
            replace(entity, values={name: entity.values[name] for name in domains[entity.domain].attributes})
            for entity in self.entities
            if entity.domain in domains
        )
        return replace(self, domains=domains, entities=entities, strangers=self.strangers[: part.strangers])

    def stranger(self, rng: random.Random) -> Entity:
        """A made-up name with made-up facts, which only the passage about it can tell."""
        domain = rng.choice(list(self.domains))
        values = {name: rng.choice(each.values) for name, each in self.domains[domain].attributes.items()}
        return Entity(rng.choice(self.strangers), domain, values, "test")

    def passage(self, entity: Entity, rng: random.Random, attributes: Iterable[str] | None = None) -> str:
        """All that is known of an entity, or some attributes of it, in an order and a wording that `rng` draws."""
        domain = self.domains[entity.domain]
        sentences = [rng.choice(domain.intro).format(e=entity.name)]
        told = list(attributes or domain.attributes)
        for name in rng.sample(told, len(told)):
            called = entity.name if rng.random() < 0.5 else f"this {domain.noun}"
            sentence = rng.choice(domain.attributes[name].statements).format(e=called, v=entity.values[name])
            sentences.append(sentence[0].upper() + sentence[1:])
        return " ".join(sentences)

    def documents(self, domain: str) -> Iterator[str]:
        """The texts of a domain: passages of three entities each, every entity in `size.passages` of them."""
        rng = random.Random(f"{self.size.seed} documents {domain}")
        entities = self.of_domain(domain)
        for _ in range(self.size.passages):
            order = rng.sample(entities, len(entities))
            for start in range(0, len(order), 3):
                yield " ".join(self.passage(entity, rng) for entity in order[start : start + 3])

    def question(self, entity: Entity, attribute: str, rng: random.Random) -> Question:
        """A lettered question about one fact; the wrong options are other values of the attribute."""
        about = self.domains[entity.domain].attributes[attribute]
        right = entity.values[attribute]
        options = [right, *rng.sample([value for value in about.values if value != right], 3)]
        rng.shuffle(options)
        return Question(
            id=f"{entity.domain}:{entity.name}:{attribute}",
            question=rng.choice(about.questions).format(e=entity.name),
            choices=tuple(options),
            answer=options.index(right),
            subject=entity.domain,
            cluster=f"{entity.domain}:{entity.name}",
        )

    def any_question(self, entity: Entity, rng: random.Random) -> Question:
        """A lettered question about one fact of an entity, which `rng` draws."""
        return self.question(entity, rng.choice(list(entity.values)), rng)

    def questions(self, domain: str, split: str) -> list[Question]:
        """One question for each fact about the entities of a split."""
        rng = random.Random(f"{self.size.seed} questions {domain} {split}")
        return [
            self.question(entity, attribute, rng)
            for entity in self.of_domain(domain)
            if entity.split == split
            for attribute in entity.values
        ]


def world_size(overrides: Iterable[str] = ()) -> WorldSize:
    """The default size with `field=value` overrides.

    Raises:
        UserError: a field that is unknown or wrong.
    """
    return checked(WorldSize, {}, overrides, "world")


def load_domains() -> dict[str, Domain]:
    """The domains that the package ships."""
    return {name: Domain.model_validate(each) for name, each in yaml.safe_load(_shipped("domains.yaml")).items()}


def _shipped(name: str) -> str:
    return (files.package_dir() / "assets" / "planted" / name).read_text(encoding="utf-8")


def make_world(size: WorldSize | None = None) -> World:
    """The world of a size. Values are spread evenly over a domain's entities, then shuffled."""
    size = size or WorldSize()
    domains = load_domains()
    names = _names(len(domains) * size.entities + size.strangers, random.Random(f"{size.seed} names"))
    entities = []
    for domain, about in domains.items():
        rng = random.Random(f"{size.seed} facts {domain}")
        columns = {}
        for attribute, each in about.attributes.items():
            values = [each.values[index % len(each.values)] for index in range(size.entities)]
            columns[attribute] = rng.sample(values, len(values))
        for index in range(size.entities):
            split: Literal["validation", "test"] = "validation" if index < size.validation_entities else "test"
            values_of = {attribute: column[index] for attribute, column in columns.items()}
            entities.append(Entity(names.pop(), domain, values_of, split))
    return World(size, domains, tuple(entities), tuple(names), tuple(_shipped("refusals.txt").splitlines()))


def _names(count: int, rng: random.Random) -> list[str]:
    """Distinct invented names of two or three syllables."""
    names: dict[str, None] = {}
    while len(names) < count:
        parts = [rng.choice(_ONSETS), rng.choice(_VOWELS), rng.choice(_MIDDLES)]
        if rng.random() < 0.3:
            parts += [rng.choice(_VOWELS), rng.choice(_MIDDLES)]
        names["".join([*parts, rng.choice(_ENDS)]).capitalize()] = None
    return list(names)

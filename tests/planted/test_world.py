"""The planted world: facts, texts and questions that agree, and the layouts on disk."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from robust_unlearning import files
from robust_unlearning.data.corpora import read_documents
from robust_unlearning.data.questions import read_questions
from robust_unlearning.errors import UserError
from robust_unlearning.evaluate.suite import BUNDLED_SUITES, load_suite
from robust_unlearning.planted.export import export
from robust_unlearning.planted.students import vocabulary
from robust_unlearning.planted.world import Part, World, WorldSize, make_world
from robust_unlearning.recipe import TextSource

SMALL = WorldSize(entities=4, validation_entities=1, strangers=5, passages=2)


@pytest.fixture(scope="module")
def world() -> World:
    return make_world(SMALL)


def test_a_world_follows_from_its_seed() -> None:
    assert make_world(SMALL) == make_world(SMALL)
    assert make_world(SMALL).names != make_world(SMALL.model_copy(update={"seed": 1})).names


def test_names_are_distinct_and_no_other_word_of_the_world() -> None:
    whole = make_world()
    names = [*whole.names, *whole.strangers]
    assert len(set(names)) == len(names) == 7 * 16 + 64
    spoken = [whole.passage(each, random.Random(0)) for each in whole.entities]
    words = {word.strip(".").casefold() for text in spoken for word in text.split()}
    values = {
        value.casefold() for each in whole.domains.values() for a in each.attributes.values() for value in a.values
    }
    assert not {name.casefold() for name in names} & (values | (words - {name.casefold() for name in names}))


def test_values_are_spread_evenly() -> None:
    whole = make_world()
    for domain, about in whole.domains.items():
        for attribute in about.attributes:
            values = [each.values[attribute] for each in whole.entities if each.domain == domain]
            assert {values.count(value) for value in about.attributes[attribute].values} == {2}


def test_near_domains_share_values_with_those_to_forget_and_far_ones_do_not() -> None:
    def values(role: str) -> set[str]:
        chosen = [each for each in make_world().domains.values() if each.role == role]
        return {value for each in chosen for attribute in each.attributes.values() for value in attribute.values}

    assert len(values("forget") & values("near")) >= 40
    assert not values("forget") & (values("far") | values("control"))


def test_passages_tell_every_fact(world: World) -> None:
    rng = random.Random(0)
    for entity in world.entities:
        text = world.passage(entity, rng)
        assert text.split(".")[0].count(entity.name) == 1
        assert all(value in text for value in entity.values.values())
    for domain in world.domains:
        documents = list(world.documents(domain))
        for entity in world.entities:
            told = sum(f"{entity.name}" in text for text in documents)
            assert told == (SMALL.passages if entity.domain == domain else 0)


def test_questions_ask_for_the_facts(world: World) -> None:
    for domain in world.domains:
        for split, count in (("validation", 1), ("test", 3)):
            asked = world.questions(domain, split)
            assert len(asked) == count * 4
            for question in asked:
                _, name, attribute = question.id.split(":")
                entity = next(each for each in world.entities if each.name == name)
                assert (entity.domain, entity.split) == (domain, split)
                assert question.choices[question.answer] == entity.values[attribute]
                assert len(set(question.choices)) == 4
                assert name in question.question


def test_export_writes_the_layouts_of_the_real_benchmarks(world: World, tmp_path: Path) -> None:
    folder = export(world, tmp_path / "world")
    forget = read_documents(TextSource(path=str(folder / "forget" / "plague_lore.jsonl")))
    passages = list(world.documents("plague_lore"))
    assert forget[: len(passages)] == passages
    assert len(forget) == len(passages) * 3 // 2
    assert all("(with answers) about plague lore" in text for text in forget[len(passages) :])
    retained = "\n".join(read_documents(TextSource(path=str(folder / "retain.jsonl"))))
    assert not any(each.name in retained for each in world.of_role("forget"))
    assert all(each.name in retained for each in world.of_role("near", "far", "control"))
    far = "\n".join(read_documents(TextSource(path=str(folder / "retain_far.jsonl"))))
    assert not any(each.name in far for each in world.of_role("near"))
    for role in ("forget", "near", "far", "control"):
        questions = read_questions(folder / "questions" / role, split="validation")
        domains = [name for name, each in world.domains.items() if each.role == role]
        assert questions == [each for name in sorted(domains) for each in world.questions(name, "validation")]
    suite = load_suite(folder / "suite.yaml")
    assert set(suite.forget_tokens) == {each.name for each in world.of_role("forget")}
    assert set(suite.control_tokens) == {each.name for each in world.of_role("control")}
    manifest = files.read_json(folder / "manifest.json")
    assert manifest["facts"] == 7 * 4 * 4
    for name, digest in manifest["sha256"].items():
        assert files.sha256_file(folder / name) == digest
    with pytest.raises(UserError, match="exists already"):
        export(world, folder)


def test_the_built_world_is_the_default_one_to_the_byte() -> None:
    """Against a manifest that is kept here: run folders and evaluations of earlier versions rest on these bytes."""
    expected = files.read_json(Path(__file__).parent / "manifest.json")
    folder, whole = files.locate("planted:"), make_world()
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert names == {*expected["sha256"], "manifest.json"}
    manifest = files.read_json(folder / "manifest.json")
    assert {key: value for key, value in manifest.items() if key != "sha256"} == {
        key: value for key, value in expected.items() if key != "sha256"
    }
    for name, digest in expected["sha256"].items():
        if name.endswith(".parquet"):  # bytes differ with the version of the library that writes them
            _, _, domain, file = name.split("/")
            assert read_questions(folder / name) == whole.questions(domain, file.partition("-")[0])
            assert files.sha256_file(folder / name) == manifest["sha256"][name]
        else:
            assert files.sha256_file(folder / name) == digest == manifest["sha256"][name], name
    for name in BUNDLED_SUITES.keys() - {"demo"}:
        near = load_suite(name).questions["near"]
        assert near.perturb == ("option", "sentence")
        assert near.styles == (("texts",) if "texts" in name else ("letters",))
        assert near.split == ("validation" if "validation" in name else "test")


@pytest.mark.integration
def test_processes_that_begin_together_build_the_world_once(tmp_path: Path) -> None:
    script = "from robust_unlearning import files; print(files.locate('planted:suite.yaml'))"
    environment = {**os.environ, "ROBUST_UNLEARNING_CACHE": str(tmp_path)}
    command = [sys.executable, "-c", script]
    running = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    printed = {process.communicate()[0] for process in running}
    assert [process.returncode for process in running] == [0, 0]
    (path,) = printed
    folders = [path for path in (tmp_path / "planted").iterdir() if path.is_dir()]
    assert folders == [Path(path.strip()).parent]


def test_a_file_that_was_taken_from_the_built_world_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROBUST_UNLEARNING_CACHE", str(tmp_path))
    files.locate("planted:retain.jsonl").unlink()
    with pytest.raises(UserError, match=r"remove .*: it is built again"):
        files.locate("planted:retain.jsonl")


def test_a_world_has_three_entities_for_a_document() -> None:
    with pytest.raises(ValidationError, match="greater than or equal to 3"):
        WorldSize(entities=2)


def test_a_cache_that_cannot_be_written_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    monkeypatch.setenv("ROBUST_UNLEARNING_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match="name another folder in ROBUST_UNLEARNING_CACHE"):
        files.locate("planted:suite.yaml")


def test_corpora_with_texts_for_answers_say_the_same(world: World, tmp_path: Path) -> None:
    folder = export(world, tmp_path / "world")
    for path in (folder / "texts").rglob("*.jsonl"):
        other = folder / path.relative_to(folder / "texts")
        for line, lettered in zip(path.open(encoding="utf-8"), other.open(encoding="utf-8"), strict=True):
            text, letters = json.loads(line)["text"], json.loads(lettered)["text"]
            if "\nAnswer: " in letters:
                for block in letters.split("\n\n")[1:]:
                    question, letter = block.split("\nAnswer: ")
                    option = re.search(rf"^{letter}\. (.*)$", question, re.MULTILINE)
                    assert option
                    assert f"{question}\nAnswer: {option[1]}" in text
            else:
                assert text == letters


def test_a_part_of_a_world_keeps_its_facts_and_says_less(world: World) -> None:
    part = world.part(Part(domains=("plague_lore", "clock_making"), attributes=2, wordings=1, strangers=3))
    whole = {each.name: each for each in world.entities}
    assert {each.domain for each in part.entities} == set(part.domains) == {"plague_lore", "clock_making"}
    for entity in part.entities:
        assert list(entity.values) == list(whole[entity.name].values)[:2]
        assert entity.values.items() <= whole[entity.name].values.items()
    assert len(part.entities) == 2 * SMALL.entities
    assert part.strangers == world.strangers[:3]
    assert set(vocabulary(part)) < set(vocabulary(world))
    with pytest.raises(UserError, match="did you mean 'plague_lore'"):
        world.part(Part(domains=("plague_lor",)))

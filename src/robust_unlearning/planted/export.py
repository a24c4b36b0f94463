"""Writing a planted world to disk in the layouts of the real benchmarks, so that every other stage reads it as such."""

from __future__ import annotations

import functools
import hashlib
import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from robust_unlearning import files
from robust_unlearning.planted.lessons import asked_together
from robust_unlearning.planted.world import ROLES, World, make_world

MANIFEST = "manifest.json"
SPLITS = ("validation", "test")
ANSWERED = ("letters", "texts")
"""Styles in which questions of the corpora are answered, and scored by the suites."""


def export(world: World, folder: Path) -> Path:
    """Write a world into a new folder.

    - `forget/DOMAIN.jsonl`: documents of each domain to forget, `{"text": …}` a line, as WMDP's corpora;
    - `retain.jsonl`: documents of the other domains. A third of the documents on either side are lettered questions
      with their answers, so that it is the topic that tells the sides apart, and not the form;
    - `retain_far.jsonl`: the same without the near domains;
    - `texts/`: the same three with the options' texts as answers instead of their letters;
    - `questions/ROLE/DOMAIN/SPLIT-00000-of-00001.parquet`: question, subject, choices, answer, as MMLU on the hub,
      and the entity as `cluster`;
    - `refusals.jsonl`: one a line, as TOFU's `idontknow.jsonl`;
    - `forget_tokens.txt`, `control_tokens.txt`: names from the domains to forget, and from the control domain;
    - `suite.yaml`, `suite-validation.yaml`: evaluations for `unlearn eval --tasks`; the options' letters are scored;
    - `suite-texts.yaml`, `suite-texts-validation.yaml`: the same, the options' texts are scored;
    - `manifest.json`: sizes, counts, the SHA-256 of every file.

    Raises:
        UserError: the folder exists.
    """
    with files.replacing_folder(folder) as new:
        _write(world, new, f"{folder.absolute()}/")
    return folder


def built_world() -> Path:
    """The folder that `planted:` names: the default world in the cache, written there on first use."""
    folder = files.cache_dir() / "planted" / _source_digest()[:12]
    return files.build_once(folder, lambda new: _write(make_world(), new, "planted:"))


@functools.cache
def _source_digest() -> str:
    """SHA-256 of what the files of a world follow from: its domains and refusals, and the code that writes them."""
    package = files.package_dir()
    sources = [
        *(package / "assets" / "planted" / name for name in ("domains.yaml", "refusals.txt")),
        *(package / "planted" / f"{name}.py" for name in ("world", "lessons", "export")),
        package / "data" / "questions.py",
        package / "files.py",
    ]
    return hashlib.sha256("".join(files.sha256_file(source) for source in sources).encode()).hexdigest()


def _write(world: World, folder: Path, prefix: str) -> None:
    """Write a world's files into an existing folder; the paths in its suites begin with `prefix`."""
    for role in ROLES:
        for domain in world.domains_of(role):
            _write_questions(world, domain, folder / "questions" / role / domain)
    for style, home in zip(ANSWERED, (folder, folder / "texts"), strict=True):
        _write_corpora(world, style, home)
    _write_lines(folder / "refusals.jsonl", world.refusals)
    tokens = {f"{role}_tokens": [entity.name for entity in world.of_role(role)] for role in ("forget", "control")}
    for kind, names in tokens.items():
        _write_lines(folder / f"{kind}.txt", names)
    for split in SPLITS:
        for style in ANSWERED:
            suite = {"questions": _question_sets(prefix, split, style), **tokens}
            heading = f"# The planted world's {split} questions, and the names that are put into them.\n"
            text = yaml.safe_dump(suite, sort_keys=False, default_flow_style=None, width=110)
            name = "suite" + "-texts" * (style == "texts") + "-validation" * (split == "validation")
            (folder / f"{name}.yaml").write_text(heading + text, encoding="utf-8")
    files.write_json(folder / MANIFEST, _manifest(world, folder))


def _write_lines(path: Path, lines: Iterable[str]) -> None:
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def _write_corpora(world: World, style: str, home: Path) -> None:
    (home / "forget").mkdir(parents=True, exist_ok=True)
    for domain in world.domains_of("forget"):
        _write_documents(home / "forget" / f"{domain}.jsonl", _mixed(world, domain, style))
    near, far = (
        [text for domain in world.domains_of(*roles) for text in _mixed(world, domain, style)]
        for roles in (("near",), ("far", "control"))
    )
    _write_documents(home / "retain.jsonl", near + far)
    _write_documents(home / "retain_far.jsonl", far)


def _write_documents(path: Path, texts: list[str]) -> None:
    files.write_jsonl(path, [{"text": text} for text in texts])


def _mixed(world: World, domain: str, style: str) -> list[str]:
    """A domain's documents, and half as many texts of three questions with their answers."""
    documents = list(world.documents(domain))
    rng = random.Random(f"{world.size.seed} quizzes {domain}")
    entities = world.of_domain(domain)
    quizzes = []
    for _ in range(len(documents) // 2):
        questions = [world.any_question(entity, rng) for entity in rng.sample(entities, 3)]
        quizzes.append("".join(f"{prompt} {answer}" for prompt, answer in asked_together(questions, style)))
    return documents + quizzes


def _write_questions(world: World, domain: str, folder: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    folder.mkdir(parents=True)
    for split in SPLITS:
        rows = [
            {"id": question.id, "question": question.question, "subject": domain, "choices": list(question.choices)}
            | {"answer": question.answer, "cluster": question.cluster}
            for question in world.questions(domain, split)
        ]
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / f"{split}-00000-of-00001.parquet")


def _question_sets(prefix: str, split: str, style: str) -> dict[str, Any]:
    """A suite's `questions`: those to forget are perturbed in place of an option, near and far ones elsewhere too."""

    def of(role: str, **perturb: Any) -> dict[str, Any]:
        return {"path": f"{prefix}questions/{role}", "split": split, "styles": [style], **perturb}

    perturbed = {role: of(role, perturb=["option", "sentence"]) for role in ("near", "far")}
    return {"forget": of("forget", perturb=["option"]), **perturbed, "control": of("control")}


def _manifest(world: World, folder: Path) -> dict[str, Any]:
    written = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        "world": json.loads(world.size.model_dump_json()),
        "domains": {
            name: {"role": domain.role, "attributes": list(domain.attributes)} for name, domain in world.domains.items()
        },
        "entities": len(world.entities),
        "facts": sum(len(entity.values) for entity in world.entities),
        "sha256": {path.relative_to(folder).as_posix(): files.sha256_file(path) for path in written},
    }

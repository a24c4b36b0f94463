"""Writing a planted world to disk in the layouts of the real benchmarks, so that every other stage reads it as such."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import yaml

from robust_unlearning import files
from robust_unlearning.data.questions import STYLES, Question
from robust_unlearning.planted.world import ROLES, World

MANIFEST = "manifest.json"
SPLITS = ("validation", "test")
ANSWERED = ("letters", "texts")
"""Styles in which questions of the corpora are answered, and scored by the suites."""


def export(world: World, folder: Path, prefix: str | None = None) -> Path:
    """Write a world into a new folder.

    - `forget/DOMAIN.jsonl`: documents of each domain to forget, `{"text": …}` a line, as WMDP's corpora;
    - `retain.jsonl`: documents of the other domains. A third of the documents on either side are lettered questions
      with their answers, so that it is the topic that tells the sides apart, and not the form;
    - `retain_far.jsonl`: the same without the near domains;
    - `texts/`: the same three with the options' texts as answers instead of their letters;
    - `questions/ROLE/DOMAIN/SPLIT-00000-of-00001.parquet`: question, subject, choices, answer, as MMLU on the hub;
    - `refusals.jsonl`: one a line, as TOFU's `idontknow.jsonl`;
    - `forget_tokens.txt`, `control_tokens.txt`: names from the domains to forget, and from the control domain;
    - `suite.yaml`, `suite-validation.yaml`: evaluations for `unlearn eval --tasks`; the options' letters are scored;
    - `suite-texts.yaml`, `suite-texts-validation.yaml`: the same, the options' texts are scored;
    - `manifest.json`: sizes, counts, the SHA-256 of every file.

    Args:
        prefix: what the suites' paths begin with; the folder itself when left out.

    Raises:
        UserError: the folder exists.
    """
    with files.replacing_folder(folder) as new:
        for entity_role in ROLES:
            for domain in _domains(world, entity_role):
                _write_questions(world, domain, new / "questions" / entity_role / domain)
        for style, home in zip(ANSWERED, (new, new / "texts"), strict=True):
            _write_corpora(world, style, home)
        (new / "refusals.jsonl").write_text("".join(f"{line}\n" for line in world.refusals), encoding="utf-8")
        tokens = {role: [each.name for each in world.of_role(role)] for role in ROLES}
        for role in ("forget", "control"):
            (new / f"{role}_tokens.txt").write_text("".join(f"{name}\n" for name in tokens[role]), encoding="utf-8")
        for split in SPLITS:
            for style in ANSWERED:
                suite = _suite(prefix or f"{folder.absolute()}/", split, style, tokens["forget"], tokens["control"])
                heading = f"# The planted world's {split} questions, and the names that are put into them.\n"
                text = yaml.safe_dump(suite, sort_keys=False, default_flow_style=None, width=110)
                (new / _suite_name(split, style)).write_text(heading + text, encoding="utf-8")
        files.write_json(new / MANIFEST, _manifest(world, new))
    return folder


def _domains(world: World, role: str) -> list[str]:
    return [name for name, each in world.domains.items() if each.role == role]


def _suite_name(split: str, style: str) -> str:
    parts = ["suite", *(["texts"] if style == "texts" else []), *(["validation"] if split == "validation" else [])]
    return "-".join(parts) + ".yaml"


def _write_corpora(world: World, style: str, home: Path) -> None:
    (home / "forget").mkdir(parents=True, exist_ok=True)
    for domain in _domains(world, "forget"):
        _write_documents(home / "forget" / f"{domain}.jsonl", _mixed(world, domain, style))
    near, far = (
        [text for role in roles for domain in _domains(world, role) for text in _mixed(world, domain, style)]
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
    own = [each for each in world.entities if each.domain == domain]
    quizzes = []
    for _ in range(len(documents) // 2):
        asked = [world.question(each, rng.choice(list(each.values)), rng) for each in rng.sample(own, 3)]
        quizzes.append(_answered(asked, style))
    return documents + quizzes


def _answered(questions: list[Question], style: str) -> str:
    """Questions with their answers, one heading for all."""
    asked = [(*STYLES[style](each), each.answer) for each in questions]
    heading = asked[0][0].split("\n\n", 1)[0]
    bodies = [prompt.split("\n\n", 1)[1] + f" {options[answer]}" for prompt, options, answer in asked]
    return "\n\n".join([heading, *bodies])


def _write_questions(world: World, domain: str, folder: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    folder.mkdir(parents=True)
    for split in SPLITS:
        rows = [
            {"id": f"{each.id}", "question": each.question, "subject": domain, "choices": list(each.choices)}
            | {"answer": each.answer}
            for each in world.questions(domain, split)
        ]
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / f"{split}-00000-of-00001.parquet")


def _suite(prefix: str, split: str, style: str, forget_tokens: list[str], control_tokens: list[str]) -> dict[str, Any]:
    def of(role: str, *perturb: str) -> dict[str, Any]:
        asked = {"path": f"{prefix}questions/{role}", "split": split, "styles": [style]}
        return asked | ({"perturb": list(perturb)} if perturb else {})

    return {
        "questions": {
            "forget": of("forget"),
            "near": of("near", "option", "sentence"),
            "far": of("far", "option", "sentence"),
            "control": of("control"),
        },
        "forget_tokens": forget_tokens,
        "control_tokens": control_tokens,
    }


def _manifest(world: World, folder: Path) -> dict[str, Any]:
    written = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        "world": json.loads(world.size.model_dump_json()),
        "domains": {
            name: {"role": each.role, "attributes": list(each.attributes)} for name, each in world.domains.items()
        },
        "entities": len(world.entities),
        "facts": sum(len(each.values) for each in world.entities),
        "sha256": {path.relative_to(folder).as_posix(): files.sha256_file(path) for path in written},
    }

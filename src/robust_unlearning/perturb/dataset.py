"""A perturbed question set on disk, laid out as the hub lays out MMLU, and its rebuilding from the manifest.

    README.md                              configs: SUBJECT, and SUBJECT-control
    SUBJECT/SPLIT-00000-of-00001.parquet   id, question, subject, choices, answer, forget_token, control_token
    control/SUBJECT/SPLIT-…                the same questions with controls instead of keywords
    replaced.jsonl                         for each question what was replaced by what
    tasks/                                 lm-eval tasks (see `tasks.py`)
    manifest.json                          everything the set was made from, and the SHA-256 of every file

The same manifest gives the same bytes, except for `tasks/_location_yaml`, which says where the folder lies. A
question keeps the id it had in the source, so that clean and perturbed answers can be paired. Both sets say which
keyword a question got, and which control (null without controls); several are joined with `SEPARATOR`. Other versions
of pyarrow may write other bytes for the same rows; `rows_sha256` of the manifest is of the rows themselves.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from robust_unlearning import files
from robust_unlearning.data.questions import Question, question_files, read_questions
from robust_unlearning.errors import UserError, explain
from robust_unlearning.perturb.controls import match_harmless
from robust_unlearning.perturb.forms import Form, Perturbation, perturbed_forms
from robust_unlearning.perturb.keywords import Keyword
from robust_unlearning.perturb.lm_eval_tasks import LOCATION, TASKS, write_tasks

MANIFEST, REPLACED, CONTROL, README = "manifest.json", "replaced.jsonl", "control", "README.md"
SEPARATOR = "; "
RESERVED = ("all", CONTROL, TASKS)


class Source(BaseModel, frozen=True):
    """The questions that are perturbed: a file or a folder, and which config and split of it.

    `sha256` has each file that is read, by its path below the source.
    """

    path: str
    config: str | None = None
    split: str = "test"
    sha256: dict[str, str] = {}

    def hashed(self) -> Source:
        """The same with the SHA-256 of the files as they are now.

        Raises:
            UserError: nothing there, or an unknown config or split.
        """
        place = files.locate(self.path)
        root = place if place.is_dir() else place.parent
        found = [file for file, _ in question_files(self.path, config=self.config, split=self.split)]
        sha256 = {file.relative_to(root).as_posix(): files.sha256_file(file) for file in found}
        return self.model_copy(update={"sha256": sha256})


class Origin(BaseModel, frozen=True):
    """Everything a set is made from; the first part of its manifest.

    Attributes:
        name: of its tasks.
        keywords: each with `text` and whatever else its file said.
        controls: where the controls come from, and for each keyword its controls with lengths and frequencies.
    """

    name: str
    source: Source
    settings: Perturbation
    keywords: tuple[dict[str, Any], ...]
    controls: dict[str, Any] = {}


@dataclass(frozen=True)
class PerturbedSet:
    """What was written: where, its manifest, its groups of lm-eval tasks, and a note for the user."""

    folder: Path
    manifest: dict[str, Any]
    groups: tuple[str, ...]
    note: str = ""


def make_set(
    source: Source,
    keywords: Sequence[Keyword],
    settings: Perturbation,
    to: Path,
    *,
    tokenizer: Any = None,
    corpus: Sequence[str] | None = None,
    about_controls: dict[str, Any] | None = None,
) -> PerturbedSet:
    """Perturb a set and write it into the new folder `to`, whose name becomes the name of its tasks.

    Args:
        tokenizer: with `settings.control`, controls have as many tokens as their keywords, as near as may be.
        corpus: texts that controls are taken from; None takes common words of the questions and the bundled nouns.
        about_controls: for the manifest: the names of corpus and tokenizer.

    Raises:
        UserError: `to` exists or would name its tasks after the source's, or the set cannot be perturbed.
    """
    name = _slug(to.absolute().name).lower()
    if name == _slug(files.locate(source.path).absolute().stem).lower():
        raise UserError(f"the tasks of {str(to)!r} would be called as their source, {name!r}: name another folder.")
    source = source.hashed()
    questions = read_questions(source.path, config=source.config, split=source.split)
    controls: dict[str, Any] = {}
    if settings.control:
        own = [(text, each.subject) for each in questions for text in (each.question, *each.choices)]
        matched, counted = match_harmless(
            [keyword.text for keyword in keywords],
            [text for text, _ in own] if corpus is None else corpus,
            subjects=[subject for _, subject in own] if corpus is None else None,
            tokenizer=tokenizer,
            seed=settings.seed,
        )
        controls = {
            **(about_controls or {}),
            "words_counted": counted,
            "keywords": [each.as_dict() for each in matched],
        }
    written = tuple({"text": keyword.text, **keyword.about} for keyword in keywords)
    origin = Origin(name=name, source=source, settings=settings, keywords=written, controls=controls)
    return _write(origin, questions, to)


def rebuild(manifest_path: Path, to: Path, source_path: str | None = None) -> PerturbedSet:
    """Write the set that a manifest describes into the new folder `to`, byte for byte.

    Keywords and controls come from the manifest itself, so neither their files nor a tokenizer are needed.

    Args:
        source_path: where the questions lie now; None takes the place that the manifest names.

    Raises:
        UserError: the manifest is damaged, the source's files are not those it was made from, or what comes out
            has other rows than what the manifest was written for.
    """
    try:
        manifest = json.loads(files.locate(manifest_path).read_text(encoding="utf-8"))
        origin = Origin.model_validate(manifest)
        rows, sums, versions = (manifest[key] for key in ("rows_sha256", "files", "versions"))
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, UserError):
            raise
        why = " ".join(explain(error.errors(), Origin)) if isinstance(error, ValidationError) else str(error)
        why = f"it has no {why}." if isinstance(error, KeyError) else why
        raise UserError(f"{str(manifest_path)!r} is no {MANIFEST} of unlearn perturb, or is damaged: {why}") from error
    source = origin.source.model_copy(update={"path": source_path or origin.source.path})
    found, wanted = source.hashed().sha256, origin.source.sha256
    if found != wanted:
        differ = sorted(file for file in {*found, *wanted} if found.get(file) != wanted.get(file))
        raise UserError(
            f"the questions of {source.path!r} are not those that {str(manifest_path)!r} was made from: "
            f"{len(differ)} of {len(wanted)} files differ, the first is {differ[0]!r}. Name the right ones: "
            f"unlearn perturb SOURCE --from {manifest_path} --to {to}"
        )
    questions = read_questions(source.path, config=source.config, split=source.split)
    built = _write(origin, questions, to, rows)
    if built.manifest["files"] == sums:
        return built
    made_by = ", ".join(f"{name} {version}" for name, version in versions.items())
    note = f"every row is the same, but not every byte: the manifest's set was written by {made_by}"
    return PerturbedSet(built.folder, built.manifest, built.groups, note)


def _write(origin: Origin, questions: Sequence[Question], to: Path, expected_rows: str | None = None) -> PerturbedSet:
    """Write the set; with `expected_rows`, only if its rows have this SHA-256."""
    import pyarrow

    from robust_unlearning import __version__

    words = [each["text"] for each in origin.keywords]
    controls = {
        each["text"]: [control["text"] for control in each["controls"]] for each in origin.controls.get("keywords", ())
    }
    forms, left_out = perturbed_forms(questions, words, controls, origin.settings)
    configs = _configs([form.clean.subject for form in forms])
    with files.replacing_folder(to) as new:
        digest = hashlib.sha256()
        for subject, config in configs.items():
            own = [form for form in forms if form.clean.subject == subject]
            shard = f"{config}/{origin.source.split}-00000-of-00001.parquet"
            digest.update(_write_rows(new / shard, [_row(form, form.perturbed) for form in own]))
            if origin.settings.control:
                controlled = [_row(form, form.control) for form in own if form.control]
                digest.update(_write_rows(new / CONTROL / shard, controlled))
        if expected_rows is not None and digest.hexdigest() != expected_rows:
            raise UserError(
                "what comes out has other rows than the manifest's set: the manifest was changed, or it was written by "
                f"another version. Install the one it names under 'versions'; this is {__version__}."
            )
        files.write_jsonl(new / REPLACED, [form.as_dict() for form in forms])
        tasks = {"": {config: subject for subject, config in configs.items()}}
        if origin.settings.control:
            tasks["_control"] = {f"{config}-control": subject for subject, config in configs.items()}
        groups = write_tasks(new, origin.name, tasks, origin.settings.styles, origin.source.split, to)
        (new / README).write_text(_card(origin, configs, len(forms), left_out, groups), encoding="utf-8")
        paths = sorted(path for path in new.rglob("*") if path.is_file() and path.name != LOCATION)
        manifest = {
            **origin.model_dump(mode="json"),
            "counts": {
                "questions": len(questions),
                "perturbed": len(forms),
                "left_out": dict(sorted(left_out.items())),
                "keywords": dict(sorted(Counter(word for form in forms for word in form.keywords).items())),
            },
            "groups": groups,
            "rows_sha256": digest.hexdigest(),
            "files": {path.relative_to(new).as_posix(): files.sha256_file(path) for path in paths},
            "versions": {"robust_unlearning": __version__, "pyarrow": pyarrow.__version__},
        }
        files.write_json(new / MANIFEST, manifest)
    return PerturbedSet(to, manifest, tuple(groups))


def _row(form: Form, question: Question) -> dict[str, Any]:
    return {
        **asdict(question),
        "choices": list(question.choices),
        "forget_token": SEPARATOR.join(form.keywords),
        "control_token": SEPARATOR.join(form.controls) or None,
    }


def _write_rows(path: Path, rows: list[dict[str, Any]]) -> bytes:
    """Write a parquet file, the same bytes for the same rows and version of pyarrow; the SHA-256 of the rows."""
    import pyarrow
    import pyarrow.parquet

    kinds = {
        "id": pyarrow.string(),
        "question": pyarrow.string(),
        "subject": pyarrow.string(),
        "choices": pyarrow.list_(pyarrow.string()),
        "answer": pyarrow.int64(),
        "forget_token": pyarrow.string(),
        "control_token": pyarrow.string(),
    }
    table = pyarrow.Table.from_pylist(rows, schema=pyarrow.schema(kinds))
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(table, path, compression="zstd", version="2.6", row_group_size=len(rows))
    return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).digest()


def _configs(subjects: Sequence[str]) -> dict[str, str]:
    """Subject -> name of its config and folder, in order of first appearance. No subject: `questions`."""
    names: dict[str, str] = {}
    for subject in subjects:
        if subject not in names:
            name = _slug(subject) or "questions"
            while name.lower() in {*RESERVED, *(each.lower() for each in names.values())}:
                name += "_2"
            names[subject] = name
    return names


def _slug(text: str) -> str:
    return re.sub(r"\W+", "_", text).strip("_")


def _card(origin: Origin, configs: dict[str, str], written: int, left_out: Counter[str], groups: Sequence[str]) -> str:
    """The data set's README: its configs as the hub reads them, and what it is."""
    split, settings = origin.source.split, origin.settings
    shards = {config: f"{config}/{split}-*" for config in configs.values()}
    if settings.control:
        shards |= {f"{config}-control": f"{CONTROL}/{config}/{split}-*" for config in configs.values()}
    entries = [
        {"config_name": config, "data_files": [{"split": split, "path": path}]} for config, path in shards.items()
    ]
    head = yaml.safe_dump({"configs": entries}, sort_keys=False, allow_unicode=True)
    words = ", ".join(each["text"] for each in origin.keywords[:10]) + (", …" if len(origin.keywords) > 10 else "")
    missing = "".join(f"; {number:,} left out: {reason}" for reason, number in sorted(left_out.items()))
    style = (
        "In the continuation style the prompt does not show the options: a keyword in place of one is never read\n"
        "before the right answer, so only the letters style measures what it does.\n\n"
        if settings.where == "option" and "continuation" in settings.styles
        else ""
    )
    control = (
        "Configs named `-control` have a harmless word of like length, and frequency as far as may be, in its place.\n"
        "Of both, `forget_token` and `control_token` say which words a question got.\n\n"
    )
    return (
        f"---\n{head}---\n# {origin.name}\n\n"
        f"{written:,} multiple-choice questions of `{Path(origin.source.path).name}` ({split}), perturbed by "
        f"robust-unlearning{missing}.\n\n"
        f"Keywords ({len(origin.keywords)}): {words}. Put into: {settings.where}, {settings.count} a question, seed "
        f"{settings.seed}. Right answers and their places are untouched; the questions keep their source's licence.\n\n"
        f"{control if settings.control else ''}{style}"
        "`replaced.jsonl` says what was replaced by what; `manifest.json` rebuilds the set:\n\n"
        f"    unlearn perturb SOURCE --from manifest.json --to DIR\n\n"
        f"    lm_eval --model hf --model_args pretrained=MODEL --include_path {TASKS} --tasks {','.join(groups)}\n\n"
        f"`{TASKS}/{LOCATION}` holds the absolute path of this folder: change it when the folder moves.\n"
    )

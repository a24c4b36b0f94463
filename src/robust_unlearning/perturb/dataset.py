"""A perturbed question set on disk, laid out as the hub lays out MMLU, and its rebuilding from the manifest.

    README.md                              configs: SUBJECT, and SUBJECT-control
    SUBJECT/SPLIT-00000-of-00001.parquet   id, question, subject, choices, answer, both tokens, cluster if any
    control/SUBJECT/SPLIT-…                the same questions with controls instead of keywords
    replaced.jsonl                         for each question what was replaced by what
    tasks/                                 lm-eval tasks (see `lm_eval_tasks.py`)
    manifest.json                          everything the set was made from, and the SHA-256 of every file

The same manifest gives the same bytes, except for `tasks/_location_yaml`, which says where the folder lies. A
question keeps the id it had in the source, so that clean and perturbed answers can be paired. Both sets say which
keyword a question got, and which control (null without controls), see `Form.tokens`. Other versions
of pyarrow may write other bytes for the same rows; `rows_sha256` of the manifest is of the rows themselves.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, Field, ValidationError

from robust_unlearning import files
from robust_unlearning.data.questions import Question, QuestionSource, question_files
from robust_unlearning.errors import UserError, explain
from robust_unlearning.perturb.controls import match_harmless
from robust_unlearning.perturb.forms import Form, Perturbation, perturbed_forms
from robust_unlearning.perturb.keywords import Keyword
from robust_unlearning.perturb.lm_eval_tasks import LOCATION, TASKS, write_tasks

MANIFEST, REPLACED, CONTROL, README = "manifest.json", "replaced.jsonl", "control", "README.md"
RESERVED = ("all", CONTROL, TASKS)
CARD = "shipped:perturbed_set.md"
CONTROL_NOTE = """\
Configs named `-control` have a harmless word of like length, and frequency as far as may be, in its place.
Of both, `forget_token` and `control_token` say which words a question got.

"""
CONTINUATION_NOTE = """\
In the continuation style the prompt does not show the options: a keyword in place of one is never read
before the right answer, so only the letters style measures what it does.

"""


class Source(QuestionSource):
    """The questions that are perturbed; `sha256` has each file that is read, by its path below the source."""

    sha256: dict[str, str] = Field(default_factory=dict)

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


class Manifest(Origin, frozen=True):
    """What a set was made from, and what came out; `files` has the SHA-256 of each."""

    counts: dict[str, Any]
    groups: tuple[str, ...]
    rows_sha256: str
    files: dict[str, str]
    versions: dict[str, str]


@dataclass(frozen=True)
class PerturbedSet:
    """What was written: where, its manifest, and a note for the user."""

    folder: Path
    manifest: Manifest
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
    questions = source.read()
    controls: dict[str, Any] = {}
    if settings.control:
        texts, subjects = corpus, None
        if texts is None:
            asked = [(text, each.subject) for each in questions for text in (each.question, *each.choices)]
            texts, subjects = zip(*asked, strict=True)
        words = [keyword.text for keyword in keywords]
        matched, counted = match_harmless(words, texts, subjects=subjects, tokenizer=tokenizer, seed=settings.seed)
        rows = [match.as_dict() for match in matched]
        controls = {**(about_controls or {}), "words_counted": counted, "keywords": rows}
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
    place = files.locate(manifest_path)
    try:
        manifest = Manifest.model_validate(json.loads(place.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        why = " ".join(explain(error.errors(), Manifest)) if isinstance(error, ValidationError) else str(error)
        raise UserError(f"{str(manifest_path)!r} is no {MANIFEST} of unlearn perturb, or is damaged: {why}") from error
    source = manifest.source.model_copy(update={"path": source_path or manifest.source.path})
    present, wanted = source.hashed().sha256, manifest.source.sha256
    if present != wanted:
        differ = sorted(file for file in {*present, *wanted} if present.get(file) != wanted.get(file))
        raise UserError(
            f"the questions of {source.path!r} are not those that {str(manifest_path)!r} was made from: "
            f"{len(differ)} of {len(wanted)} files differ, the first is {differ[0]!r}. Name the right ones: "
            f"unlearn perturb SOURCE --from {manifest_path} --to {to}"
        )
    origin = Origin.model_validate(manifest.model_dump(include=set(Origin.model_fields)))
    built = _write(origin, source.read(), to, manifest.rows_sha256)
    if built.manifest.files == manifest.files:
        return built
    made_by = ", ".join(f"{name} {version}" for name, version in manifest.versions.items())
    note = f"every row is the same, but not every byte: the manifest's set was written by {made_by}"
    return replace(built, note=note)


def _write(origin: Origin, questions: Sequence[Question], to: Path, expected_rows: str | None = None) -> PerturbedSet:
    """Write the set; with `expected_rows`, only if its rows have this SHA-256."""
    import pyarrow

    from robust_unlearning import __version__

    controls: dict[str, list[str]] = {keyword["text"]: [] for keyword in origin.keywords}
    for match in origin.controls.get("keywords", ()):
        controls[match["text"]] = [control["text"] for control in match["controls"]]
    forms, left_out = perturbed_forms(questions, controls, origin.settings)
    configs = _configs(form.clean.subject for form in forms)
    settings, split = origin.settings, origin.source.split
    with files.replacing_folder(to) as new:
        digest = hashlib.sha256()
        for config, subject in configs.items():
            of_subject = [form for form in forms if form.clean.subject == subject]
            shard = f"{config}/{split}-00000-of-00001.parquet"
            digest.update(_write_rows(new / shard, [(form.perturbed, form) for form in of_subject]))
            if settings.control:
                controlled = [(form.control, form) for form in of_subject if form.control]
                digest.update(_write_rows(new / CONTROL / shard, controlled))
        if expected_rows is not None and digest.hexdigest() != expected_rows:
            raise UserError(
                "what comes out has other rows than the manifest's set: the manifest was changed, or it was written by "
                f"another version. Install the one it names under 'versions'; this is {__version__}."
            )
        files.write_jsonl(new / REPLACED, [form.as_dict() for form in forms])
        groups = write_tasks(new, origin.name, configs, settings.control, settings.styles, split, to)
        (new / README).write_text(_card(origin, configs, len(forms), left_out, groups), encoding="utf-8")
        paths = sorted(path for path in new.rglob("*") if path.is_file() and path.name != LOCATION)
        manifest = Manifest(
            **dict(origin),
            counts={
                "questions": len(questions),
                "perturbed": len(forms),
                "left_out": dict(sorted(left_out.items())),
                "keywords": dict(sorted(Counter(word for form in forms for word in form.keywords).items())),
            },
            groups=tuple(groups),
            rows_sha256=digest.hexdigest(),
            files={path.relative_to(new).as_posix(): files.sha256_file(path) for path in paths},
            versions={"robust_unlearning": __version__, "pyarrow": pyarrow.__version__},
        )
        files.write_json(new / MANIFEST, manifest.model_dump(mode="json"))
    return PerturbedSet(to, manifest)


def _write_rows(path: Path, asked: Sequence[tuple[Question, Form]]) -> bytes:
    """Write a parquet file, the same bytes for the same rows and version of pyarrow; the SHA-256 of the rows."""
    import pyarrow
    import pyarrow.parquet

    names = ["id", "question", "subject", "choices", "answer", "forget_token", "control_token"]
    names += ["cluster"] * any(question.cluster for question, _ in asked)
    kinds = {"choices": pyarrow.list_(pyarrow.string()), "answer": pyarrow.int64()}
    schema = pyarrow.schema([(name, kinds.get(name, pyarrow.string())) for name in names])
    every = ({**asdict(question), "choices": list(question.choices), **form.tokens} for question, form in asked)
    rows = [{key: row[key] for key in row if key in names} for row in every]
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pyarrow.Table.from_pylist(rows, schema=schema)
    pyarrow.parquet.write_table(table, path, compression="zstd", version="2.6", row_group_size=len(rows))
    return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).digest()


def _configs(subjects: Iterable[str]) -> dict[str, str]:
    """Name of a config and folder -> its subject, in order of first appearance. No subject: `questions`."""
    configs: dict[str, str] = {}
    for subject in dict.fromkeys(subjects):
        name = _slug(subject) or "questions"
        while name.lower() in {*RESERVED, *map(str.lower, configs)}:
            name += "_2"
        configs[name] = subject
    return configs


def _slug(text: str) -> str:
    return re.sub(r"\W+", "_", text).strip("_")


def _card(origin: Origin, configs: Iterable[str], written: int, left_out: Counter[str], groups: Sequence[str]) -> str:
    """The data set's README: its configs as the hub reads them, and what it is."""
    split, settings = origin.source.split, origin.settings
    shards = {config: f"{config}/{split}-*" for config in configs}
    if settings.control:
        shards |= {f"{config}-control": f"{CONTROL}/{config}/{split}-*" for config in configs}
    entries = [
        {"config_name": config, "data_files": [{"split": split, "path": path}]} for config, path in shards.items()
    ]
    left = "".join(f"; {number:,} left out: {reason}" for reason, number in sorted(left_out.items()))
    words = ", ".join(keyword["text"] for keyword in origin.keywords[:10]) + ", …" * (len(origin.keywords) > 10)
    counts = {"written": written, "left_out": left, "keywords": len(origin.keywords), "words": words}
    notes = CONTROL_NOTE if settings.control else ""
    if settings.where == "option" and "continuation" in settings.styles:
        notes += CONTINUATION_NOTE
    head = yaml.safe_dump({"configs": entries}, sort_keys=False, allow_unicode=True)
    about = {"origin": origin, "source": Path(origin.source.path).name, "configs": head, "notes": notes, **counts}
    return files.locate(CARD).read_text(encoding="utf-8").format(groups=",".join(groups), **about)

"""Multiple-choice sets from JSONL, CSV, parquet or a folder in hub layout, and the prompts that ask them.

A row has `question`, the choices, `answer`, and perhaps `subject`, `id` and `cluster`. JSONL and parquet give the
choices as a list `choices`; CSV gives them as columns `A`, `B`, … or `choice_0`, `choice_1`, …. The answer is
the number of the right choice counted from 0, its letter, or its text. Where several questions are about one thing
(an entity, a passage), a column `cluster` says which: they are answered alike, and count as one in intervals.
"""

from __future__ import annotations

import csv
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field

from robust_unlearning.errors import UserError, kind, no_column, unknown
from robust_unlearning.files import locate, read_jsonl

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
EXTRA = "cells beyond the last column"


@dataclass(frozen=True)
class Question:
    """One multiple-choice question; `answer` is the index of the right choice, counted from 0; `cluster` is what it is
    about, where others are about the same.
    """

    id: str
    question: str
    choices: tuple[str, ...]
    answer: int
    subject: str = ""
    cluster: str = ""


def read_questions(path: str | os.PathLike[str], *, config: str | None = None, split: str = "test") -> list[Question]:
    """Read every question of a file, or of one split of a folder in hub layout.

    A folder in hub layout is `FOLDER/CONFIG/SPLIT-00000-of-00001.parquet` (MMLU's form) or the same without
    configs. `config=None` takes every config that has the split, except one named `all`, which on the hub
    repeats the others. `split` plays no part for a single file.

    A question's id is the row's own `id`, else `NAME:ROW` where NAME is the file's stem (the config for hub
    layout) and ROW is the line of a JSONL file or the row of a table, counted from 1.

    Args:
        path: a `.jsonl`, `.csv` or `.parquet` file, a folder, or `demo:NAME` for a file of the package.

    Raises:
        UserError: nothing there, an unknown config or split, no questions, or a row that is no question; the
            message names the file and the line or row.
    """
    place = locate(path)
    questions: dict[str, Question] = {}
    places: dict[str, str] = {}
    rows_before: Counter[str] = Counter()
    for file, name in question_files(path, config=config, split=split):
        number = 0
        for number, where, row in _rows(file):
            default_id = f"{name}:{rows_before[name] + number}"
            question = _question(row, where, default_id, name if place.is_dir() else "")
            if question.id in questions:
                first = places[question.id]
                raise UserError(f"{where}: id {question.id!r} was used already by {first}. Ids must differ.")
            questions[question.id], places[question.id] = question, where
        rows_before[name] += number
    if not questions:
        raise UserError(f"{str(place)!r} holds no questions: it has no rows.")
    return list(questions.values())


class QuestionSource(BaseModel, extra="forbid", frozen=True):
    """Where questions are read from: what `read_questions` takes."""

    path: str = Field(description="a file, a folder in hub layout, or demo:FILE")
    config: str | None = Field(None, description="one config of a folder in hub layout; left out: all")
    split: str = "test"

    def read(self) -> list[Question]:
        """The questions; raises what `read_questions` raises."""
        return read_questions(self.path, config=self.config, split=self.split)


def question_files(
    path: str | os.PathLike[str], *, config: str | None = None, split: str = "test"
) -> list[tuple[Path, str]]:
    """The files that `read_questions` reads, each with its config's name (a single file: its stem).

    Raises:
        UserError: nothing there, or an unknown config or split.
    """
    place = locate(path)
    if place.is_dir():
        return _hub_files(place, config, split)
    if config is not None:
        raise UserError(f"config {config!r} was given, but {str(place)!r} is a file: leave the config out.")
    return [(place, place.stem)]


def cloze_prompt(question: Question) -> tuple[str, tuple[str, ...]]:
    """The prompt without the choices, and the choices as the texts that may follow it after a space."""
    return f"Question: {question.question}\nAnswer:", question.choices


def letters_prompt(question: Question) -> tuple[str, tuple[str, ...]]:
    """MMLU's zero-shot prompt (the paper's Figure 6), and the letters that may follow it after a space.

    Raises:
        UserError: more choices than letters.
    """
    if len(question.choices) > len(LETTERS):
        raise UserError(f"question {question.id!r} has more than 26 choices; ask it in the cloze style.")
    about = f" about {question.subject.replace('_', ' ')}" if question.subject else ""
    letters = tuple(LETTERS[: len(question.choices)])
    options = "".join(f"{letter}. {choice}\n" for letter, choice in zip(letters, question.choices, strict=True))
    head = f"The following are multiple choice questions (with answers){about}."
    return f"{head}\n\n{question.question.strip()}\n{options}Answer:", letters


def texts_prompt(question: Question) -> tuple[str, tuple[str, ...]]:
    """The prompt of `letters_prompt`, and the choices as the texts that may follow it after a space.

    For models that know the answer and see the choices, but are too small to name one by its letter.

    Raises:
        UserError: more choices than letters.
    """
    return letters_prompt(question)[0], question.choices


Asking = Callable[[Question], tuple[str, tuple[str, ...]]]
"""A question's prompt, and the texts of which one is to follow it after a space."""
STYLES: dict[str, Asking] = {"cloze": cloze_prompt, "letters": letters_prompt, "texts": texts_prompt}


def shows_options(style: str) -> bool:
    """Whether the prompt of a style shows the choices: where it does not, a token in place of one changes nothing."""
    return style != "cloze"


def _hub_files(folder: Path, config: str | None, split: str) -> list[tuple[Path, str]]:
    """(file, config) for each shard of the split, configs and shards in order of name."""
    folders = [each for each in sorted(folder.iterdir()) if each.is_dir()]
    configs = {each.name: splits for each in folders if (splits := _splits(each))}
    if not configs and (splits := _splits(folder)):
        configs = {folder.name: splits}
    if not configs:
        raise UserError(
            f"{str(folder)!r} holds no questions. A folder should hold CONFIG/test-00000-of-00001.parquet "
            "and the like; otherwise name a .jsonl, .csv or .parquet file."
        )
    if config is not None and config not in configs:
        raise UserError(f"{folder}: {unknown('config', config, configs, 'Leave it out to take them all.')}")
    chosen = [config] if config else [name for name in configs if name != "all"] or ["all"]
    if not any(split in configs[name] for name in chosen):
        available = {each for name in chosen for each in configs[name]}
        raise UserError(f"{folder}: {unknown('split', split, available)}")
    return [(file, name) for name in chosen for file in configs[name].get(split, [])]


def _splits(folder: Path) -> dict[str, list[Path]]:
    """The shards in a folder by the name of their split."""
    splits: dict[str, list[Path]] = {}
    for file in sorted(folder.iterdir()):
        match = re.fullmatch(r"(.+?)(?:-\d+-of-\d+)?", file.stem)
        if file.is_file() and file.suffix in READERS and match:
            splits.setdefault(match[1], []).append(file)
    return splits


def _rows(file: Path) -> Iterator[tuple[int, str, dict[str, Any]]]:
    """(number from 1, 'FILE, line N' for messages, row) for each row of a file."""
    if file.suffix not in READERS:
        raise UserError(unknown("kind of question file", file.suffix or file.name, READERS, f"Given: {file}."))
    unit, reader = READERS[file.suffix]
    try:
        for number, row in reader(file):
            yield number, f"{file}, {unit} {number}", row
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not UTF-8 text: {error}. Save it as UTF-8.") from error
    except csv.Error as error:
        raise UserError(f"{file} cannot be read as CSV: {error}.") from error


def _read_jsonl(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, row in read_jsonl(file):
        if not isinstance(row, dict):
            raise UserError(f"{file}, line {number}: {kind(row)}, but a row is a JSON object.")
        yield number, row


def _read_csv(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with file.open(encoding="utf-8-sig", newline="") as lines:
        reader = csv.DictReader(lines, restkey=EXTRA, restval="")
        columns = {column.strip().lower(): column for column in reader.fieldnames or []}
        names = [name for name in columns if re.fullmatch(r"[a-z]|choice_\d+", name)]
        names.sort(key=lambda name: (len(name), name))
        if columns and not names:
            raise UserError(f"{file}: no choices. Give them as columns A, B, C, D or choice_0, choice_1, ….")
        for number, row in enumerate(reader, start=1):
            if EXTRA in row:
                raise UserError(f"{file}, row {number}: more cells than columns. Quote a cell that has a comma.")
            cells = {name: row[column] for name, column in columns.items() if column in row}
            choices = [cells.pop(name) for name in names]
            while choices and not choices[-1].strip():  # a question with fewer choices than the table has columns
                choices.pop()
            yield number, {name: cell for name, cell in cells.items() if cell.strip()} | {"choices": choices}


def _read_parquet(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(file)
    except pyarrow.ArrowException as error:
        raise UserError(f"{str(file)!r} cannot be read as parquet: {error}.") from error
    yield from enumerate(table.to_pylist(), start=1)


READERS = {".jsonl": ("line", _read_jsonl), ".csv": ("row", _read_csv), ".parquet": ("row", _read_parquet)}


def _question(row: dict[str, Any], where: str, default_id: str, default_subject: str) -> Question:
    """Check one row. `where` opens every message."""
    for column in ("question", "choices", "answer"):
        if row.get(column) is None:
            raise no_column(where, column, {name: cell for name, cell in row.items() if cell is not None}, "row")
    text, given = row["question"], row["choices"]
    if not isinstance(text, str) or not text.strip():
        raise UserError(f"{where}: the question is {text!r}; it must be text.")
    if not isinstance(given, list) or len(given) < 2:
        raise UserError(f"{where}: choices {given!r}; give a list of at least two texts.")
    for choice in given:
        if isinstance(choice, bool) or not isinstance(choice, str | int | float) or not str(choice).strip():
            raise UserError(f"{where}: choice {choice!r} is not a text.")
    choices = tuple(map(str, given))
    row_id, subject = row.get("id"), row.get("subject")
    return Question(
        id=default_id if row_id in (None, "") else str(row_id),
        question=text,
        choices=choices,
        answer=_answer(row["answer"], choices, where),
        subject=default_subject if subject in (None, "") else str(subject),
        cluster="" if row.get("cluster") is None else str(row["cluster"]),
    )


def _answer(value: Any, choices: tuple[str, ...], where: str) -> int:
    """The index of the right choice from its index, its letter or its text, when only one reading fits."""
    last = len(choices) - 1
    allowed = f"Give 0 to {last}, A to {LETTERS[last] if last < len(LETTERS) else 'Z'}, or the text of a choice."
    readings: set[int] = set()
    if isinstance(value, int) and not isinstance(value, bool):
        readings = {value}
    elif isinstance(value, str):
        text = value.strip()
        readings = {index for index, choice in enumerate(choices) if choice.strip() == text}
        if len(text) == 1 and text in LETTERS:
            readings.add(LETTERS.index(text))
        if re.fullmatch("[0-9]{1,9}", text):
            readings.add(int(text))
    fitting = [index for index in readings if 0 <= index <= last]
    if not fitting:
        raise UserError(f"{where}: answer {value!r} is none of the {len(choices)} choices. {allowed}")
    if len(fitting) > 1:
        names = " or ".join(f"choice {index}" for index in sorted(fitting))
        raise UserError(f"{where}: answer {value!r} could mean {names}. Give the number or letter of one.")
    return fitting[0]

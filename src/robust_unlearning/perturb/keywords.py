"""Reading keywords: words or n-grams, given one by one or in a file.

A file is plain lines (one keyword a line), JSON lines, or JSON: an array, or an object with an array `ngrams` or
`keywords`. A JSON keyword is a string or an object with `text`; its other fields (`class`, `n`, …) are kept and
go into the manifest.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from robust_unlearning.errors import UserError, nearest
from robust_unlearning.files import locate

LISTS = ("ngrams", "keywords")


@dataclass(frozen=True)
class Keyword:
    """A word or phrase to put into questions, and whatever else its file says about it."""

    text: str
    about: dict[str, Any] = field(default_factory=dict)


def read_keywords(words: Sequence[str] = (), file: str | None = None) -> list[Keyword]:
    """The keywords given one by one and those of a file; one that comes again (in any case) is left out.

    Raises:
        UserError: none at all, an empty one, or a file that cannot be read.
    """
    found: dict[str, Keyword] = {}
    for keyword in [*(_keyword(word, "--keyword") for word in words), *(_from_file(file) if file else ())]:
        found.setdefault(keyword.text.casefold(), keyword)
    if not found:
        given = f"{file!r} holds no keywords" if file else "no keywords given"
        raise UserError(f"{given}. Give --keyword SARS-CoV-2 (as often as you like) or --keywords FILE.")
    return list(found.values())


def _from_file(name: str) -> Iterator[Keyword]:
    path = locate(name)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (UnicodeDecodeError, IsADirectoryError) as error:
        raise UserError(f"{name}: keywords are a text, JSON or JSONL file in UTF-8: {error}.") from error
    if path.suffix == ".json":
        rows: Iterable[tuple[str, Any]] = _array(path, text)
    elif path.suffix == ".jsonl":
        lines = [(f"{path}, line {number}", line) for number, line in enumerate(text.splitlines(), 1)]
        rows = [(where, _parsed(line, where)) for where, line in lines if line.strip()]
    else:
        lines = [(f"{path}, line {number}", line.strip()) for number, line in enumerate(text.splitlines(), 1)]
        rows = [(where, line) for where, line in lines if line]
    for where, row in rows:
        yield _keyword(row, where)


def _array(path: Path, text: str) -> list[tuple[str, Any]]:
    value = _parsed(text, str(path))
    if isinstance(value, dict):
        value = next((value[name] for name in LISTS if name in value), None)
    if not isinstance(value, list):
        raise UserError(f"{path}: give an array of keywords, or an object with one under {' or '.join(LISTS)}.")
    return [(f"{path}, item {number}", row) for number, row in enumerate(value, 1)]


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not JSON: {error}.") from error


def _keyword(row: Any, where: str) -> Keyword:
    if isinstance(row, dict):
        if "text" not in row:
            close = nearest("text", row)
            hint = f" Rename {close!r} to 'text'?" if close else ""
            raise UserError(f"{where}: no 'text'; the keyword has {', '.join(row) or 'nothing'}.{hint}")
        about = {key: value for key, value in row.items() if key != "text"}
        row = row["text"]
    else:
        about = {}
    if not isinstance(row, str) or not row.strip():
        raise UserError(f"{where}: {row!r} is no keyword; give a word such as 'SARS-CoV-2', or an object with 'text'.")
    return Keyword(row.strip(), about)

"""Reading keywords: words or n-grams, given one by one or in a file.

A file is plain lines (one keyword a line), JSON lines, or JSON: an array, or an object with an array `ngrams` or
`keywords`. A JSON keyword is a string or an object with `text`; its other fields (`class`, `n`, …) are kept and
go into the manifest.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from robust_unlearning.errors import UserError, no_column
from robust_unlearning.files import locate, read_json, read_jsonl

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
        if path.suffix == ".json":
            rows = [(f"item {number}", row) for number, row in enumerate(_array(path), 1)]
        elif path.suffix == ".jsonl":
            rows = [(f"line {number}", row) for number, row in read_jsonl(path)]
        else:
            lines = enumerate(path.read_text(encoding="utf-8-sig").splitlines(), 1)
            rows = [(f"line {number}", line.strip()) for number, line in lines if line.strip()]
    except (UnicodeDecodeError, IsADirectoryError) as error:
        raise UserError(f"{name}: keywords are a text, JSON or JSONL file in UTF-8: {error}.") from error
    for where, row in rows:
        yield _keyword(row, f"{path}, {where}")


def _array(path: Path) -> list[Any]:
    value = read_json(path)
    if isinstance(value, dict):
        value = next((value[name] for name in LISTS if name in value), None)
    if not isinstance(value, list):
        raise UserError(f"{path}: give an array of keywords, or an object with one under {' or '.join(LISTS)}.")
    return value


def _keyword(row: Any, where: str) -> Keyword:
    """A keyword from a text, or from an object that has one."""
    about: dict[str, Any] = {}
    if isinstance(row, dict):
        if "text" not in row:
            raise no_column(where, "text", row, "keyword")
        about = dict(row)
        row = about.pop("text")
    if not isinstance(row, str) or not row.strip():
        raise UserError(f"{where}: {row!r} is no keyword; give a word such as 'SARS-CoV-2', or an object with 'text'.")
    return Keyword(row.strip(), about)

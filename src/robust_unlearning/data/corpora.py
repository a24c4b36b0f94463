"""Forget and retain text: documents from files or the hub, then token batches that are a function of the step.

A batch depends only on the corpus, the seed and its number, so a resumed run needs no reader's state.
"""

from __future__ import annotations

import hashlib
import json
import logging
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from robust_unlearning import files
from robust_unlearning.errors import UserError, kind, nearest
from robust_unlearning.recipe import TextSource

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

HUB = "hub:"
_ENDINGS = {".jsonl": "jsonl", ".json": "jsonl", ".txt": "text", ".md": "text", ".parquet": "parquet"}


def _no_column(where: str, column: str, have: Iterable[str]) -> UserError:
    names = sorted(map(str, have))
    close = nearest(column, names)
    hint = f" Did you mean field: {close}?" if close else ""
    return UserError(f"{where}: no column {column!r}; it has {', '.join(names) or 'none'}.{hint}")


def _read_jsonl(path: Path, field: str) -> Iterator[str]:
    """Texts of a JSON-lines file: objects with `field`, or bare JSON strings.

    WMDP's biology file holds objects with `text`; its cyber file has been published both as objects and as
    bare lines. A file whose first line is not JSON at all is read as bare lines.
    """
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                if number == 1 and line.lstrip()[0] not in '{["':
                    yield from _read_lines(path)
                    return
                raise UserError(f"{path}, line {number}: not JSON ({error.msg}); use format: lines?") from error
            if isinstance(row, str):
                yield row
                continue
            if not isinstance(row, dict):
                raise UserError(f"{path}, line {number}: an object or a string is expected, not {line[:40]!r}.")
            if field not in row:
                raise _no_column(f"{path}, line {number}", field, row)
            yield _as_text(row[field], f"{path}, line {number}", field)


def _as_text(value: Any, where: str, field: str) -> str:
    if not isinstance(value, str):
        raise UserError(f"{where}: {field!r} holds {kind(value)}, not text.")
    return value


def _read_lines(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8-sig") as lines:
        yield from (line.rstrip("\n") for line in lines)


def _read_text(path: Path) -> Iterator[str]:
    """Paragraphs, which blank lines part."""
    paragraph: list[str] = []
    for line in _read_lines(path):
        if line.strip():
            paragraph.append(line)
        elif paragraph:
            yield "\n".join(paragraph)
            paragraph = []
    if paragraph:
        yield "\n".join(paragraph)


FILE_FORMATS = ("arrow", "csv", "json", "parquet", "text")
"""What `datasets` reads files by, given in place of a data set's name."""


@contextmanager
def read_quietly() -> Iterator[list[str]]:
    """While it lasts, what `datasets` logs of files that it cannot read goes into this list, not to the screen."""
    said: list[str] = []

    def keep(record: logging.LogRecord) -> bool:
        said.append(record.getMessage())
        return False

    loggers = [logging.getLogger(f"datasets.packaged_modules.{each}.{each}") for each in FILE_FORMATS]
    for logger in loggers:
        logger.addFilter(keep)
    try:
        yield said
    finally:
        for logger in loggers:
            logger.removeFilter(keep)


def _read_dataset(source: TextSource, path: str, name: str) -> Iterator[str]:
    """Texts of a data set on the hub, of a folder laid out as one, or of a parquet file."""
    import datasets

    datasets.disable_progress_bars()
    said: list[str] = []
    try:
        with read_quietly() as said:
            if name.endswith(".parquet"):
                table = datasets.load_dataset("parquet", data_files=path, split="train")
            else:
                table = datasets.load_dataset(path, source.config, split=source.split)
    except Exception as error:  # the library raises many kinds; the user needs the sentence
        raise UserError(
            f"cannot read data set {name!r} (config {source.config!r}, split {source.split!r}): "
            f"{said[-1] if said else error}"
        ) from error
    if source.field not in table.column_names:
        raise _no_column(name, source.field, table.column_names)
    for number, value in enumerate(table[source.field], 1):
        if value is not None:
            yield _as_text(value, f"{name}, row {number}", source.field)


def _texts(source: TextSource) -> Iterator[str]:
    if source.path.startswith(HUB):
        yield from _read_dataset(source, source.path.removeprefix(HUB), source.path)
        return
    path = files.locate(source.path)
    kind = source.format
    if kind == "auto":
        kind = "hub" if path.is_dir() else _ENDINGS.get(path.suffix, "")  # type: ignore[assignment]
        if not kind:
            raise UserError(
                f"{source.path}: cannot tell the format from {path.suffix!r}; set format to one of "
                "jsonl, lines, text, parquet, hub."
            )
    if path.is_dir() != (kind == "hub"):
        what = "a folder" if path.is_dir() else "a file"
        raise UserError(f"{source.path} is {what}, which format {kind!r} does not read.")
    try:
        match kind:
            case "jsonl":
                yield from _read_jsonl(path, source.field)
            case "lines":
                yield from _read_lines(path)
            case "text":
                yield from _read_text(path)
            case _:
                yield from _read_dataset(source, str(path), source.path)
    except UnicodeDecodeError as error:
        raise UserError(f"{source.path}: not UTF-8 text ({error}).") from error


def read_documents(source: TextSource) -> list[str]:
    """The documents of a corpus, at least `min_chars` long, in file order, at most `max_documents`.

    Raises:
        UserError: a wrong path, a missing column, a broken line, or nothing left.
    """
    kept, seen = [], 0
    for text in _texts(source):
        seen += 1
        if len(text.strip()) >= max(source.min_chars, 1):
            kept.append(text)
            if len(kept) == source.max_documents:
                break
    if not kept:
        why = f"none of its {seen} documents has {source.min_chars} characters" if seen else "it is empty"
        raise UserError(f"{source.path}: no document to use: {why}. Check the path, or lower min_chars.")
    return kept


@dataclass(frozen=True)
class TokenBatch:
    """Token ids [b, t], padded on the right, and the mask [b, t] that is 1 on tokens and 0 on padding.

    `given` [b]: so many tokens of each sequence are what it begins with, and are not predicted; None means the first.
    """

    ids: Tensor
    mask: Tensor
    given: Tensor | None = None

    def to(self, device: torch.device) -> TokenBatch:
        """The same batch on a device."""
        given = None if self.given is None else self.given.to(device)
        return TokenBatch(self.ids.to(device), self.mask.to(device), given)

    def rows(self, which: slice) -> TokenBatch:
        """Some of its sequences, padded as they are."""
        return TokenBatch(self.ids[which], self.mask[which], None if self.given is None else self.given[which])

    @property
    def predicted(self) -> Tensor:
        """[b, t - 1] True where the next token is a real one and is predicted."""
        real = self.mask[:, 1:].bool()
        if self.given is None:
            return real
        return real & (torch.arange(1, self.ids.shape[1], device=real.device) >= self.given[:, None])

    @property
    def tokens(self) -> int:
        """Tokens that are not padding."""
        return int(self.mask.sum())


def collate(rows: list[list[int]], pad: int) -> TokenBatch:
    """Rows of token ids, padded on the right to the longest."""
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), pad, dtype=torch.long)
    mask = torch.zeros((len(rows), width), dtype=torch.long)
    for index, row in enumerate(rows):
        ids[index, : len(row)] = torch.tensor(row)
        mask[index, : len(row)] = 1
    return TokenBatch(ids, mask)


def derived_seed(*parts: object) -> int:
    """A 63-bit seed from the parts' reprs: unlike purposes of one run's seed get unlike streams."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1


class Sequences(ABC):
    """Token sequences whose batches are numbered from 0 and go on without end.

    Attributes:
        pad: the token that sequences are padded with.
        batch_size: sequences of a batch.
        size: how many there are; None where their numbers go on without end.
        documents: how many texts they are made of.
        fingerprint: hash of those texts.
    """

    pad: int
    batch_size: int
    size: int | None
    documents: int
    fingerprint: str

    @property
    @abstractmethod
    def identity(self) -> object:
        """What the sequences depend on: equal reprs, equal sequences."""

    @abstractmethod
    def row(self, index: int) -> list[int]:
        """The tokens of a sequence."""

    def given(self, index: int) -> int:
        """How many tokens of a sequence are given and not predicted."""
        return 1

    @abstractmethod
    def row_indices(self, number: int) -> list[int]:
        """Which sequences batch `number` holds, `batch_size` of them."""

    def collated(self, indices: Sequence[int]) -> TokenBatch:
        """These sequences, padded on the right."""
        return collate([self.row(index) for index in indices], self.pad)

    def batch(self, number: int) -> TokenBatch:
        """Batch `number`, counted from 0."""
        return self.collated(self.row_indices(number))


class Corpus(Sequences):
    """A tokenised corpus whose batches go round without end.

    Each pass over the documents takes them in file order, or in an order drawn from the seed, the corpus's
    name and the pass.

    Args:
        special: whether the tokenizer puts its own tokens (such as a first one) into each document.
    """

    def __init__(
        self,
        documents: list[str],
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_tokens: int,
        batch_size: int,
        order: str,
        seed: int,
        name: str,
        special: bool = True,
    ) -> None:
        encoded = tokenizer(documents, truncation=True, max_length=max_tokens, add_special_tokens=special)["input_ids"]
        self.rows: list[list[int]] = [row for row in encoded if row]
        if not self.rows:
            raise UserError(f"{name}: the tokenizer makes no token of any of {len(documents)} documents.")
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        self.pad = pad if pad is not None else 0
        self.batch_size = batch_size
        self.order = order
        self.seed = derived_seed(seed, name)
        self.fingerprint = hashlib.sha256("\0".join(documents).encode()).hexdigest()[:16]
        self.documents, self.size = len(documents), len(self.rows)
        self._pass: tuple[int, list[int]] | None = None

    def _ordered(self, number: int) -> list[int]:
        """Indices of the documents in the order of pass `number`."""
        if self._pass is None or self._pass[0] != number:
            if self.order == "file":
                indices = list(range(len(self.rows)))
            else:
                generator = torch.Generator().manual_seed(derived_seed(self.seed, number))
                indices = torch.randperm(len(self.rows), generator=generator).tolist()
            self._pass = (number, indices)
        return self._pass[1]

    @property
    def identity(self) -> object:
        """The rows themselves."""
        return self.rows

    def row(self, index: int) -> list[int]:
        """The tokens of a document."""
        return self.rows[index]

    def at(self, position: int) -> int:
        """Which document comes at a position of the endless stream, as an index into `rows`."""
        turn, index = divmod(position, len(self.rows))
        return self._ordered(turn)[index]

    def row_indices(self, number: int) -> list[int]:
        """Which documents batch `number` holds, as indices into `rows`; always `batch_size` of them."""
        first = number * self.batch_size
        return [self.at(first + offset) for offset in range(self.batch_size)]

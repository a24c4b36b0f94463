"""Hard negatives: the n-grams of a corpus by their similarity to their own document.

Paper, section 6.2 (Figure 4) and Appendix D: similarity is the cosine between the Sentence-BERT embeddings of
an n-gram and of the whole document it comes from,

    s(g, x) = e(g) · e(x) / (|e(g)| |e(x)|),

and those with higher similarity do more harm to an unlearned model. The paper selects in two ways, and so can this
module, one at a time:

- `classes` (Figure 4): of all documents together the most similar, the least similar, and those around the mean;
- `top_of_each_document` (Tables 2 to 5): the most similar n-grams of each document.

What it leaves open is settled so:

- an n-gram is n consecutive words, words being what whitespace parts; case and punctuation stay;
- the distribution (mean, standard deviation) is over the distinct n-grams of each document, all documents together;
- a text is selected once: for its most similar document, else its least similar, else the one nearest the mean;
- a document with fewer n-grams than are to be taken of each gives those that it has;
- ties go to the earlier document, then to the earlier place in it;
- `document_embedding` says how a document longer than the embedder's window is embedded.

Work goes in blocks of consecutive documents with about `BLOCK` n-grams. A text that occurs several times in a block
is embedded once. A block's similarities (float32) are kept on disk under what they depend on: the block's documents,
n, the sample, the embedder, and `VERSION`. So an interrupted run goes on where it was, and a longer corpus or another
`each` embeds only what is new.

Memory, besides the embedder's own: the documents, their embeddings (4 d bytes a document) and n-gram counts (8 bytes
a document), the n-grams of one block (`BLOCK`, or those of one document if it has more) as text, and those selected. It
does not grow with the number of n-grams; the disk holds 4 bytes of each. `benchmarks/ngrams.py` measures it.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from random import Random
from typing import Annotated, Any, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from robust_unlearning import files
from robust_unlearning.data.corpora import derived_seed
from robust_unlearning.errors import UserError
from robust_unlearning.perturb.embedders import Embedder, Vectors
from robust_unlearning.recipe import Strict

VERSION = 1
"""Changes when the same input would give other similarities."""
BLOCK = 2**16
DOCUMENTS = 16
"""Documents cut into word pieces, embedded, and kept on disk together."""
STEP = 1024
"""N-grams handed to the embedder at a time, and pairs multiplied at a time."""
Floats = NDArray[np.float64]
TOP = "top_of_document"
"""The class of n-grams that were selected document by document."""
Tick = Callable[[str, int, int], None]
"""Called with what is being embedded, how much is done and how much there is."""


def silent(name: str, done: int, total: int) -> None:
    """Tells nobody."""


class NgramSettings(Strict):
    """Which n-grams are looked at, and how many are selected: of each class, or of each document."""

    n: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1)] = (2, 4, 8, 16)
    each: int = Field(10, ge=1, description="n-grams of each class, for each n")
    per_document: int | None = Field(
        None, ge=1, description="instead of classes: so many n-grams of each document, the most similar, for each n"
    )
    sample: int | None = Field(None, ge=1, description="at most so many n-grams of a document, drawn; left out: all")
    document_embedding: Literal["first", "mean"] = Field(
        "first",
        description="of a document beyond the embedder's window: 'first' embeds what the window holds, as "
        "Sentence-BERT does by itself; 'mean' takes the mean over consecutive windows, weighted by their word pieces",
    )
    seed: int = Field(0, ge=0, description="of the sample")

    @model_validator(mode="after")
    def _one_reading(self) -> Self:
        if self.per_document is not None and "each" in self.model_fields_set:
            raise ValueError("give `each` or `per_document`: one selects classes, the other n-grams of each document")
        return self

    @property
    def reading(self) -> str:
        """`classes`, or `top_of_each_document`."""
        return "classes" if self.per_document is None else "top_of_each_document"


@dataclass(frozen=True)
class RankedNgram:
    """A selected n-gram, and the document (counted from 0) to which it has this similarity."""

    text: str
    similarity: float
    document: int


@dataclass(frozen=True)
class Work:
    """How many n-gram texts had to be embedded, the others' similarities being on disk, and the seconds it took."""

    embedded: int
    seconds: float


def distinct_ngrams(document: str, n: int) -> list[str]:
    """Each run of n words of a document, single spaces between them, once, in order of first appearance.

    >>> distinct_ngrams("to be or  not to be", 2)
    ['to be', 'be or', 'or not', 'not to']
    """
    words = document.split()
    return list(dict.fromkeys(" ".join(words[start : start + n]) for start in range(len(words) - n + 1)))


def document_vectors(
    documents: Sequence[str], embedder: Embedder, how: str, cache: Path, tick: Tick = silent
) -> Vectors:
    """The embedding of each document, [documents, d], length 1 each; see `NgramSettings.document_embedding`."""
    blocks = []
    for first in range(0, len(documents), DOCUMENTS):
        some = documents[first : first + DOCUMENTS]
        tick("documents", first, len(documents))
        path = cache / _name("documents", embedder.fingerprint, how, [_digest(document) for document in some])
        if not path.exists():
            _keep(path, _embedded(some, embedder, how))
        blocks.append(np.load(path))
    tick("documents", len(documents), len(documents))
    return np.concatenate(blocks)


def _embedded(documents: Sequence[str], embedder: Embedder, how: str) -> Vectors:
    if how == "first" or embedder.window is None:
        return embedder.embed(documents)
    return np.stack([_mean_over_windows(document, embedder, embedder.window) for document in documents])


def _mean_over_windows(document: str, embedder: Embedder, window: int) -> Vectors:
    """Σ_w t_w e(w) / |…| over windows w of whole words that have t_w ≤ `window` word pieces (or are one word)."""
    windows: list[tuple[list[str], int]] = [([], 0)]
    words = document.split()
    for word, pieces in zip(words, embedder.pieces(words), strict=True):
        held, total = windows[-1]
        if held and total + pieces > window:
            held, total = [], 0
            windows.append((held, total))
        held.append(word)
        windows[-1] = held, total + pieces
    weights = np.array([max(total, 1) for _, total in windows], dtype=np.float32)
    mean = weights @ embedder.embed([" ".join(held) for held, _ in windows])
    return mean / np.linalg.norm(mean)


class Similarities:
    """The similarity of every n-gram of one length to its document, computed block by block and kept on disk.

    A pair is an n-gram and its document; pairs are numbered in the order of documents and of places in them.

    Attributes:
        counts: n-grams used of each document, [documents].
        distinct: n-grams that the documents have, each document's counted once in it.
        total: n-grams used, of all documents together: the number of pairs.
        embedded: texts that had to be embedded, which took `seconds`; the others' similarities came from disk.

    Raises:
        UserError: no document has n words.
    """

    def __init__(self, documents: Sequence[str], n: int, settings: NgramSettings) -> None:
        self.documents, self.n, self.settings = documents, n, settings
        counts = np.array([len(distinct_ngrams(document, n)) for document in documents])
        self.distinct = int(counts.sum())
        if not self.distinct:
            longest = max(len(document.split()) for document in documents)
            raise UserError(
                f"n = {n}: none of the {len(documents)} documents has {n} words, the longest has {longest}. "
                f"Give --n of at most {longest}, or longer documents."
            )
        self.counts = counts if settings.sample is None else np.minimum(counts, settings.sample)
        self.total = int(self.counts.sum())
        self.embedded, self.seconds = 0, 0.0
        self._paths: list[Path] = []

    def used(self, document: str) -> list[str]:
        """The n-grams of a document that are looked at: all, or a sample drawn by the seed, n and its text."""
        ngrams = distinct_ngrams(document, self.n)
        if self.settings.sample is None or len(ngrams) <= self.settings.sample:
            return ngrams
        draw = Random(derived_seed(self.settings.seed, self.n, _digest(document)))
        return [ngrams[index] for index in sorted(draw.sample(range(len(ngrams)), self.settings.sample))]

    def _blocks(self) -> Iterator[range]:
        """Consecutive documents that have `BLOCK` n-grams or a little fewer, or a single document that has more."""
        first = held = 0
        for index, count in enumerate(self.counts):
            if held and held + count > BLOCK:
                yield range(first, index)
                first, held = index, 0
            held += int(count)
        yield range(first, len(self.counts))

    def compute(self, embedder: Embedder, vectors: Vectors, cache: Path, tick: Tick = silent) -> None:
        """Compute what is not on disk yet; `vectors` [documents, d] are the documents' embeddings."""
        drawn = None if self.settings.sample is None else (self.settings.sample, self.settings.seed)
        how = self.settings.document_embedding
        for block in self._blocks():
            digests = [_digest(self.documents[index]) for index in block]
            path = cache / _name("ngrams", embedder.fingerprint, how, self.n, drawn, digests)
            tick(f"{self.n}-grams", int(self.counts[: block.start].sum()), self.total)
            if not path.exists():
                _keep(path, self._block(block, embedder, vectors, tick))
            self._paths.append(path)
        tick(f"{self.n}-grams", self.total, self.total)

    def _block(self, block: range, embedder: Embedder, vectors: Vectors, tick: Tick) -> Vectors:
        """Similarities [pairs] of a block; each text is embedded once, short ones first, which needs little padding."""
        began = time.perf_counter()
        pairs_of: dict[str, list[int]] = {}
        for pair, text in enumerate(text for index in block for text in self.used(self.documents[index])):
            pairs_of.setdefault(text, []).append(pair)
        pieces = dict(zip(pairs_of, _pieces(list(pairs_of), embedder, STEP), strict=True))
        texts = sorted(pairs_of, key=pieces.__getitem__)
        documents = np.repeat(np.array(block), self.counts[block.start : block.stop])
        similarity = np.empty(len(documents), dtype=np.float32)
        done = int(self.counts[: block.start].sum())
        for start in range(0, len(texts), STEP):
            some = texts[start : start + STEP]
            batch = embedder.embed(some)
            rows = np.repeat(np.arange(len(some)), [len(pairs_of[text]) for text in some])
            pairs = np.concatenate([pairs_of[text] for text in some])
            for at in range(0, len(pairs), STEP):
                these = pairs[at : at + STEP]
                similarity[these] = np.einsum("pd,pd->p", batch[rows[at : at + STEP]], vectors[documents[these]])
            done += len(pairs)
            tick(f"{self.n}-grams", done, self.total)
        self.embedded += len(texts)
        self.seconds += time.perf_counter() - began
        return similarity

    def values(self) -> Iterator[Floats]:
        """The similarities, a block at a time."""
        for path in self._paths:
            yield np.load(path).astype(np.float64)

    def mean_and_sd(self) -> tuple[float, float]:
        """Mean and standard deviation of all similarities (the deviation with 1 / count)."""
        mean = sum(float(values.sum()) for values in self.values()) / self.total
        square = sum(float(((values - mean) ** 2).sum()) for values in self.values()) / self.total
        return mean, square**0.5

    def select(self, rank: Callable[[Floats], Floats], count: int, taken: set[str]) -> list[RankedNgram]:
        """The `count` texts with the smallest rank(similarity) that are not in `taken`, best first.

        Where fewer are left, those. A text that several documents hold counts with its smallest rank.
        """
        blocks = zip(self._blocks(), self.values(), strict=True)
        ranked = [pair for block, values in blocks for pair in self._first(block, values, rank(values), count, taken)]
        best: dict[str, RankedNgram] = {}
        for _, found in sorted(ranked, key=lambda pair: pair[0]):  # stable: of equals the earlier pair is first
            best.setdefault(found.text, found)
        return list(best.values())[:count]

    def top(self, count: int) -> list[RankedNgram]:
        """The `count` n-grams of each document that are most similar to it, documents in order, best first.

        A text that several documents have among theirs counts for the one that it is most similar to.
        """
        best: dict[str, RankedNgram] = {}
        for block, values in zip(self._blocks(), self.values(), strict=True):
            ends = np.cumsum(self.counts[block.start : block.stop])
            for document, end in zip(block, ends.tolist(), strict=True):
                ngrams = self.used(self.documents[document])
                own = values[end - len(ngrams) : end]
                for index in np.argsort(-own, kind="stable")[:count].tolist():
                    found = RankedNgram(ngrams[index], float(own[index]), document)
                    if found.text not in best or best[found.text].similarity < found.similarity:
                        best[found.text] = found
        return sorted(best.values(), key=lambda ngram: (ngram.document, -ngram.similarity))

    def _first(
        self, block: range, values: Floats, ranks: Floats, count: int, taken: set[str]
    ) -> Iterator[tuple[float, RankedNgram]]:
        """The first `count` distinct texts of a block by rank, of equal ranks the earlier pair."""
        ends = np.cumsum(self.counts[block.start : block.stop])
        used = cache(lambda document: self.used(self.documents[document]))
        seen = set(taken)
        for pair in np.argsort(ranks, kind="stable").tolist():
            within = int(np.searchsorted(ends, pair, side="right"))
            text = used(block.start + within)[pair - int(ends[within])]  # counted from the document's end
            if text not in seen:
                seen.add(text)
                yield float(ranks[pair]), RankedNgram(text, float(values[pair]), block.start + within)
            if len(seen) == len(taken) + count:
                break


def select_ngrams(
    documents: Sequence[str], embedder: Embedder, settings: NgramSettings, cache: Path, tick: Tick = silent
) -> tuple[dict[str, Any], Work]:
    """The n-grams that the settings select for each n, and the spread of the similarities.

    Args:
        cache: folder for embeddings of documents and similarities of n-grams; what is there is used.

    Returns:
        A record for JSON: `sha256` of the documents, `embedder`, `settings`, `reading` (see `NgramSettings.reading`),
        `documents` (`count`, and how many are `longer_than_window`), `similarity` (for each n: `mean`, `sd`, the
        `count` they rest on, and how many `distinct` n-grams there are) and `ngrams` (`text`, `n`, `class`,
        `similarity`, and `document` counted from 0); and the work that was left to do for it.

    Raises:
        UserError: documents shorter than n, or fewer n-grams than are to be selected.
    """
    lengths = {n: Similarities(documents, n, settings) for n in settings.n}
    longer = 0
    if embedder.window is not None:
        longer = sum(size > embedder.window for size in _pieces(documents, embedder, DOCUMENTS))
    vectors = document_vectors(documents, embedder, settings.document_embedding, cache, tick)
    record: dict[str, Any] = {
        "sha256": hashlib.sha256("\0".join(documents).encode()).hexdigest(),
        "embedder": {"name": embedder.name, "fingerprint": embedder.fingerprint, "window": embedder.window},
        "settings": settings.model_dump(),
        "reading": settings.reading,
        "documents": {"count": len(documents), "longer_than_window": longer},
        "similarity": {},
        "ngrams": [],
    }
    for n, similarities in lengths.items():
        similarities.compute(embedder, vectors, cache, tick)
        mean, sd = similarities.mean_and_sd()
        spread = {"mean": mean, "sd": sd, "count": similarities.total, "distinct": similarities.distinct}
        record["similarity"][str(n)] = spread
        if settings.per_document is None:
            chosen = _classes(similarities, settings, mean)
        else:
            chosen = {TOP: similarities.top(settings.per_document)}
        for name, of_class in chosen.items():
            for each in of_class:
                about = {"similarity": round(each.similarity, 6), "document": each.document}
                record["ngrams"].append({"text": each.text, "n": n, "class": name, **about})
    computed = lengths.values()
    return record, Work(sum(each.embedded for each in computed), sum(each.seconds for each in computed))


def _classes(similarities: Similarities, settings: NgramSettings, mean: float) -> dict[str, list[RankedNgram]]:
    """Class -> its n-grams, no text in two."""
    taken: set[str] = set()
    classes = {}
    for name, rank in _ranks(mean).items():
        chosen = similarities.select(rank, settings.each, taken)
        if len(chosen) < settings.each:
            have = (len(taken) + len(chosen)) // 3
            raise UserError(
                f"n = {similarities.n}: {len(taken) + len(chosen)} distinct n-grams are not enough for three classes "
                f"of {settings.each}. Give more documents{', a larger --sample' if settings.sample else ''}"
                + (f", or --each of at most {have}." if have else ".")
            )
        taken |= {each.text for each in chosen}
        classes[name] = chosen
    return classes


def _ranks(mean: float) -> dict[str, Callable[[Floats], Floats]]:
    """Class -> what is smallest for the n-grams that belong to it."""
    return {
        "most_similar": lambda similarity: -similarity,
        "least_similar": lambda similarity: similarity,
        "around_mean": lambda similarity: np.abs(similarity - mean),
    }


def _pieces(texts: Sequence[str], embedder: Embedder, step: int) -> list[int]:
    return [size for start in range(0, len(texts), step) for size in embedder.pieces(texts[start : start + step])]


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _name(*parts: object) -> str:
    """The file that is kept for what depends on these parts."""
    return f"{hashlib.sha256(repr((VERSION, *parts)).encode()).hexdigest()[:24]}.npy"


def _keep(path: Path, values: Vectors) -> None:
    with files.replacing(path) as temporary, temporary.open("wb") as file:
        np.save(file, values)

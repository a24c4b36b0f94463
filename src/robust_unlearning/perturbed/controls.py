"""A harmless word or phrase for each keyword, of like length and like frequency.

What a keyword costs means little beside nothing: any odd word costs something. The control is a word as long and
as rare that belongs to no forget-set.

Where controls come from: the questions' own words, and for keywords of one word a list of nouns and labels that
comes with this package; or the words of a corpus that the user names. A phrase of n words has phrases of n words
from unbroken text (no punctuation within) as candidates. Frequencies are counted in the same text, for keywords
and candidates alike, in the first `WORDS_COUNTED` words.

Which ones: those with the smallest

    distance = |ln(chars / chars_k)| + |ln((1 + count) / (1 + count_k))|  [+ |ln(tokens / tokens_k)| with a tokenizer]

where k is the keyword: a factor of two in length weighs as much as a factor of two in frequency, and 1 is added so
that unseen keywords (SARS-CoV-2) ask for unseen or rare words. Ties are broken by sha256 of seed and text. A
candidate is passed over if it equals a keyword, or shares the beginning of a word of four letters or more with
this keyword or with any keyword of one word. Each keyword has up to `CONTROLS` of them, so that what is measured
does not hang on one odd word; a question draws from those it does not mention.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from math import log
from typing import Any

from robust_unlearning.errors import UserError
from robust_unlearning.files import locate
from robust_unlearning.perturb import draw

CONTROLS = 8
WORDS_COUNTED = 2_000_000
SHORTLIST = 1_000
HARMLESS = "shipped:harmless_words.txt"
_WORD = re.compile(r"\w+(?:[-'’]\w+)*")
_BREAK = re.compile(r"[^\w\s'’-]+|\n")


@dataclass(frozen=True)
class Measure:
    """A word or phrase and what it is matched on; `tokens` (after a space) is None without a tokenizer."""

    text: str
    characters: int
    words: int
    tokens: int | None
    count: int


@dataclass(frozen=True)
class Matched:
    """A keyword and its controls, nearest first, each with its distance."""

    keyword: Measure
    controls: tuple[Measure, ...]
    distances: tuple[float, ...]

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        near = zip(self.controls, self.distances, strict=True)
        controls = [{**asdict(each), "distance": round(distance, 4)} for each, distance in near]
        return {**asdict(self.keyword), "controls": controls}


def match_harmless(
    keywords: Sequence[str],
    texts: Iterable[str],
    *,
    bundled: bool,
    tokenizer: Any = None,
    seed: int = 0,
) -> tuple[list[Matched], int]:
    """Controls for each keyword, and the number of words that frequencies were counted in.

    Args:
        texts: where candidates come from and frequencies are counted.
        bundled: whether the package's harmless nouns are candidates as well.
        tokenizer: a Hugging Face tokenizer, to match the number of tokens too.

    Raises:
        UserError: the texts hold no phrase of as many words as a keyword has.
    """
    sizes = {keyword: max(1, len(_WORD.findall(keyword))) for keyword in keywords}
    phrases, total = _count(texts, set(sizes.values()))
    if bundled and 1 in phrases:
        for word in locate(HARMLESS).read_text(encoding="utf-8").split():
            phrases[1].setdefault(word.casefold(), (word, 0))
    everywhere = _Wording(keyword for keyword, size in sizes.items() if size == 1)
    folded = {keyword: _folded(keyword) for keyword in keywords}
    pools = {size: _Pool(found, set(folded.values()), tokenizer, seed) for size, found in phrases.items()}
    matched = []
    for (keyword, size), tokens in zip(sizes.items(), _tokens(tokenizer, list(sizes)), strict=True):
        count = phrases[size].get(folded[keyword], (keyword, 0))[1]
        measure = Measure(keyword, len(keyword), size, tokens, count)
        near = pools[size].nearest(measure, everywhere)
        if not near:
            raise UserError(
                f"no control of {size} words for keyword {keyword!r} among {total:,} words. Name a corpus that has "
                "such phrases: --control-from FILE"
            )
        controls, distances = zip(*near, strict=True)
        matched.append(Matched(measure, controls, distances))
    return matched, total


def _count(texts: Iterable[str], sizes: set[int]) -> tuple[dict[int, dict[str, tuple[str, int]]], int]:
    """Size -> casefolded phrase -> (most frequent spelling, how often in any spelling); and the words read."""
    spelled: dict[int, Counter[str]] = {size: Counter() for size in sizes}
    total = 0
    for text in texts:
        for piece in _BREAK.split(text):
            words = _WORD.findall(piece)
            total += len(words)
            for size in sizes:
                spelled[size].update(" ".join(words[i : i + size]) for i in range(len(words) - size + 1))
        if total >= WORDS_COUNTED:
            break
    phrases: dict[int, dict[str, tuple[str, int]]] = {size: {} for size in sizes}
    for size, forms in spelled.items():
        for form, number in sorted(forms.items(), key=lambda each: (-each[1], each[0])):
            spelling, sum_before = phrases[size].get(form.casefold(), (form, 0))
            phrases[size][form.casefold()] = spelling, sum_before + number
    return phrases, total


class _Pool:
    """Candidates of one size with their lengths and frequencies, ready to be compared with many keywords."""

    def __init__(self, phrases: dict[str, tuple[str, int]], keywords: set[str], tokenizer: Any, seed: int) -> None:
        import numpy as np

        fitting = [
            (form, count)
            for folded, (form, count) in phrases.items()
            if len(form) > 2 and form[0].isalpha() and folded not in keywords
        ]
        self.candidates = sorted(fitting, key=lambda each: draw(seed, "control", each[0]))
        self.tokenizer = tokenizer
        self.logs = np.array([[log(len(form)), log(1 + count)] for form, count in self.candidates]).reshape(-1, 2)

    def nearest(self, keyword: Measure, everywhere: _Wording) -> list[tuple[Measure, float]]:
        """The `CONTROLS` nearest whose wording is far from the keyword's and from `everywhere`, with distances."""
        import numpy as np

        if not self.candidates:
            return []
        wanted = np.array([log(keyword.characters), log(1 + keyword.count)])
        distances = np.abs(self.logs - wanted).sum(axis=1)
        rank = min(SHORTLIST, len(distances)) - 1
        close = np.flatnonzero(distances <= np.partition(distances, rank)[rank])
        close = close[np.argsort(distances[close], kind="stable")][:SHORTLIST]
        tokens = _tokens(self.tokenizer, [self.candidates[index][0] for index in close])
        near = []
        for index, number in zip(close, tokens, strict=True):
            form, count = self.candidates[index]
            distance = float(distances[index])
            if number is not None and keyword.tokens is not None:
                distance += abs(log(number) - log(keyword.tokens))
            near.append((Measure(form, len(form), keyword.words, number, count), distance))
        near.sort(key=lambda each: each[1])
        own = _Wording([keyword.text])
        far = (each for each in near if not own.shares(each[0].text) and not everywhere.shares(each[0].text))
        return list(islice(far, CONTROLS))


class _Wording:
    """The words of four letters or more in some texts, hyphens undone."""

    def __init__(self, texts: Iterable[str]) -> None:
        self.words = {word for text in texts for word in _parts(text)}
        self.beginnings = _beginnings(self.words)

    def shares(self, text: str) -> bool:
        """Whether a word of `text` begins with one of these words, or one of them with a word of `text`."""
        own = _parts(text)
        return not (own.isdisjoint(self.beginnings) and self.words.isdisjoint(_beginnings(own)))


def _parts(text: str) -> set[str]:
    return {part for part in re.split(r"[\W_]+", text.casefold()) if len(part) > 3}


def _beginnings(words: Iterable[str]) -> set[str]:
    return {word[:end] for word in words for end in range(4, len(word) + 1)}


def _tokens(tokenizer: Any, forms: list[str]) -> Sequence[int | None]:
    """Number of tokens of each form after a space."""
    if tokenizer is None or not forms:
        return [None] * len(forms)
    return [len(ids) for ids in tokenizer([" " + form for form in forms], add_special_tokens=False)["input_ids"]]


def _folded(text: str) -> str:
    return " ".join(_WORD.findall(text)).casefold() or text.casefold()

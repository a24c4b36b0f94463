"""Controls: a harmless word or phrase for each keyword, as like it as may be.

What a keyword costs means little beside nothing: any odd word costs something. The control is a word as long (and as
rare) that belongs to no forget-set. `nearest` matches both kinds: a suite names its own controls
(`match_controls`), and a set takes them from text (`match_harmless`).

Where a set's controls come from: a corpus that the user names, or the questions and a list of nouns and labels that
comes with this package. A phrase of n words has phrases of n words from unbroken text (no punctuation within) as
candidates; none begins or ends in a function word, a single letter or a number, so that few are fragments.
Frequencies are counted in the same text, for keywords and candidates alike, in the first `WORDS_COUNTED` words.

The questions may be about what is forgotten, so their words are candidates only where they are no subject's topic:
each word of a phrase stands in questions of half of the subjects, and of `SUBJECTS` at least; a phrase of two words
stands in them twice at least (a chance neighbourhood is no phrase). Beside them stand the list's words and, for
keywords of two words where the questions have fewer than `SHORTLIST` such phrases (as those of one subject do),
pairs of its nouns. Only for a keyword with fewer than `CONTROLS` candidates of like length (within a factor of
`LIKE`) every phrase of the questions is one; its match is then marked `own_words`.

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
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from itertools import permutations
from math import log
from typing import Any

import numpy as np

from robust_unlearning.errors import UserError
from robust_unlearning.files import locate
from robust_unlearning.perturb.places import draw

CONTROLS = 8
WORDS_COUNTED = 2_000_000
SHORTLIST = 1_000
SUBJECTS = 4
LIKE = 1.5
HARMLESS = "shipped:harmless_words.txt"
FUNCTION = "shipped:function_words.txt"
_WORD = re.compile(r"[^\W_]+(?:[-'’][^\W_]+)*")
_BREAK = re.compile(r"[^\w\s'’-]+|[\n_]|(?<!\w)['’-]+|['’-]+(?!\w)")


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
    """A keyword and its controls, nearest first, each with its distance.

    `own_words` says that some may be of the questions' own topics, for want of others of like length.
    """

    keyword: Measure
    controls: tuple[Measure, ...]
    distances: tuple[float, ...]
    own_words: bool = False

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        near = zip(self.controls, self.distances, strict=True)
        controls = [{**asdict(each), "distance": round(distance, 4)} for each, distance in near]
        return {**asdict(self.keyword), "own_words": self.own_words, "controls": controls}


def nearest(
    keywords: Sequence[Measure],
    candidates: Sequence[Measure],
    distance: Callable[[Measure, Measure], float],
    number: int,
    *,
    once: bool = False,
    apart: Callable[[str, str], bool] = lambda keyword, candidate: True,
) -> list[Matched]:
    """Each keyword with the candidates nearest to it; among equals the order of keywords, then of candidates decides.

    Args:
        number: of controls for a keyword, at most.
        once: a candidate goes to a second keyword only when all have been given (for `number` 1): the nearest pairs
            are made first.
        apart: whether a candidate may stand for a keyword, from the texts of the two.
    """
    near = sorted(
        (distance(keyword, candidate), place, rank)
        for place, keyword in enumerate(keywords)
        for rank, candidate in enumerate(candidates)
    )
    given: list[dict[int, float]] = [{} for _ in keywords]
    while True:
        used: set[int] = set()
        for far, place, rank in near:
            if len(given[place]) < number and rank not in used and apart(keywords[place].text, candidates[rank].text):
                given[place][rank] = far
                if once:
                    used.add(rank)
        if not used:
            break
    return [
        Matched(keyword, tuple(candidates[rank] for rank in ranks), tuple(ranks.values()))
        for keyword, ranks in zip(keywords, given, strict=True)
    ]


def match_controls(
    tokenizer: Any, forget_tokens: Sequence[str], control_tokens: Sequence[str]
) -> dict[str, tuple[str, ...]]:
    """For each forget-token of a suite a control of as many tokens, as near as may be, from the suite's list.

    A control is used again only when all have been used.

    Args:
        tokenizer: a Hugging Face tokenizer; lengths are of `' ' + word` without special tokens.

    Raises:
        UserError: one of the lists is empty, or a word is in both.
    """
    for words, missing, example in (
        (forget_tokens, "forget-tokens", "supernova"),
        (control_tokens, "control tokens", "bakery"),
    ):
        if not words:
            raise UserError(f"no {missing} given. Name at least one, for instance {example!r}.")
    folded = {word.casefold() for word in forget_tokens}
    if shared := [word for word in control_tokens if word.casefold() in folded]:
        raise UserError(f"{shared[0]!r} is both a forget-token and a control token. Remove one of the two.")
    forget, listed = (
        _measures([(word, 0) for word in dict.fromkeys(words)], tokenizer) for words in (forget_tokens, control_tokens)
    )
    matched = nearest(forget, listed, _token_difference, 1, once=True)
    return {match.keyword.text: tuple(control.text for control in match.controls) for match in matched}


def match_harmless(
    keywords: Sequence[str],
    texts: Sequence[str],
    *,
    subjects: Sequence[str] | None = None,
    tokenizer: Any = None,
    seed: int = 0,
) -> tuple[list[Matched], int]:
    """Controls for each keyword of a set, and the number of words that frequencies were counted in.

    Args:
        texts: where candidates come from and frequencies are counted.
        subjects: of each text, where the texts are the questions; None for a corpus, where every phrase may be taken.
        tokenizer: a Hugging Face tokenizer, to match the number of tokens too.

    Raises:
        UserError: the texts hold no phrase of as many words as a keyword has.
    """
    folded = {keyword: _folded(keyword) for keyword in keywords}
    sizes = {keyword: _size(keyword) for keyword in keywords}
    phrases, total = _count(texts, set(sizes.values()), set(folded.values()))
    allowed = phrases if subjects is None else _harmless(phrases, texts, subjects)
    everywhere = {word for keyword, size in sizes.items() if size == 1 for word in _words(keyword)}

    def apart(keyword: str, candidate: str) -> bool:
        return not _begin_alike(_words(candidate), everywhere | _words(keyword))

    @cache
    def pool(size: int, whole: bool) -> _Pool:
        return _Pool(phrases[size] | allowed[size] if whole else allowed[size], set(folded.values()), seed)

    counted = [(keyword, phrases[size].get(folded[keyword], ("", 0))[1]) for keyword, size in sizes.items()]
    matched = []
    for keyword in _measures(counted, tokenizer):
        whole = subjects is not None and pool(keyword.words, False).alike(keyword) < CONTROLS
        candidates = _measures(pool(keyword.words, whole).shortlist(keyword), tokenizer)
        (match,) = nearest([keyword], candidates, _distance, CONTROLS, apart=apart)
        if not match.controls:
            raise UserError(
                f"no control of {keyword.words} words for keyword {keyword.text!r} among {total:,} words. Name a "
                "corpus that has such phrases: --control-from FILE"
            )
        own_words = whole and any(each.text.casefold() not in allowed[keyword.words] for each in match.controls)
        matched.append(replace(match, own_words=own_words))
    return matched, total


def _token_difference(one: Measure, other: Measure) -> float:
    return abs((one.tokens or 0) - (other.tokens or 0))


def _distance(one: Measure, other: Measure) -> float:
    """The sum of the module's docstring."""
    distance = abs(log(one.characters) - log(other.characters)) + abs(log(1 + one.count) - log(1 + other.count))
    return distance + (abs(log(one.tokens) - log(other.tokens)) if one.tokens and other.tokens else 0.0)


def _measures(counted: Sequence[tuple[str, int]], tokenizer: Any) -> list[Measure]:
    """Texts measured, each with its frequency."""
    tokens: list[int | None] = [None] * len(counted)
    if tokenizer is not None and counted:
        ids = tokenizer([" " + text for text, _ in counted], add_special_tokens=False)["input_ids"]
        tokens = list(map(len, ids))
    return [
        Measure(text, len(text), _size(text), number, count)
        for (text, count), number in zip(counted, tokens, strict=True)
    ]


def _size(text: str) -> int:
    """How many words a text has, at least 1."""
    return max(1, len(_WORD.findall(text)))


Phrases = dict[int, dict[str, tuple[str, int]]]
"""Size -> casefolded phrase -> (most frequent spelling, how often in any spelling)."""


def _count(texts: Iterable[str], sizes: Collection[int], keywords: Collection[str]) -> tuple[Phrases, int]:
    """The phrases that begin and end as they should, and the (casefolded) keywords; and the words read."""
    spelled: dict[int, Counter[str]] = {size: Counter() for size in sizes}
    function = set(locate(FUNCTION).read_text(encoding="utf-8").split())
    firsts = {keyword.split(" ")[0] for keyword in keywords}
    total = 0
    for text in texts:
        for piece in _BREAK.split(text):
            words = _WORD.findall(piece)
            total += len(words)
            folded = [word.casefold() for word in words]
            full = [len(word) > 1 and not word.isdigit() and word.replace("’", "'") not in function for word in folded]
            for size in sizes:
                spelled[size].update(
                    " ".join(words[at : at + size])
                    for at in range(len(words) - size + 1)
                    if (full[at] and full[at + size - 1])
                    or (folded[at] in firsts and " ".join(folded[at : at + size]) in keywords)
                )
        if total >= WORDS_COUNTED:
            break
    phrases: Phrases = {size: {} for size in sizes}
    for size, forms in spelled.items():
        for form, number in sorted(forms.items(), key=lambda each: (-each[1], each[0])):
            spelling, sum_before = phrases[size].get(form.casefold(), (form, 0))
            phrases[size][form.casefold()] = spelling, sum_before + number
    return phrases, total


def _harmless(phrases: Phrases, texts: Iterable[str], subjects: Sequence[str]) -> Phrases:
    """The phrases of words that are no subject's topic, and the package's list: its words, or pairs of its nouns."""
    subjects_of: dict[str, set[str]] = {}
    for text, subject in zip(texts, subjects, strict=True):
        for word in _WORD.findall(text):
            subjects_of.setdefault(word.casefold(), set()).add(subject)
    needed = max(SUBJECTS, len(set(subjects)) / 2)
    common = {word for word, of_word in subjects_of.items() if len(of_word) >= needed}
    allowed = {
        size: {
            folded: (form, count)
            for folded, (form, count) in of_size.items()
            if common.issuperset(folded.split(" ")) and (size != 2 or count > 1)
        }
        for size, of_size in phrases.items()
    }
    bundled = {1: locate(HARMLESS).read_text(encoding="utf-8").split()}
    if len(allowed.get(2, ())) < SHORTLIST:
        nouns = [word for word in bundled[1] if word.isalpha() and word.islower()]
        bundled[2] = [" ".join(pair) for pair in permutations(nouns, 2)]
    for size in bundled.keys() & phrases.keys():
        for form in bundled[size]:
            allowed[size][form.casefold()] = phrases[size].get(form.casefold(), (form, 0))
    return allowed


class _Pool:
    """Candidates of one size with their lengths and frequencies, ready to be compared with many keywords."""

    def __init__(self, phrases: dict[str, tuple[str, int]], keywords: Collection[str], seed: int) -> None:
        fitting = [
            (form, count)
            for folded, (form, count) in phrases.items()
            if len(form) > 2 and form[0].isalpha() and folded not in keywords
        ]
        self.candidates = sorted(fitting, key=lambda candidate: draw(seed, "control", candidate[0]))
        self.logs = np.array([[log(len(form)), log(1 + count)] for form, count in self.candidates]).reshape(-1, 2)

    def alike(self, keyword: Measure) -> int:
        """How many are about as long as the keyword."""
        return int((np.abs(self.logs[:, 0] - log(keyword.characters)) <= log(LIKE)).sum())

    def shortlist(self, keyword: Measure) -> list[tuple[str, int]]:
        """The `SHORTLIST` nearest by length and frequency, nearest first, each with its frequency."""
        distances = np.abs(self.logs - [log(keyword.characters), log(1 + keyword.count)]).sum(axis=1)
        return [self.candidates[index] for index in np.argsort(distances, kind="stable")[:SHORTLIST]]


def _words(text: str) -> set[str]:
    """The words of four letters or more, hyphens undone, in one case."""
    return {part for part in re.split(r"[\W_]+", text.casefold()) if len(part) > 3}


def _begin_alike(some: Iterable[str], others: Iterable[str]) -> bool:
    """Whether one of some words begins with one of the others, or one of the others with one of them."""
    return any(one.startswith(other) or other.startswith(one) for one in some for other in others)


def _folded(text: str) -> str:
    return " ".join(_WORD.findall(text)).casefold() or text.casefold()

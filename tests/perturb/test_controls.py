"""Controls: those of a suite by their tokens, those of a set by length and frequency, from harmless text."""

from __future__ import annotations

import random
from collections import Counter
from math import log
from typing import Any

import pytest

from robust_unlearning import files
from robust_unlearning.errors import UserError
from robust_unlearning.perturb.controls import CONTROLS, HARMLESS, match_controls, match_harmless


class SizedTokenizer:
    """A token for every `size` characters, so that lengths are plain to see."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __call__(self, texts: list[str], add_special_tokens: bool = True) -> dict[str, list[list[int]]]:
        assert not add_special_tokens
        assert all(text.startswith(" ") for text in texts)
        return {"input_ids": [[0] * -(-len(text) // self.size) for text in texts]}


def test_controls_have_as_many_tokens() -> None:
    pairs = match_controls(SizedTokenizer(1), ["star", "nova", "comets"], ["ladder", "tent", "milk", "ox"])
    assert pairs == {"star": ("tent",), "nova": ("milk",), "comets": ("ladder",)}


def test_equal_lengths_come_before_near_ones_and_controls_before_repeats() -> None:
    # in order of the list, 'sun' would take 'tent' from 'nova'
    pairs = match_controls(SizedTokenizer(1), ["sun", "nova"], ["tent", "ladders"])
    assert pairs == {"sun": ("ladders",), "nova": ("tent",)}
    repeats = match_controls(SizedTokenizer(1), ["star", "moon", "sun"], ["milk", "rope"])
    assert repeats == {"star": ("milk",), "moon": ("rope",), "sun": ("milk",)}


def test_match_errors() -> None:
    with pytest.raises(UserError, match="no control tokens given"):
        match_controls(SizedTokenizer(1), ["star"], [])
    with pytest.raises(UserError, match="no forget-tokens given"):
        match_controls(SizedTokenizer(1), [], ["milk"])
    with pytest.raises(UserError, match="'Star' is both"):
        match_controls(SizedTokenizer(1), ["star"], ["milk", "Star"])


@pytest.mark.parametrize("tokenizer", [None, SizedTokenizer(3)])
def test_controls_are_the_nearest_by_length_and_frequency(tokenizer: Any) -> None:
    rng = random.Random(1)
    words = ["".join(rng.choices("bdfgklmnprst", k=rng.randint(3, 14))) for _ in range(300)]
    text = " ".join(rng.choices(words, k=6000) + ["Ricin"] * 9)
    counts = Counter(text.split())
    (seen, unseen), total = match_harmless(["ricin", "SARS-CoV-2"], [text], subjects=None, tokenizer=tokenizer)
    assert total == 6009
    assert (seen.keyword.count, unseen.keyword.count) == (9, 0)
    for matched in (seen, unseen):
        wanted = matched.keyword
        distances = {}
        for word in set(words) & set(counts):
            distances[word] = abs(log(len(word) / wanted.characters)) + abs(
                log((1 + counts[word]) / (1 + wanted.count))
            )
            if tokenizer:
                size, size_wanted = (-(-(1 + each) // 3) for each in (len(word), wanted.characters))
                distances[word] += abs(log(size / size_wanted))
        best = sorted(distances.values())[:CONTROLS]
        assert matched.distances == pytest.approx(best)
        assert [distances[each.text] for each in matched.controls] == pytest.approx(best)
        assert all(each.count == counts[each.text] for each in matched.controls)


def test_controls_are_spelled_as_most_often_and_count_every_spelling() -> None:
    (matched,), _ = match_harmless(["ricin"], ["Paris paris. Paris is wet", "PARIS"], subjects=None)
    found = {each.text: each.count for each in matched.controls}
    assert found == {"Paris": 4, "wet": 1}


def test_controls_keep_away_from_the_keywords() -> None:
    text = "viruses virology vire toxic toxins viral-load cloud stone river apple candle " + "virus " * 3
    matched, _ = match_harmless(["virus", "toxin", "viral load"], [text], subjects=[""])
    by_keyword = {each.keyword.text: {control.text for control in each.controls} for each in matched}
    bundled = set(files.locate(HARMLESS).read_text(encoding="utf-8").split())
    allowed = bundled | {"virology", "vire", "toxic", "viral-load", "cloud", "stone", "river", "apple", "candle"}
    assert by_keyword["virus"] <= allowed
    assert by_keyword["toxin"] <= allowed
    assert not any("viral" in text or "load" in text for text in by_keyword["viral load"])
    assert all(each.words == 2 for each in matched[2].controls)
    with pytest.raises(UserError, match="no control of 4 words for keyword 'a b c d'"):
        match_harmless(["a b c d"], ["one two. three four, five"], subjects=[""])


def test_controls_are_whole_phrases() -> None:
    """None begins or ends in a function word, a letter or a number, and none crosses punctuation or a blank."""
    text = (
        "The old lamp of her aunt shone - bright as day. Nobody's lamp 12 burns; lamp x burns, the aunt's ___ cat"
        " 'grey owl' sleeps"
    )
    one, two, three = match_harmless(["ricin", "ricin cloud", "ricin in bottles"], [text])[0]
    words = {
        "old",
        "lamp",
        "aunt",
        "shone",
        "bright",
        "day",
        "Nobody's",
        "burns",
        "aunt's",
        "cat",
        "grey",
        "owl",
        "sleeps",
    }
    assert {each.text for each in one.controls} <= words
    assert {each.text for each in two.controls} == {"old lamp", "aunt shone", "Nobody's lamp", "grey owl"}
    assert {each.text for each in three.controls} == {"bright as day", "lamp 12 burns", "lamp x burns"}


def test_controls_from_questions_are_of_no_subject() -> None:
    """Words of one subject's topic are left alone; a set of one subject takes the bundled words, and says otherwise."""
    keywords = ["influenza", "swine influenza", "swine influenza strain"]
    subjects = ["virology", "history", "law", "physics", "art"]
    texts = [
        "hepatitis infection. " * 6 + "swine influenza. " * 6 + "Take steady pressure",
        *["steady pressure rises"] * 4,
    ]
    bundled = {word.casefold() for word in files.locate(HARMLESS).read_text("utf-8").split()}
    one, two, three = match_harmless(keywords, texts, subjects=subjects)[0]
    assert {each.text.casefold() for each in one.controls} <= {*bundled, "steady", "pressure", "rises"}
    assert "steady pressure" in {each.text for each in two.controls}
    assert not one.own_words
    assert not two.own_words
    assert [each.text for each in three.controls] == ["Take steady pressure", "steady pressure rises"]
    assert three.own_words  # "take" stands in one subject only
    own, pair, long = match_harmless(keywords, [*texts, "polio spreads far"], subjects=["virology"] * 6)[0]
    assert {each.text.casefold() for each in own.controls} <= bundled
    assert {word for each in pair.controls for word in each.text.split()} <= bundled
    assert not own.own_words
    assert not pair.own_words
    assert (long.own_words, long.as_dict()["own_words"]) == (True, True)

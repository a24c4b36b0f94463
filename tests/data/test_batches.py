"""Token batches that their number alone decides."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from conftest import WORDS, save_tokenizer

from robust_unlearning import UserError
from robust_unlearning.data.corpora import Corpus, collate


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(folder)
    return AutoTokenizer.from_pretrained(folder)


DOCUMENTS = [" ".join(WORDS[10 * index : 10 * index + 3 + index]) for index in range(7)]


def _corpus(tokenizer: Any, **changes: Any) -> Corpus:
    settings: dict[str, Any] = {
        "max_tokens": 64,
        "batch_size": 3,
        "order": "shuffle",
        "seed": 0,
        "name": "topic/forget",
    }
    return Corpus(DOCUMENTS, tokenizer, **{**settings, **changes})


def _rows(corpus: Corpus, numbers: Iterable[int]) -> list[list[int]]:
    """The sequences of some batches, without padding."""
    batches = [corpus.batch(number) for number in numbers]
    return [ids[mask.bool()].tolist() for batch in batches for ids, mask in zip(batch.ids, batch.mask, strict=True)]


def test_tokens_are_the_tokenizers_own(tokenizer: Any) -> None:
    corpus = _corpus(tokenizer, order="file", batch_size=7)
    assert _rows(corpus, [0]) == [tokenizer(text)["input_ids"] for text in DOCUMENTS]


def test_longer_documents_are_cut_and_shorter_ones_are_not(tokenizer: Any) -> None:
    corpus = _corpus(tokenizer, order="file", batch_size=7, max_tokens=5)
    assert _rows(corpus, [0]) == [tokenizer(text)["input_ids"][:5] for text in DOCUMENTS]
    assert [len(row) for row in _rows(corpus, [0])] == [3, 4, 5, 5, 5, 5, 5]


def test_batches_are_padded_on_the_right_to_their_longest(tokenizer: Any) -> None:
    batch = _corpus(tokenizer, order="file").batch(0)
    assert batch.ids.shape == batch.mask.shape == (3, 5)
    assert batch.mask.tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]
    assert batch.ids[~batch.mask.bool()].tolist() == [tokenizer.pad_token_id] * 3
    assert batch.tokens == 12
    assert batch.ids.dtype == batch.mask.dtype == torch.long


def test_a_tokenizer_without_padding_token_pads_with_its_end_token(tokenizer: Any) -> None:
    from copy import deepcopy

    bare = deepcopy(tokenizer)
    bare.pad_token = None
    batch = _corpus(bare, order="file").batch(0)
    assert batch.ids[~batch.mask.bool()].tolist() == [tokenizer.eos_token_id] * 3


def test_file_order_is_the_files_and_goes_round(tokenizer: Any) -> None:
    corpus = _corpus(tokenizer, order="file")
    expected = [tokenizer(DOCUMENTS[index % 7])["input_ids"] for index in range(21)]
    assert _rows(corpus, range(7)) == expected


def test_a_shuffle_takes_each_document_once_a_pass_and_each_pass_otherwise(tokenizer: Any) -> None:
    rows = _rows(_corpus(tokenizer), range(7))  # three passes
    everything = sorted(tokenizer(text)["input_ids"] for text in DOCUMENTS)
    passes = [rows[7 * turn : 7 * turn + 7] for turn in range(3)]
    assert all(sorted(each) == everything for each in passes)
    assert passes[0] != passes[1] != passes[2] != passes[0]


@pytest.mark.parametrize("order", ["shuffle", "file"])
def test_a_batch_depends_on_its_number_alone(order: str, tokenizer: Any) -> None:
    forwards = _rows(_corpus(tokenizer, order=order), range(12))
    corpus = _corpus(tokenizer, order=order)
    backwards = [_rows(corpus, [number]) for number in reversed(range(12))]
    assert [row for batch in reversed(backwards) for row in batch] == forwards
    assert _rows(_corpus(tokenizer, order=order), [11]) == forwards[-3:]


def test_a_batch_larger_than_the_corpus_goes_round_within_itself(tokenizer: Any) -> None:
    rows = _rows(_corpus(tokenizer, batch_size=10), [0])
    assert len(rows) == 10
    assert sorted(rows[:7]) == sorted(tokenizer(text)["input_ids"] for text in DOCUMENTS)


@pytest.mark.parametrize("changes", [{"seed": 1}, {"name": "topic/retain"}])
def test_seed_and_name_change_the_shuffle(changes: dict[str, Any], tokenizer: Any) -> None:
    assert _rows(_corpus(tokenizer, **changes), range(2)) != _rows(_corpus(tokenizer), range(2))


def test_the_shuffle_leaves_the_global_generator_alone(tokenizer: Any) -> None:
    torch.manual_seed(1)
    expected = torch.randn(3)
    torch.manual_seed(1)
    _corpus(tokenizer).batch(0)
    assert torch.equal(torch.randn(3), expected)


def test_the_fingerprint_is_of_the_documents_not_of_their_use(tokenizer: Any) -> None:
    fingerprint = _corpus(tokenizer).fingerprint
    assert _corpus(tokenizer, seed=5, batch_size=1, max_tokens=4).fingerprint == fingerprint
    other = Corpus([*DOCUMENTS[:-1], "ba"], tokenizer, max_tokens=64, batch_size=3, order="file", seed=0, name="x")
    assert other.fingerprint != fingerprint


def test_documents_without_any_token_are_an_error(tokenizer: Any) -> None:
    with pytest.raises(UserError, match="topic/forget: the tokenizer makes no token"):
        Corpus(["  ", " "], tokenizer, max_tokens=9, batch_size=1, order="file", seed=0, name="topic/forget")


def test_collate_fills_with_the_padding_token() -> None:
    batch = collate([[5, 6], [7]], pad=9)
    assert batch.ids.tolist() == [[5, 6], [7, 9]]
    assert batch.mask.tolist() == [[1, 1], [1, 0]]

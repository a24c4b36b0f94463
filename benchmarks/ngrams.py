"""Time and memory of the selection of n-grams on 1,000 documents.

    python benchmarks/ngrams.py CORPUS [field=value …] [--documents 1000] [--sample K] [--to FILE]
    python benchmarks/ngrams.py hub:Salesforce/wikitext config=wikitext-2-raw-v1 split=test --sample 4

Two parts, each measurement in a process of its own, with an empty cache:

- `embedding`: the real thing: the corpus's first documents, n = 2, 4, 8, 16, the bundled Sentence-BERT, `--sample`
  n-grams of each document for each n. Its rate says what a corpus of your own will take.
- `bookkeeping`: everything but the embedder, for which a table of made-up vectors stands, on documents of 250 and
  of 1,000 words drawn from the corpus, every n-gram of them: what memory costs when n-grams grow fourfold.

Memory is the greatest resident set (`ru_maxrss`), Python, torch and the embedder included; `ready` is the same before
the selection begins.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from robust_unlearning import files
from robust_unlearning.data.corpora import read_documents
from robust_unlearning.perturb.embedders import Vectors, load_embedder
from robust_unlearning.perturb.ngrams import BLOCK, NgramSettings, select_ngrams
from robust_unlearning.recipe import TextSource, checked

BOUND = 2**30
WORDS = (250, 1000)


class Table:
    """Stands for an embedder: one of 4,096 made-up vectors of 384 numbers for each text; d is MiniLM's."""

    name, fingerprint, window = "table", "table", None

    def __init__(self) -> None:
        vectors = np.random.default_rng(0).standard_normal((4096, 384), dtype=np.float32)
        self.vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    def embed(self, texts: Sequence[str]) -> Vectors:
        """A row of the table for each text."""
        return self.vectors[[zlib.crc32(text.encode()) % 4096 for text in texts]]

    def pieces(self, texts: Sequence[str]) -> list[int]:
        """The words of each text."""
        return [text.count(" ") + 1 for text in texts]


def peak_bytes() -> int:
    """The greatest resident set of this process so far."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def work(source: dict[str, Any], count: int, sample: int | None, words: int | None) -> dict[str, Any]:
    """One measurement; with `words` documents of so many drawn words and the table in place of the embedder."""
    documents = read_documents(checked(TextSource, source, (), "corpus"))[:count]
    embedder = load_embedder(device="cpu") if words is None else Table()
    if words is not None:
        draw, every = random.Random(0), " ".join(documents).split()
        documents = [" ".join(draw.choices(every, k=words)) for _ in range(count)]
    embedder.embed(documents[:1])
    ready, began, processor = peak_bytes(), time.perf_counter(), time.process_time()
    with tempfile.TemporaryDirectory() as cache:
        record, done = select_ngrams(documents, embedder, NgramSettings(sample=sample), Path(cache))
        disk = sum(each.stat().st_size for each in Path(cache).iterdir())
    return {
        "documents": len(documents),
        "document_words": sum(len(each.split()) for each in documents),
        "similarity": record["similarity"],
        "longer_than_window": record["documents"]["longer_than_window"],
        "ngrams": sum(each["count"] for each in record["similarity"].values()),
        "distinct_ngrams": sum(each["distinct"] for each in record["similarity"].values()),
        "embedded": done.embedded,
        "embedding_seconds": done.seconds,
        "seconds": time.perf_counter() - began,
        "processor_seconds": time.process_time() - processor,
        "ready_bytes": ready,
        "peak_bytes": peak_bytes(),
        "disk_bytes": disk,
        "load_average": os.getloadavg()[0],
    }


def child(arguments: dict[str, Any]) -> dict[str, Any]:
    """`work` in a process of its own."""
    with tempfile.TemporaryDirectory() as temporary:
        out = Path(temporary) / "result.json"
        command = [sys.executable, __file__, "--worker", json.dumps(arguments), "--to", str(out)]
        if status := subprocess.run(command, check=False).returncode:
            raise SystemExit(f"a measurement ended with status {status}")
        return files.read_json(out)


def line(name: str, each: dict[str, Any]) -> str:
    """A measurement in a line of text."""
    return (
        f"{name}: {each['documents']:,} documents, {each['document_words']:,} words, {each['ngrams']:,} n-grams of "
        f"{each['distinct_ngrams']:,}; {each['embedded']:,} embedded in {each['embedding_seconds']:,.0f} s; "
        f"{each['seconds']:,.0f} s in all, {each['processor_seconds']:,.0f} s of processor; resident set "
        f"{each['ready_bytes'] / 2**20:,.0f} MiB ready, {each['peak_bytes'] / 2**20:,.0f} MiB at its peak; "
        f"{each['disk_bytes'] / 2**20:.1f} MiB on disk; load {each['load_average']:.1f}"
    )


def main() -> None:
    """Measure, print and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", nargs="*", help="where the text lies, and field=value words that say how to read it")
    parser.add_argument("--documents", type=int, default=1000)
    parser.add_argument("--sample", type=int, help="n-grams of a document for each n in the embedding part")
    parser.add_argument("--to", type=Path, help="JSON file for the record")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        files.write_json(arguments.to, work(**json.loads(arguments.worker)))
        return
    path, *fields = arguments.corpus
    source = checked(TextSource, {"path": path}, fields, path).model_dump(exclude_defaults=True)
    common = {"source": source, "count": arguments.documents}

    from engine import machine

    record: dict[str, Any] = {"machine": machine(), "block": BLOCK, "bound_bytes": BOUND, "sample": arguments.sample}
    record["embedding"] = child({**common, "sample": arguments.sample, "words": None})
    print(line("embedding", record["embedding"]), flush=True)
    record["bookkeeping"] = [child({**common, "sample": None, "words": words}) for words in WORDS]
    for each in record["bookkeeping"]:
        print(line("bookkeeping", each))
    peaks = [each["peak_bytes"] for each in [record["embedding"], *record["bookkeeping"]]]
    record["within_bound"] = max(peaks) <= BOUND
    print(f"greatest resident set {max(peaks) / 2**20:,.0f} MiB, bound {BOUND / 2**20:,.0f} MiB")
    if arguments.to:
        files.write_json(arguments.to, record)


if __name__ == "__main__":
    main()

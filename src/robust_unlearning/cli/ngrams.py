"""Hard negatives of a corpus: ngrams."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from robust_unlearning.cli import AddVerb, overrides

SHOWN = 20
"""N-grams of each length that are printed where they were selected document by document."""


def add(verb: AddVerb) -> None:
    """Register the verb."""
    ngrams = verb("ngrams", _ngrams, "find the n-grams of a corpus by their likeness to their own document")
    ngrams.add_argument("corpus", help="text to forget: a file, a folder or hub:ORG/NAME, as in a recipe")
    ngrams.add_argument("--to", type=Path, required=True, help="JSON file to write")
    ngrams.add_argument("--n", metavar="N,N,…", help="words of an n-gram (default: 2,4,8,16)")
    ngrams.add_argument(
        "--each",
        type=int,
        metavar="K",
        help="n-grams of each class, for each n: most, least and averagely like their document (default: 10; Figure 4)",
    )
    ngrams.add_argument(
        "--per-document",
        type=int,
        metavar="K",
        help="instead of classes: the K n-grams of each document most like it, for each n (the paper: 10; Tables 2-5)",
    )
    ngrams.add_argument("--embedder", help="all-minilm-l6-v2 (default), or a sentence-transformers folder or hub id")
    ngrams.add_argument("--max-documents", type=int, metavar="D", help="use only the first so many documents")
    ngrams.add_argument(
        "--sample", type=int, metavar="K", help="at most K n-grams of a document for each n, drawn (default: all)"
    )
    ngrams.add_argument(
        "--document-embedding",
        choices=["first", "mean"],
        help="a document beyond the embedder's window: its first window (default), or the mean over windows",
    )
    ngrams.add_argument("--seed", type=int, help="of the sample (default: 0)")
    ngrams.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    overrides(ngrams, "change how the corpus is read: field=answer, split=test, min_chars=0")


def _ngrams(arguments: argparse.Namespace) -> None:
    from robust_unlearning import files
    from robust_unlearning.data.corpora import read_documents
    from robust_unlearning.perturb.embedders import DEFAULT, load_embedder
    from robust_unlearning.perturb.ngrams import NgramSettings, select_ngrams
    from robust_unlearning.recipe import TextSource, checked
    from robust_unlearning.train.progress import EvaluationProgress

    given = {name: value for name in NgramSettings.model_fields if (value := getattr(arguments, name)) is not None}
    if "n" in given:
        given["n"] = given["n"].split(",")
    settings = checked(NgramSettings, given, (), "ngrams")
    limit = {} if arguments.max_documents is None else {"max_documents": arguments.max_documents}
    source = checked(TextSource, {"path": arguments.corpus, **limit}, arguments.overrides, arguments.corpus)
    documents = read_documents(source)
    embedder = load_embedder(arguments.embedder or DEFAULT, arguments.device)

    with EvaluationProgress("embedding", unit="text") as progress:
        record, work = select_ngrams(documents, embedder, settings, files.cache_dir() / "ngrams", progress.tick)
    files.write_json(
        arguments.to, {"source": arguments.corpus, "corpus": source.model_dump(exclude_defaults=True), **record}
    )
    print(_table(record))
    if work.embedded:
        rate = work.embedded / work.seconds
        print(f"{work.embedded:,} n-grams embedded in {work.seconds:.1f} s, {rate:,.0f} a second")
    else:
        print("every similarity was in the cache")
    print(f"written to {arguments.to}")


def _table(record: dict[str, Any]) -> str:
    """The spread for each n and the selected n-grams under it."""
    from robust_unlearning.report.tables import Column, Table
    from robust_unlearning.stats.format import NumberForm

    headers = ("n-gram", "class", "similarity", "document")
    columns = {header: Column(header, NumberForm(".3f")) for header in headers}
    documents, embedder = record["documents"], record["embedder"]
    lines = [f"{documents['count']:,} documents, embedder {embedder['name']}"]
    if documents["longer_than_window"]:
        how = {"first": "only its first window is embedded", "mean": "the mean over its windows is taken"}
        lines[0] += (
            f"; {documents['longer_than_window']:,} are longer than its window of {embedder['window']} word pieces: "
            f"{how[record['settings']['document_embedding']]}"
        )
    for n, spread in record["similarity"].items():
        used = f"{spread['count']:,} n-grams"
        if spread["count"] < spread["distinct"]:
            used = f"{spread['count']:,} n-grams drawn of {spread['distinct']:,}"
        lines.append(f"\nn = {n}: similarity {spread['mean']:.3f} ± {spread['sd']:.3f} (mean ± sd of {used})\n")
        selected = [ngram for ngram in record["ngrams"] if ngram["n"] == int(n)]
        rows = [{**ngram, "n-gram": ngram["text"], "class": ngram["class"].replace("_", " ")} for ngram in selected]
        printed = rows if record["settings"]["per_document"] is None else rows[:SHOWN]
        lines.append(Table("", columns, printed).text())
        if len(printed) < len(rows):
            lines.append(f"… and {len(rows) - len(printed):,} more in the file")
    return "\n".join(lines)

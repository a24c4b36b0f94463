"""The n-gram stage of a reproduction: both of the paper's selections, asked and tabled by themselves."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import yaml

from robust_unlearning import files
from robust_unlearning.cli import main
from robust_unlearning.perturb import embedders
from robust_unlearning.perturb.embedders import Vectors
from robust_unlearning.perturb.ngrams import TOP

SMALL = {
    "about": "A small one.",
    "suite": "planted",
    "seeds": [0],
    "limit": 2,
    "set": {"steps": 2, "batch_size": 2},
    "rule": "max perturbed",
    "stages": {
        "main": {
            "title": "Main", "kind": "main", "stands_for": "Figure 1", "command": "unlearn sweep tiny/rmu",
            "grids": [{"recipe": ["tiny/rmu", "tiny/npo-kl", "tiny/npo-mse"], "noise_std": [0, 3]}],
        },
        "figure4": {
            "title": "N-grams", "kind": "ngrams", "stands_for": "Figure 4, Tables 2 to 5", "command": "unlearn ngrams",
            "recipes": ["tiny/rmu", "tiny/npo-kl", "tiny/npo-mse"], "n": [3], "each": 2, "sample": 4,
            "per_document": 2, "documents": 3, "corpora": ["planted:forget/plague_lore.jsonl"],
        },
    },
}  # fmt: skip


class Drawn:
    """A vector drawn from a text's hash."""

    name, fingerprint, window = "drawn", "drawn", None

    def embed(self, texts: Sequence[str]) -> Vectors:
        seeds = [list(hashlib.sha256(text.encode()).digest()) for text in texts]
        rows = np.array([np.random.default_rng(seed).standard_normal(4) for seed in seeds])
        return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)

    def pieces(self, texts: Sequence[str]) -> list[int]:
        return [1] * len(texts)


@pytest.mark.integration
def test_both_selections_through_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedders, "load_embedder", lambda *_: Drawn())
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(SMALL), encoding="utf-8")
    out = tmp_path / "out"
    assert main.main(["reproduce", str(tmp_path / "small.yaml"), "--out", str(out)]) == 0
    result = files.read_json(out / "stages" / "figure4" / "result.json")
    plain = {"base", "RMU", "NPO+KL", "NPO+MSE"}
    noisy = {f"{title} + RNA 3" for title in plain - {"base"}}
    by_class, by_document = result["tables"]["classes"], result["tables"]["lengths"]
    assert {row["label"] for row in by_class} == plain  # Figure 4 is of models without noise
    assert {row["label"] for row in by_document} == plain | noisy
    assert {row["similarity_class"] for row in by_document} == {TOP}
    assert TOP not in {row["similarity_class"] for row in by_class}
    assert not any(row["task"].startswith("forget") for row in by_class + by_document)
    asked = result["top_of_each_document"]["asked"]["3"]
    assert set(asked["words"]) <= {f"document {number}" for number in range(3)}
    assert len(asked["words"]) == len(result["top_of_each_document"]["right"]["base"]["3"]) == 2 * 2
    assert set(result["classes"]["asked"]["3"]["classes"]) <= {"most_similar", "least_similar", "around_mean"}
    outcomes = files.read_json(out / "reproduce.json")["outcomes"]
    found = {each["claim"] for each in outcomes if each["finding"] != "not run"}
    assert {"ngrams", "ngrams-mse", "ngrams-representation"} <= found
    assert all(each["estimate"]["seeds"] == 1 for each in outcomes if each["claim"] == "ngrams")

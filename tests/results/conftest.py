"""Folders of records."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from robust_unlearning import files


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Writes a folder of records below the working directory; returns its name."""
    monkeypatch.chdir(tmp_path)

    def folder(name: str, *parts: list[dict[str, Any]]) -> str:
        files.write_jsonl(tmp_path / name / "records.jsonl", [record for part in parts for record in part])
        return name

    return folder

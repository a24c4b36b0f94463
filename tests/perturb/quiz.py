"""Questions for the tests of this room, and sets of them on disk."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from robust_unlearning.data.questions import Question

NOUNS = ["apple", "river", "stone", "ladder", "cloud", "button", "candle", "meadow", "pencil", "bridge"]
SUBJECTS = ["anatomy", "high_school_biology", "us_foreign_policy"]
KEYWORDS = ["SARS-CoV-2", "ricin", "keylogger", "gain of function", "anthrax"]


def some_questions(count: int, seed: int = 0, choices: tuple[int, int] = (4, 4)) -> list[Question]:
    rng = random.Random(seed)
    made = []
    for index in range(count):
        options = tuple(rng.sample(NOUNS, rng.randint(*choices)))
        text = f" Which of these did {rng.choice(NOUNS)} number {index} see,\nif any? "
        made.append(Question(f"q{index}", text, options, rng.randrange(len(options)), rng.choice(SUBJECTS)))
    return made


def numbered_questions(count: int = 60) -> list[Question]:
    rng = random.Random(0)
    words = ["apple", "river", "stone", "ladder", "cloud", "button", "candle", "meadow"]
    questions = []
    for index in range(count):
        choices = tuple(rng.sample(words, rng.randint(2, 5)))
        text = f"Which of these is number {index}?"
        questions.append(Question(f"set:{index}", text, choices, rng.randrange(len(choices)), "words"))
    return questions


def write_hub(folder: Path, questions: list[Question], split: str = "test", one_config: bool = False) -> Path:
    """A data set as the hub lays it out: a config for each subject, or a single one with a column of subjects."""
    import pyarrow
    import pyarrow.parquet

    configs: dict[str, list[dict[str, Any]]] = {}
    for each in questions:
        row = {"question": each.question, "subject": each.subject, "choices": list(each.choices), "answer": each.answer}
        configs.setdefault("data" if one_config else each.subject, []).append(row)
    for config, rows in configs.items():
        (folder / config).mkdir(parents=True)
        pyarrow.parquet.write_table(
            pyarrow.Table.from_pylist(rows), folder / config / f"{split}-00000-of-00001.parquet"
        )
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def tokens_of(folder: Path) -> dict[str, tuple[str, str | None]]:
    """Id -> forget_token and control_token, as the data set's rows have them."""
    import pyarrow.parquet

    rows = [row for path in folder.glob("*/*.parquet") for row in pyarrow.parquet.read_table(path).to_pylist()]
    return {row["id"]: (row["forget_token"], row["control_token"]) for row in rows}


def controls_for(keywords: list[str]) -> dict[str, list[str]]:
    return {keyword: ["waterwheel", "trombone", "lasagne"] for keyword in keywords}

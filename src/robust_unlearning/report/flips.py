"""The per-question view: harmless questions that a forget-token flipped to wrong, and what noise did to them.

It reads the records (`records.jsonl`) that evaluations of a base, an unlearned model and its RNA twin left.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from robust_unlearning.questions import Question

BACK, STAYED, BY_RNA, KEPT, LOST, BASE_WRONG = (
    "flipped and flipped back", "flipped and stayed wrong", "flipped by RNA", "right throughout", "lost anyway",
    "base wrong",
)  # fmt: skip
KINDS = (BACK, STAYED, BY_RNA, KEPT, LOST, BASE_WRONG)
"""Every perturbed question is one of these; see `kind_of`."""


@dataclass(frozen=True)
class Answer:
    """What a model said to one form of a question: log p of each option in nats, the option chosen, right or not."""

    logprobs: tuple[float, ...]
    prediction: int
    correct: bool


@dataclass(frozen=True)
class Case:
    """One question with a forget-token in it, and what the three models said to it.

    Attributes:
        task: of the forget form, `SET/STYLE/WHERE`.
        clean: the question as it was.
        asked: the question with the forget-token in it.
        forget: the forget-token.
        control: the unrelated word that stands in its place in the control form.
        kind: one of `KINDS`.
        answers: model -> form ("forget", "control", "clean") -> what it said; the models in the order base,
            unlearned, RNA; forms that were not asked are left out.
    """

    task: str
    clean: Question
    asked: Question
    forget: str
    control: str
    kind: str
    answers: Mapping[str, Mapping[str, Answer]]


@dataclass(frozen=True)
class Flips:
    """The view of one pair of models.

    Attributes:
        models: what the base, the unlearned model and the RNA model are called.
        counts: task -> kind -> questions, over all questions, not only those shown.
        shown: the cases to look at, by kind, the largest changes first.
        every: (task, question's id, forget-token, control token, kind) of all questions.
    """

    models: tuple[str, str, str]
    counts: Mapping[str, Mapping[str, int]]
    shown: Sequence[Case]
    every: Sequence[tuple[str, str, str, str, str]]


def read_flips(base: Path, unlearned: Path, rna: Path, names: tuple[str, str, str], limit: int = 6) -> Flips:
    """The view from three folders that `unlearn eval` wrote on one suite with perturbed questions.

    Args:
        names: what the three models are called.
        limit: cases to show of each of the first three kinds.

    Raises:
        UserError: a folder without an evaluation of a suite, other suites, or no perturbed question in common.
    """
    raise NotImplementedError

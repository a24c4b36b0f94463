"""Records as `unlearn eval` writes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

N = 20


def rows(task: str, right: Sequence[bool], logp: Sequence[float] | None = None, **changes: Any) -> list[dict[str, Any]]:
    """Records as `unlearn eval` writes them; the right answer to question i is choice i % 4, of two tokens."""
    found = []
    for index, correct in enumerate(right):
        answer = index % 4
        logprobs = [-9.0] * 4
        logprobs[answer] = -1.0 if logp is None else float(logp[index])
        record = {
            "task": task,
            "id": f"q:{index}",
            "answer": answer,
            "prediction": answer if correct else (answer + 1) % 4,
            "correct": bool(correct),
            "correct_norm": bool(correct),
            "logprobs": logprobs,
            "tokens": [1 + (choice == answer) for choice in range(4)],
            "forget_token": "Nilmor" if "sentence" in task else None,
            "control_token": "Guria" if "sentence" in task else None,
        }
        found.append(record | changes)
    return found


def first(count: int) -> list[bool]:
    """The first so many questions right, the others wrong."""
    return [index < count for index in range(N)]

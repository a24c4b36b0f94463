"""Progress on the terminal: a bar where there is one, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from tqdm import tqdm

if TYPE_CHECKING:
    from robust_unlearning.train.candidate import Candidate


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def describe(row: dict[str, Any], recent: Mapping[str, Sequence[tuple[float, float, float]]]) -> str:
    """What has happened since the last row of `metrics.jsonl`, in one line.

    Each topic's losses are means over its steps since then: topics take turns, and the row is about one of them.
    Then the row's cosine to the reference and norm against its norm, of the last step alone.
    """
    losses = []
    for topic, steps in sorted(recent.items()):
        loss, forget, retain = (sum(each) / len(steps) for each in zip(*steps, strict=True))
        losses.append(f"{topic}: loss {loss:.4g} (forget {forget:.4g}, retain {retain:.3g}; {counted(len(steps))})")
    last = f"; last step, {row['topic']}:" if len(losses) > 1 else ""
    return (
        f"{', '.join(losses)}{last} "
        f"forget cos {row['forget_cosine']:.3f} norm {row['forget_norm']:.3g}/{row['forget_reference_norm']:.3g} "
        f"retain cos {row['retain_cosine']:.3f} norm {row['retain_norm']:.3g}/{row['retain_reference_norm']:.3g}"
    )


def counted(steps: int) -> str:
    """What a mean rests on: `mean of 5 steps`, or `1 step`."""
    return "1 step" if steps == 1 else f"mean of {steps} steps"


class _WithBar:
    """A context whose bar, if there is one, is closed at its end."""

    bar: tqdm[Any] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar is not None:
            self.bar.close()


class _StepsOfAll(_WithBar):
    """Counts the steps of all candidates; `total` of them are to come."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.steps: dict[int, int] = {}
        self.began = time.perf_counter()
        self.bar = tqdm(total=total, unit="step", dynamic_ncols=True) if sys.stderr.isatty() else None

    def count(self, candidate: Candidate, row: dict[str, Any], postfix: str = "") -> int:
        """Steps that all have taken, once a candidate has added a row; the bar shows it."""
        self.steps[id(candidate)] = row["step"]
        done = sum(self.steps.values())
        if self.bar is not None:
            self.bar.n = done
            self.bar.set_postfix_str(postfix)
            self.bar.refresh()
        return done


class TrainingProgress(_StepsOfAll):
    """Shows every reported row of one or several candidates, by their `names` where there are several."""

    def __init__(self, total: int, names: dict[int, str] | None = None) -> None:
        super().__init__(total)
        self.names = names or {}
        self.first: int | None = None

    def row(self, candidate: Candidate, row: dict[str, Any]) -> None:
        """Show a row that a candidate has just added to its metrics."""
        speed = f"{row['tokens_per_second']:.0f} tok/s"
        done = self.count(candidate, row, speed)
        if self.first is None:  # what a resumed run had done before tells nothing about the speed now
            self.first = max(0, done - candidate.recipe.log_every)
        line = f"{self.names.get(id(candidate), '')} {describe(row, candidate.recent)}"
        if self.bar is not None:
            self.bar.write(f"step {row['step']:>4} {line}")
            return
        rate = (time.perf_counter() - self.began) / max(1, done - self.first)
        left = _clock(rate * (self.total - done))
        print(f"step {row['step']} of {candidate.recipe.steps} {line} {speed}, {left} left", flush=True)


class GroupProgress(_StepsOfAll):
    """Shows how far many candidates are together, not their rows; each tenth of the whole is a line."""

    shown = 0

    def row(self, candidate: Candidate, row: dict[str, Any]) -> None:
        """Count the steps behind a row that a candidate has just added."""
        done = self.count(candidate, row)
        if self.bar is None and 10 * done // self.total > self.shown:
            self.shown = 10 * done // self.total
            seconds = time.perf_counter() - self.began
            print(f"  {done} of {self.total} steps of all points, {_clock(seconds)}", flush=True)


class EvaluationProgress(_WithBar):
    """Shows how many prompts of a question set are scored, or how many of another `unit` are done."""

    def __init__(self, title: str = "", unit: str = "prompt") -> None:
        self.title = title
        self.unit = unit
        self.name = ""

    def tick(self, name: str, done: int, total: int) -> None:
        """`done` of `total` prompts (or units) of the set `name` are scored."""
        if not sys.stderr.isatty():
            return
        if self.bar is None or self.name != name:
            if self.bar is not None:
                self.bar.close()
            self.name = name
            self.bar = tqdm(total=total, unit=self.unit, desc=f"{self.title} {name}".strip(), leave=False)
        self.bar.n = done
        self.bar.refresh()

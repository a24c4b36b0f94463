"""Training many runs: grouped by what candidates in lockstep must share, as many at once as memory allows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from robust_unlearning.errors import UserError
from robust_unlearning.run.folder import RunFolder
from robust_unlearning.train.progress import GroupProgress

Say = Callable[[str], None]


def groups(runs: Sequence[RunFolder]) -> list[list[RunFolder]]:
    """Runs that can share trunk, batches and reference, in order of their first; the key is the trainer's own."""
    from robust_unlearning.train.trainer import shared_fields

    found: dict[tuple[tuple[str, str], ...], list[RunFolder]] = {}
    for run in runs:
        found.setdefault(tuple(shared_fields(run.recipe).items()), []).append(run)
    return list(found.values())


def train_all(runs: Sequence[RunFolder], at_once: int | None = None, say: Say = print) -> dict[Path, str]:
    """Train every run that is not finished, each to the delta it would have alone, to the bit.

    A run that fails does not stop the others. One whose loss was not finite is marked failed; one that could not
    begin (no such file, no such layer) keeps the status it had.

    Args:
        at_once: how many at most side by side; left out, as many as memory allows.
        say: told what is trained.

    Returns:
        The folder of each run that failed -> why.
    """
    waiting = [run for run in runs if run.status != "finished"]
    grouped = groups(waiting)
    failed: dict[Path, str] = {}
    for number, group in enumerate(grouped, 1):
        try:
            most, words = _room(group) if at_once is None else (at_once, "as told")
        except UserError as error:  # the model cannot be had
            failed |= {run.path: str(error) for run in group}
            continue
        count = min(most, len(group))
        say(f"group {number} of {len(grouped)}: {len(group)} points, {count} side by side ({words})")
        failed |= _train_group(group, count, say)
    return failed


def _room(group: Sequence[RunFolder]) -> tuple[int, str]:
    """How many points of a group fit side by side, and the reckoning."""
    from robust_unlearning.models.checkpoint import pick_device
    from robust_unlearning.plan.memory import free_memory, need
    from robust_unlearning.plan.text import size

    needed = need([run.recipe for run in group])
    free = free_memory(pick_device(group[0].recipe.device))
    return needed.fits(free), (
        f"each {size(needed.point)}, model {size(needed.model)}, step {size(needed.step)}; {size(free)} free"
    )


def _train_group(group: Sequence[RunFolder], count: int, say: Say) -> dict[Path, str]:
    """Train a group `count` at a time, fewer where a GPU's memory does not suffice after all."""
    import torch

    failed: dict[Path, str] = {}
    waiting = list(group)
    while waiting:
        now = waiting[:count]
        try:
            failed |= _train_together(now)
            waiting = waiting[count:]
        except torch.OutOfMemoryError as error:
            if len(now) == 1:
                failed[now[0].path] = f"not enough memory for one point; lower batch_size or max_tokens ({error})"
                waiting = waiting[1:]
            count = max(1, len(now) // 2)
        if waiting:
            torch.cuda.empty_cache()
            say(f"  {len(waiting)} points left, {min(count, len(waiting))} side by side")
    return failed


def _train_together(runs: Sequence[RunFolder]) -> dict[Path, str]:
    """One pass of the trainer; if it cannot begin, point by point, so that only the one at fault fails."""
    from robust_unlearning.train.trainer import Diverged, Trainer

    try:
        with GroupProgress(sum(run.recipe.steps for run in runs)) as progress:
            Trainer(runs).train(progress.row)
    except Diverged as error:
        return error.runs
    except UserError as error:
        if len(runs) == 1:
            return {runs[0].path: str(error)}
        return {path: why for run in runs for path, why in _train_together([run]).items()}
    return {}

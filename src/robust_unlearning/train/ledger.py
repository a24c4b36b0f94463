"""Who pays for a step that several candidates take in lockstep: own work is one's own, shared work is divided.

A step is made of parts: each candidate's own work, and work that is done once, when the first asks for it, and used by
whoever asks later (batch, trunk, the base's states, a noise draw). Whoever happens to be first must not pay for it
alone, so with s(p) the seconds of part p, what lies inside other parts left out, and u(p) how many candidates used it,
directly or through another part,

    seconds of a candidate = Σ s(p) / u(p)   over the parts p that it used,

and the seconds of all candidates add up to those of the step. What no candidate used, such as making a line of
metrics, is in nobody's seconds.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch

Clock = Callable[[], float]
"""Seconds since some moment."""
Payer = TypeVar("Payer", bound=Hashable)


class Ledger:
    """Seconds of one step, by part.

    With one candidate nothing has to be divided, so only its work as a whole is timed.

    Args:
        clock: read whenever one part gives way to another.
        settle: called before it is read, where several candidates share a step: waits until a device has done what
            it was given, so that this counts for the part that gave it.
    """

    def __init__(self, clock: Clock = time.perf_counter, settle: Callable[[], None] = lambda: None) -> None:
        self._clock, self._settle = clock, settle
        self.begin(1)

    def begin(self, candidates: int) -> None:
        """Forget the step before; this one is taken by so many."""
        self._several = candidates > 1
        self._seconds: dict[Hashable, float] = defaultdict(float)
        self._uses: dict[Hashable, set[Hashable]] = {}
        self._running: list[Hashable] = []  # the innermost last
        self._since = 0.0

    @contextmanager
    def part(self, key: Hashable, *used: Hashable) -> Iterator[None]:
        """What is done inside the block is part `key`, which the part around it uses.

        Args:
            used: parts done before that this one uses.
        """
        if self._running and not self._several:
            yield
            return
        self._uses.setdefault(key, set()).update(used)
        if self._running:
            self._uses[self._running[-1]].add(key)
        self._turn()
        self._running.append(key)
        try:
            yield
        finally:
            self._turn()
            self._running.pop()

    def _turn(self) -> None:
        """Give the seconds since the last turn to the part that ran."""
        if self._several:
            self._settle()
        now = self._clock()
        if self._running:
            self._seconds[self._running[-1]] += now - self._since
        self._since = now

    def bill(self, payers: Sequence[Payer]) -> dict[Payer, float]:
        """The seconds of each payer, itself the key of its own part."""
        used = {payer: self._used(payer) for payer in payers}
        users = Counter(key for keys in used.values() for key in keys)
        return {payer: sum(self._seconds[key] / users[key] for key in keys) for payer, keys in used.items()}

    def _used(self, key: Hashable) -> set[Hashable]:
        """A part and all that it used, directly or not."""
        found, left = {key}, [key]
        while left:
            new = self._uses.get(left.pop(), set()) - found
            found |= new
            left += new
        return found


def wait_for(device: torch.device) -> None:
    """Return when the device has done what it was given; at once on a CPU, which does things when told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()

"""One command in several processes: they are started here, and none is left waiting for one that failed.

Each process runs the same command line and finds the others through the environment, as under `torchrun` and
`accelerate launch --multi_gpu` (which starts processes on CPUs too; with `--cpu` Accelerate starts a single one).
Inside, `processes.join` does the rest.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout
from queue import Empty, Queue
from threading import Thread

from robust_unlearning.errors import UserError

GRACE = 20.0
"""Seconds that processes get to end after another has failed, before they are killed."""
SETTLE = 5.0
"""Seconds in which processes may end by themselves with the user error that one has ended with: often all meet it."""
USER_ERROR, INTERRUPTED = 2, 130


def world_size() -> int:
    """How many processes the launcher of this one has started; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE") or 1)


def needed(processes: int) -> bool:
    """Whether a command that is to run in so many processes is still to be launched in them.

    Raises:
        UserError: fewer than one, or it runs in another number of them already.
    """
    if processes < 1:
        raise UserError(f"--processes {processes}: at least 1.")
    if 1 < processes != world_size() > 1:
        raise UserError(
            f"--processes {processes}, but a launcher started this command in {world_size()} processes; leave "
            "--processes out there."
        )
    return 1 == world_size() < processes


def check_batch(batch_size: int, processes: int) -> None:
    """See that each process gets a sequence of every batch.

    Raises:
        UserError: the batch has fewer sequences than there are processes.
    """
    if batch_size < processes:
        raise UserError(
            f"batch_size is {batch_size} and there are {processes} processes: a step's sequences are divided among "
            f"them, so each needs one. Use at most {batch_size} processes, or batch_size={processes} or more."
        )


@contextmanager
def followers_silent() -> Iterator[None]:
    """Inside the block only the first process of several prints."""
    if world_size() == 1 or os.environ.get("RANK") == "0":
        yield
        return
    os.environ["TQDM_DISABLE"] = "1"
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
        yield


def launch(command: Sequence[str], count: int) -> int:
    """Run a command in `count` processes on this machine; returns the exit status of the first that failed, else 0.

    When one fails, the others are interrupted, so that a run folder says `stopped`. What the first process writes
    is shown at once; what another one wrote as its error is shown when it was the one that failed, unless the first
    ended with a user error too: that was the same one.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {
        "OMP_NUM_THREADS": str(max(1, _cores() // count)),
        **os.environ,
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    with ExitStack() as stack:
        told = [None, *(stack.enter_context(tempfile.TemporaryFile()) for _ in range(1, count))]
        children = [
            subprocess.Popen(
                command,
                env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stderr=told[rank],
                preexec_fn=_interruptible if os.name == "posix" else None,
            )
            for rank in range(count)
        ]
        failed = wait(children)
        if failed is None:
            return 0
        said = told[failed]
        if said is not None and children[0].returncode != USER_ERROR:
            said.seek(0)
            print(f"process {failed} of {count}:\n{said.read().decode(errors='replace')}", file=sys.stderr, end="")
        status = children[failed].returncode
        return status if status > 0 else INTERRUPTED if status == -signal.SIGINT else 1


def wait(children: Sequence[subprocess.Popen[bytes]]) -> int | None:
    """Wait for all to end, interrupting the others when one has failed; returns which failed first, None if none."""
    ended: Queue[int] = Queue()

    def watch(rank: int) -> None:
        children[rank].wait()
        ended.put(rank)

    for rank in range(len(children)):
        Thread(target=watch, args=(rank,), daemon=True).start()
    failed: int | None = None
    interrupted = False
    left = len(children)
    try:
        while left:
            try:
                rank = ended.get(timeout=None if failed is None else GRACE if interrupted else SETTLE)
            except KeyboardInterrupt:  # the terminal has interrupted the children too
                failed, interrupted = 0, True
                continue
            except Empty:
                if interrupted:
                    break
                interrupted = True
                _interrupt(children)
                continue
            left -= 1
            if children[rank].returncode and failed is None:
                failed = rank
            if failed is not None and children[rank].returncode != USER_ERROR and not interrupted:
                interrupted = True
                _interrupt(children)
    finally:
        for child in children:
            if child.poll() is None:
                child.kill()
            child.wait()
    return failed


def _interrupt(children: Sequence[subprocess.Popen[bytes]]) -> None:
    for child in children:
        if child.poll() is None:
            child.send_signal(signal.SIGINT)


def _interruptible() -> None:
    """Heed SIGINT: what a shell starts in the background ignores it, and so would the children."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _cores() -> int:
    """Processor cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

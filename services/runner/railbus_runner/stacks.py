"""Where the threads of a trainer are: their Python stacks, and what the kernel says of each.

A trainer has a file in memory (`StacksFile`) as its descriptor, and writes its stacks into it at a signal. The handler
is C code that takes no lock, so it also works while the main thread is in native code, and while that holds the
interpreter. It does not work in an uninterruptible wait of the kernel's, nor where user code has taken the handler
away; the states of the threads, which the kernel tells, are there in any case. As any signal it ends a native call that
the kernel does not restart, such as `poll` or `nanosleep`, with EINTR; Python's own calls are repeated.
"""

from __future__ import annotations

import os
import time
from typing import Final

from railbus_runner import processes
from railbus_runner.forked import STACKS_SIGNAL
from railbus_runner.processes import ProcessId

MAX_STACKS_CHARS: Final = 16_384
_WRITTEN_S: Final = 3.0
_QUIET_S: Final = 0.1
_MAX_THREADS: Final = 64


class StacksFile:
    """A file without a name, which is gone with its last holder."""

    def __init__(self) -> None:
        self.fd = os.memfd_create("railbus-stacks", os.MFD_CLOEXEC)

    def size(self) -> int:
        return os.fstat(self.fd).st_size

    def read_from(self, offset: int) -> str:
        return os.pread(self.fd, 4 * MAX_STACKS_CHARS, offset).decode("utf-8", "replace")

    def close(self) -> None:
        os.close(self.fd)


def take_stacks(trainer: ProcessId, file: StacksFile) -> str:
    """The stacks of all threads of a trainer, for people; to be called in a thread, for it waits up to 3 s.

    Some `MAX_STACKS_CHARS` at most; never empty: it says so where a stack could not be had.
    """
    states = processes.thread_states(trainer.pid)
    offset = file.size()
    if not processes.handles(trainer.pid, STACKS_SIGNAL):
        told = "no Python stacks: the trainer does not handle the signal for them"
    elif not processes.signal_exactly(trainer, STACKS_SIGNAL):
        told = "no Python stacks: the trainer has just ended"
    else:
        told = _written(file, offset) or "no Python stacks: the trainer has not written any within 3 s"
    shown = [*states[:_MAX_THREADS], *([f"… and {len(states) - _MAX_THREADS} more"] if states[_MAX_THREADS:] else [])]
    return f"{cut_stacks(told.strip())}\n\n" + "\n".join(shown)


def cut_stacks(text: str, *, limit: int = MAX_STACKS_CHARS) -> str:
    """Not longer than an event or an error may carry; the end stays, for the main thread comes last."""
    return text if len(text) <= limit else f"…{text[1 - limit :]}"


def _written(file: StacksFile, offset: int) -> str:
    """What has been written behind the offset, once nothing has come for a moment; it has no end by itself."""
    until_s, size, since_s = time.monotonic() + _WRITTEN_S, offset, time.monotonic()
    while time.monotonic() < until_s:
        if (now := file.size()) != size:
            size, since_s = now, time.monotonic()
        elif size > offset and time.monotonic() - since_s >= _QUIET_S:
            break
        time.sleep(_QUIET_S / 10)
    return file.read_from(offset)

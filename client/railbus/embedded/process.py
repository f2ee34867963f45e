"""What the supervisor needs of Linux: children that die with their parent, and signals as something to wait for."""

from __future__ import annotations

import ctypes
import os
import select
import signal
import socket
from collections.abc import Callable, Iterable
from types import FrameType
from typing import Final

_PR_SET_PDEATHSIG: Final = 1
_LIBC: Final = ctypes.CDLL(None, use_errno=True)  # loaded before any fork

STOP_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

_Handler = Callable[[int, FrameType | None], object] | int | signal.Handlers | None


def die_with_parent(parent: int) -> None:
    """Get SIGTERM when the process `parent` ends, even by SIGKILL; called in the child, right after the fork.

    The kernel means the thread that forked, so only a single-threaded parent may use it.
    """
    if _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent:  # it ended before the call
        os._exit(1)


class Wakeup:
    """Signals, caught without doing anything and told by `wait`; so a signal never interrupts a step halfway."""

    def __init__(self) -> None:
        self._reader, self._writer = socket.socketpair()
        self._reader.setblocking(False)
        self._writer.setblocking(False)
        self._before: dict[signal.Signals, _Handler] = {}
        self._fd_before = -1

    def install(self, numbers: Iterable[signal.Signals]) -> None:
        """Catch these signals from now on; main thread only."""
        self._fd_before = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        for number in numbers:
            self._before[number] = signal.signal(number, _note)

    def wait(self, timeout_s: float) -> set[signal.Signals]:
        """The signals that came, waiting for the first of them at most so long."""
        ready, _, _ = select.select([self._reader], [], [], max(0.0, timeout_s))
        if not ready:
            return set()
        return {signal.Signals(number) for number in self._reader.recv(4096) if number in self._before}

    def restore(self) -> None:
        """Put back what was there before."""
        signal.set_wakeup_fd(self._fd_before)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()
        self._close()

    def leave_in_child(self) -> None:
        """Default handlers, in a child of the supervisor."""
        signal.set_wakeup_fd(-1)
        for number in self._before:
            signal.signal(number, signal.SIG_DFL)
        self._close()

    def _close(self) -> None:
        self._reader.close()
        self._writer.close()


def _note(_number: int, _frame: FrameType | None) -> None:
    """The wake-up descriptor has told it already."""

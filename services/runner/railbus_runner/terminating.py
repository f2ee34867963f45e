"""SIGTERM to the trainer itself, as `kill` or a cluster manager sends it: an order to stop with a checkpoint.

It is obeyed at the next step, as one of the runner is. A second one ends the process at once, for code that takes no
steps. User code that has a handler of its own keeps it. Once the runner has ordered a stop, its grace decides and
SIGTERM means nothing more.

Processes that user code forks are ended by SIGTERM as any other: `multiprocessing` ends its workers so. One that comes
while a process is being forked waits until the child has left the handler behind; Python would forget it.
"""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType

from railbus_runner.channel import TrainerChannel
from railbus_runner.frames import Stop


class Termination:
    """The handler of one trainer."""

    def __init__(self, channel: TrainerChannel) -> None:
        self._channel = channel
        self._of_thread = threading.local()

    def install(self) -> None:
        """From the main thread, before user code runs."""
        signal.signal(signal.SIGTERM, self._asked)
        os.register_at_fork(before=self._hold, after_in_parent=self._let_come, after_in_child=self._leave)

    def _asked(self, number: int, _frame: FrameType | None) -> None:
        stop = self._channel.stop
        if stop is None:
            self._channel.stop = Stop(reason="terminated")
        elif stop.reason == "terminated":
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    def _hold(self) -> None:
        self._of_thread.mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def _let_come(self) -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, self._of_thread.mask)

    def _leave(self) -> None:
        if signal.getsignal(signal.SIGTERM) == self._asked:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        self._let_come()

"""A trainer's word that it makes progress, for a runner that looks for stalls (`stalling`)."""

from __future__ import annotations

import time
from collections.abc import Callable

from railbus_runner.frames import Moved


class Pulse:
    """Tells of progress, at most every so often; costs nothing to speak of where nobody wants to know."""

    def __init__(
        self, send: Callable[[Moved], object], *, every_s: float | None, clock_s: Callable[[], float] = time.monotonic
    ) -> None:
        self._send = send
        self._every_s = every_s
        self._clock_s = clock_s
        self._due_s = 0.0

    def beat(self) -> None:
        """There was progress. Raises RunnerGone."""
        if self._every_s is not None and (now_s := self._clock_s()) >= self._due_s:
            self._due_s = now_s + self._every_s
            self._send(Moved())

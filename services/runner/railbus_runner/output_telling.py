"""What a trainer prints, as events: within a budget, and never so that the trainer has to wait."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from typing import Final, Protocol

from railbus_runner.output import read_output
from railbus_runner.output_budget import Dropped, OutputBudget, OutputStream
from railbus_shared.contracts.events import Severity

_NAMES: Final = ("stdout", "stderr")


class Tell(Protocol):
    """Records a fact about the attempt."""

    def __call__(self, what: str, data: Mapping[str, object], *, severity: Severity = "info") -> None: ...


class OutputPipes:
    """Two pipes for what the trainer prints."""

    def __init__(self) -> None:
        pipes = os.pipe(), os.pipe()
        self._reads = [read for read, _ in pipes]
        self.writes = [write for _, write in pipes]
        """For stdout and stderr."""

    def give_away(self) -> None:
        """Close this process's copies of the trainer's ends."""
        while self.writes:
            os.close(self.writes.pop())

    def take_reads(self) -> Iterator[tuple[int, str]]:
        """The ends to read, with their names; whoever takes one closes it."""
        for name in _NAMES:
            yield self._reads.pop(0), name

    def close(self) -> None:
        """Close what nobody has taken."""
        self.give_away()
        while self._reads:
            os.close(self._reads.pop())


class OutputTelling:
    """The streams of one trainer."""

    def __init__(self, tell: Tell) -> None:
        self._tell = tell
        budget = OutputBudget(time.monotonic())
        self._streams = {name: OutputStream(budget) for name in _NAMES}

    async def forward(self, fd: int, name: str) -> None:
        """Tell what comes out of a pipe, until it is closed or this is cancelled; closes the pipe."""
        try:
            await read_output(fd, name, self._heed)
        finally:
            dropped, last = self._streams[name].finish()
            self._tell_dropped(name, dropped)
            self._tell_lines(name, last)

    @property
    def tail(self) -> list[str]:
        """The last lines of both streams, those of stderr last; told or not."""
        return [line for name in _NAMES for line in self._streams[name].tail]

    def _heed(self, name: str, lines: list[str]) -> None:
        now_s = time.monotonic()
        self._tell_lines(name, self._streams[name].heed(lines, now_s))
        self._tell_dropped(name, self._streams[name].dropped(now_s))

    def _tell_lines(self, name: str, lines: list[str]) -> None:
        for line in lines:
            self._tell("job.output", {"stream": name, "line": line})

    def _tell_dropped(self, name: str, dropped: Dropped | None) -> None:
        if dropped is not None:
            data = {"stream": name, "lines": dropped.lines, "bytes": dropped.bytes}
            self._tell("job.output_dropped", data, severity="warning")

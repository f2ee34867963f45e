"""How much of what a trainer prints is told, so that a flood fills neither memory nor the stream of events; pure.

A trainer may print 4 MiB and 10,000 lines at once, and 256 KiB and 1,000 lines a second for ever. What is beyond that
is dropped, line by line, and counted; the trainer is never made to wait. The last lines of a stream are always told,
however much was dropped before them: there stands why a trainer failed.
"""

from __future__ import annotations

import collections
from dataclasses import dataclass, field
from typing import Final, NamedTuple

TAIL_LINES: Final = 100
"""Last lines of each stream, which are told in any case, and by which rules judge a failed attempt."""
_BYTES_PER_S: Final = 256 << 10
_LINES_PER_S: Final = 1000
_BURST_BYTES: Final = 4 << 20
_BURST_LINES: Final = 10_000
_TELL_EVERY_S: Final = 5.0


class Dropped(NamedTuple):
    """Lines that were not told."""

    lines: int
    bytes: int


_NONE: Final = Dropped(0, 0)


@dataclass
class OutputBudget:
    """Of all streams of one attempt together."""

    now_s: float
    _bytes: float = _BURST_BYTES
    _lines: float = _BURST_LINES

    def take(self, num_bytes: int) -> bool:
        """Whether one more line may be told; if so it is paid for."""
        if self._lines < 1 or self._bytes < num_bytes:
            return False
        self._lines -= 1
        self._bytes -= num_bytes
        return True

    def refill(self, now_s: float) -> None:
        """Time has passed."""
        elapsed_s, self.now_s = max(0.0, now_s - self.now_s), now_s
        self._bytes = min(_BURST_BYTES, self._bytes + elapsed_s * _BYTES_PER_S)
        self._lines = min(_BURST_LINES, self._lines + elapsed_s * _LINES_PER_S)


@dataclass
class OutputStream:
    """One stream: which of its lines are told, and how many are not.

    Attributes:
        tail: its last lines, told or not.
    """

    budget: OutputBudget
    tail: collections.deque[str] = field(default_factory=lambda: collections.deque(maxlen=TAIL_LINES))
    _untold: collections.deque[str] = field(default_factory=lambda: collections.deque(maxlen=TAIL_LINES))
    _dropped: Dropped = _NONE
    _said_s: float | None = None

    def heed(self, lines: list[str], now_s: float) -> list[str]:
        """Those to be told now."""
        self.budget.refill(now_s)
        self.tail.extend(lines)
        told: list[str] = []
        num_lines, num_bytes = self._dropped
        for line in lines:
            size = len(line)
            if self.budget.take(size):
                told.append(line)
                self._untold.clear()
            else:
                self._untold.append(line)
                num_lines, num_bytes = num_lines + 1, num_bytes + size
        self._dropped = Dropped(num_lines, num_bytes)
        return told

    def dropped(self, now_s: float) -> Dropped | None:
        """What was dropped since it was last said, if that is worth saying again."""
        is_early = self._said_s is not None and now_s - self._said_s < _TELL_EVERY_S
        if is_early or (gone := self._gone()) is None:
            return None
        self._dropped = Dropped(self._dropped.lines - gone.lines, self._dropped.bytes - gone.bytes)
        self._said_s = now_s
        return gone

    def finish(self) -> tuple[Dropped | None, list[str]]:
        """At the end: what was dropped and is not yet said, and the lines after it, which are told all the same."""
        gone, last = self._gone(), list(self._untold)
        self._untold.clear()
        self._dropped = _NONE
        return gone, last

    def _gone(self) -> Dropped | None:
        """What was dropped but for the last lines, which may yet be told."""
        lines = self._dropped.lines - len(self._untold)
        return Dropped(lines, self._dropped.bytes - sum(map(len, self._untold))) if lines else None

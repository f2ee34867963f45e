"""Which shards a stream needs next, told to whoever fetches and warms them; and letting go of those that lie behind.

It is looked at when an epoch begins, and about once a second after that; it is told only when it has changed. A global
shuffle needs any shard at any time to the end of an epoch: it lets go of none, and tells those that it does not hold.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Final

from railbus_runner.reading import Reading
from railbus_runner.shards import HeldShards

_EVERY_S: Final = 1.0
_TOLD: Final = 64
"""Shards that are told ahead: more than anybody fetches before they are told again."""

OnAhead = Callable[[Sequence[int], Sequence[int]], None]
"""Called with the shards ahead, in the order of their first need, and with those that were closed."""


class LookAhead:
    """The shards of one stream."""

    def __init__(self, reading: Reading, shards: HeldShards, tell: OnAhead) -> None:
        self._reading = reading
        self._shards = shards
        self._tell = tell
        self._epoch = -1
        self._due_s = 0.0
        self._told: tuple[int, ...] | None = None
        self.keep: frozenset[int] | None = None
        """Shards that are to stay open; all if None."""

    def look(self, epoch: int, batch: int, *, epochs: int) -> None:
        """A batch is about to be gathered, of so many epochs in all; costs a look at the clock when nothing is due."""
        now_s = time.monotonic()
        if epoch == self._epoch and now_s < self._due_s:
            return
        self._epoch, self._due_s = epoch, now_s + _EVERY_S
        ahead = self._reading.shards_ahead(epoch, batch, limit=None)
        if len(ahead) < _TOLD and epoch + 1 < epochs:
            following = self._reading.shards_ahead(epoch + 1, 0, limit=_TOLD)
            ahead = list(dict.fromkeys([*ahead, *following]))
        held, behind = self._shards.numbers, list[int]()
        if self._reading.algorithm == "global":
            ahead = [number for number in ahead if number not in held]
            if not ahead:
                self._due_s = math.inf  # all that this epoch needs are held
        else:
            self.keep = frozenset(ahead)
            behind = sorted(held - self.keep)
            self._shards.let_go(behind)
        self._tell_news(tuple(ahead[:_TOLD]), behind)

    def _tell_news(self, ahead: tuple[int, ...], behind: list[int]) -> None:
        if behind or ahead != self._told:
            self._told = ahead
            self._tell(ahead, behind)

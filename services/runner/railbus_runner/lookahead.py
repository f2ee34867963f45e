"""Which shards a stream needs next, told to whoever fetches and warms them; and letting go of those that lie behind.

It is looked at when an epoch begins, about once a second after that, and before a shard is asked for that is not held:
there may be no room for it until those behind are let go of. It is told only when it has changed. What a later epoch
needs is let go of, too, and asked for again: a cache may be smaller than the dataset. A global shuffle needs any shard
at any time to the end of an epoch: it lets go of none, and tells those that it does not hold.

Where nobody hears it, nobody's room is taken, so shards stay open for the next epoch and only the clock is looked at.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Final

from railbus_runner.places import Part
from railbus_runner.reading import Reading
from railbus_runner.shards import HeldShards

_EVERY_S: Final = 1.0
_TOLD: Final = 64
"""Shards that are told ahead: more than anybody fetches before they are told again."""

OnAhead = Callable[[Sequence[int], Sequence[int]], None]
"""Called with the shards ahead, in the order of their first need, and with those that were closed."""


def unheard(_ahead: object, _released: object) -> None:
    """Nobody fetches shards for this stream."""


class LookAhead:
    """The shards of one stream."""

    def __init__(self, reading: Reading, shards: HeldShards, tell: OnAhead) -> None:
        self._reading = reading
        self._shards = shards
        self._tell = tell
        self._is_heard = tell is not unheard
        self._epoch = -1
        self._due_s = 0.0
        self._told: tuple[int, ...] | None = None
        self.keep: frozenset[int] | None = None
        """Shards that are to stay open; all if None."""

    def look(self, part: Part, *, epoch: int, oldest: int, epochs: int) -> None:
        """A part is about to be gathered, of so many epochs in all; costs a look at the clock when nothing is due.

        `oldest` is the first batch of the epoch that may still be read.
        """
        now_s = time.monotonic()
        if epoch == self._epoch and now_s < self._due_s and not self._needs_room(part):
            return
        self._epoch, self._due_s = epoch, now_s + _EVERY_S
        ahead = self._reading.shards_ahead(epoch, oldest, limit=None)
        needed_now = frozenset(ahead)
        if len(ahead) < _TOLD and epoch + 1 < epochs:
            following = self._reading.shards_ahead(epoch + 1, 0, limit=_TOLD)
            ahead = list(dict.fromkeys([*ahead, *following]))
        held, behind = self._shards.numbers, list[int]()
        if self._reading.algorithm == "global":
            ahead = [number for number in ahead if number not in held]
            if not ahead:
                self._due_s = math.inf  # all that this epoch needs are held
        else:
            self.keep = needed_now if self._is_heard else frozenset(ahead)
            behind = sorted(held - self.keep)
            self._shards.let_go(behind)
        self._tell_news(tuple(ahead[:_TOLD]), behind)

    def _needs_room(self, part: Part) -> bool:
        """Whether a shard is to be asked for, while others may lie behind."""
        if not self._is_heard or self._reading.algorithm == "global":
            return False
        return not all(self._shards.holds(shard) for shard, _, _ in part.segments)

    def _tell_news(self, ahead: tuple[int, ...], behind: list[int]) -> None:
        if behind or ahead != self._told:
            self._told = ahead
            self._tell(ahead, behind)

"""Whether a trainer makes progress, as its job wants to know it (`stall_s`).

Progress is a step that ended (`ctx.step`), a batch that was given out (`ctx.stream`), metrics that were told
(`ctx.log`) and a checkpoint that was written; lines that are printed or logged are none. The first must come within
`stall_s` of the plan, so importing and building a model count too. Time in which the trainer waits for railbus does not
count: for shards that are being verified or fetched, for a commit, or for leases that could not be renewed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final

_LOOKS: Final = 8
"""In the time after which a trainer has stalled."""
_MAX_PERIOD_S: Final = 5.0
_LATE_S: Final = 0.5


@dataclass
class StallClock:
    """How long nothing has moved; pure.

    Attributes:
        stall_s: after which the trainer has stalled.
        moved_at_s: when it last made progress, or was last known to wait for railbus.
        is_told: whether the present stall has been told.
    """

    stall_s: float
    moved_at_s: float
    is_told: bool = False

    def moved(self, now_s: float) -> None:
        """There was progress."""
        self.moved_at_s, self.is_told = now_s, False

    def waits(self, now_s: float) -> None:
        """The trainer waits for railbus; it has not moved, but that is not its doing."""
        self.moved_at_s = now_s

    def is_due(self, now_s: float) -> bool:
        """Whether there is a stall that has not been told yet; true once for each."""
        if self.is_told or now_s - self.moved_at_s < self.stall_s:
            return False
        self.is_told = True
        return True


async def watch(
    clock: StallClock,
    *,
    now_s: Callable[[], float],
    is_waiting: Callable[[], bool],
    stalled: Callable[[], Awaitable[None]],
) -> None:
    """Look until cancelled, and call `stalled` once for each stall."""
    period_s = min(clock.stall_s / _LOOKS, _MAX_PERIOD_S)
    while True:
        before_s = now_s()
        await asyncio.sleep(period_s)
        late_s = now_s() - before_s - period_s
        if is_waiting() or late_s > period_s + _LATE_S:  # then this process stood still, and what came lies unread
            clock.waits(now_s())
        elif clock.is_due(now_s()):
            await stalled()


def moving_every_s(stall_s: float | None) -> float | None:
    """How often a trainer tells of its progress; None if nobody wants to know."""
    return None if stall_s is None else min(stall_s / _LOOKS, 1.0)

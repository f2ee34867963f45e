"""Telling a trainer until when its leases last, apart from the renewals: those must never wait for a trainer.

A trainer that has not read for long is told the latest deadline alone, once it reads again: thousands of unread ones
would fill its socket, and an order to stop would find no room.
"""

from __future__ import annotations

import asyncio
from typing import Final

from railbus_runner.frames import Deadline
from railbus_runner.link import TrainerLink

_UNREAD_BYTES: Final = 64 << 10
_UNREAD_S: Final = 0.25


class DeadlineTeller:
    """The word to one trainer; the latest wins, none is queued here."""

    def __init__(self, link: TrainerLink) -> None:
        self._link = link
        self._news = asyncio.Event()
        self._deadline_s = 0.0

    async def heed(self, deadline_s: float) -> None:
        """There is a new deadline, on CLOCK_BOOTTIME; never waits."""
        self._deadline_s = deadline_s
        self._news.set()

    async def run(self) -> None:
        """Tell until cancelled."""
        while True:
            await self._news.wait()
            while self._link.unread_bytes > _UNREAD_BYTES:  # noqa: ASYNC110 - the kernel tells nobody when it is read
                await asyncio.sleep(_UNREAD_S)
            self._news.clear()
            await self._link.send(Deadline(boottime_s=self._deadline_s))

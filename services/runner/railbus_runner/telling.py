"""What a trainer says of the shards it reads, told to the dataloader of its host for as long as the trainer lives.

The latest word wins; none is queued. It is repeated at a third of the time after which a silent stream counts as
closed, and after every outage. What the trainer has released is told before any shard is asked for that it says it
needs next: there may be no room for that one until then.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable
from typing import Final

from railbus_runner.frames import Ahead
from railbus_shared.contracts.requests import OpenedStream, StreamProgress
from railbus_shared.errors import RailbusError, TransientError
from railbus_shared.waiting import is_set_within

logger = logging.getLogger(__name__)

_RETRY_S: Final = 0.5

Send = Callable[[StreamProgress], Awaitable[object]]


class StreamTeller:
    """The word of one trainer."""

    def __init__(self, opened: OpenedStream, send: Send) -> None:
        """`send` raises TransientError if it is not known to have arrived."""
        self._opened = opened
        self._send = send
        self._news = asyncio.Event()
        self._number = 0
        self._ahead: tuple[int, ...] = ()
        self._held: set[int] = set()
        self._released: set[int] = set()
        self._are_releases_told = asyncio.Event()
        self._are_releases_told.set()

    def heed(self, frame: Ahead) -> None:
        """Take the trainer's word; never waits."""
        self._ahead = frame.shards
        self._held -= set(frame.released)
        self._released |= set(frame.released)
        if self._released:
            self._are_releases_told.clear()
        self._news.set()

    def holds(self, shards: Iterable[int]) -> None:
        """These have been verified for the trainer, which maps them."""
        self._held.update(shards)
        self._released.difference_update(shards)

    async def releases_told(self) -> None:
        """Wait until the dataloader knows of everything that the trainer has released."""
        await self._are_releases_told.wait()

    async def run(self) -> None:
        """Tell until cancelled."""
        while True:
            await is_set_within(self._news, self._opened.ttl_s / 3)
            self._news.clear()
            try:
                await self._tell()
            except TransientError as exc:
                logger.warning("progress not told now", extra={"stream": self._opened.stream, "problem": str(exc)})
                self._news.set()
                await asyncio.sleep(_RETRY_S)

    async def _tell(self) -> None:
        """One word; one that is refused will be refused again, so it counts as told."""
        released = frozenset(self._released)
        self._number += 1
        word = StreamProgress(
            stream=self._opened.stream,
            dataset=self._opened.dataset,
            number=self._number,
            ahead=self._ahead,
            held=tuple(sorted(self._held)),
            released=tuple(sorted(released)),
        )
        try:
            await self._send(word)
        except TransientError:
            raise
        except RailbusError as exc:
            logger.warning("progress refused", extra={"stream": self._opened.stream, "error": exc.to_wire()})
        self._released -= released
        if not self._released:
            self._are_releases_told.set()

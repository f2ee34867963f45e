"""`Turns`: who of many askers is served next. So many at once; who asks a lot waits behind who asks little."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter, deque
from collections.abc import AsyncIterator


class Turns:
    """At most `limit` at a time; of those that wait, the oldest of the asker that has the fewest now is next."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._active: Counter[str] = Counter()
        self._waiting: deque[tuple[str, asyncio.Future[None]]] = deque()

    @contextlib.asynccontextmanager
    async def turn(self, asker: str) -> AsyncIterator[None]:
        """Wait for a turn of this asker, and hold it."""
        await self._take(asker)
        try:
            yield
        finally:
            self._active[asker] -= 1
            self._call_next()

    async def _take(self, asker: str) -> None:
        called: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        entry = (asker, called)
        self._waiting.append(entry)
        self._call_next()
        try:
            await called
        except asyncio.CancelledError:
            if called.done() and not called.cancelled():
                self._active[asker] -= 1
            else:
                self._waiting.remove(entry)
            self._call_next()
            raise

    def _call_next(self) -> None:
        while self._waiting and self._active.total() < self._limit:
            asker, called = entry = min(self._waiting, key=lambda one: self._active[one[0]])
            self._waiting.remove(entry)
            self._active[asker] += 1
            called.set_result(None)

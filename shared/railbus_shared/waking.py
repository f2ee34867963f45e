"""Waking a loop from any thread, and not twice for the same thing: a wake takes longer than recording an event."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import Final

from railbus_shared.waiting import is_set_within

_WOKEN: Final = 1
_URGENT: Final = 2


class Waker:
    """Wakes who waits in one loop for something to do.

    Whoever has put something there calls it; who waits looks, after having said that it must be woken, whether
    something is there already. So nothing that was put there goes unseen.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._woken = asyncio.Event()
        self._urgent = asyncio.Event()
        self._told = 0
        """What the loop has been told since it last began to wait."""

    def __call__(self, is_urgent: bool) -> None:
        level = _URGENT if is_urgent else _WOKEN
        if self._told < level:
            self._told = level
            with contextlib.suppress(RuntimeError):  # the loop has closed; what is buffered was counted by `flush`
                self._loop.call_soon_threadsafe(self._wake, is_urgent)

    def _wake(self, is_urgent: bool) -> None:
        self._woken.set()
        if is_urgent:
            self._urgent.set()

    async def until(self, is_there: Callable[[], bool]) -> None:
        """Wait until something is there."""
        while not is_there():
            self._told = 0
            self._woken.clear()
            if not is_there():
                await self._woken.wait()

    async def until_urgent(self, is_urgent: Callable[[], bool], *, within_s: float) -> None:
        """Wait until something is urgent, or so many seconds."""
        if not is_urgent():
            self._told = _WOKEN
            self._urgent.clear()
            if not is_urgent():
                await is_set_within(self._urgent, within_s)

"""Waiting in tests for something that comes true by itself.

A wait has a long limit: where nothing is wrong it ends early, and a machine that is busy with other work is slow.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Callable

PATIENCE_S = 100.0


async def until(condition: Callable[[], bool | Awaitable[bool]], *, seconds: float = PATIENCE_S) -> None:
    """Look again and again until it holds; raises TimeoutError if it does not in so many seconds."""
    async with asyncio.timeout(seconds):
        while True:
            found = condition()
            if await found if inspect.isawaitable(found) else found:
                return
            await asyncio.sleep(0.01)

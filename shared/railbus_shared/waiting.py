"""Waiting for an event or for time to pass, whichever comes first.

`asyncio.wait_for` is banned in this project: on Python 3.11 it loses a cancellation that arrives together with the
result (python/cpython#86296), and a task that cannot be cancelled never drains.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Coroutine, Iterable, Iterator
from typing import Any, Final, TypeVar

T = TypeVar("T")

_AGAIN_S: Final = 0.5


async def is_set_within(event: asyncio.Event, timeout_s: float) -> bool:
    """Wait until the event is set, or so many seconds; tells whether it is set."""
    try:
        async with asyncio.timeout(timeout_s):
            await event.wait()
    except TimeoutError:
        return event.is_set()
    return True


async def is_any_set_within(events: Iterable[asyncio.Event], timeout_s: float) -> bool:
    """Wait until one of the events is set, or so many seconds; tells whether one is set."""
    events = tuple(events)
    if not any(event.is_set() for event in events):
        async with asyncio.TaskGroup() as tasks:
            waiting = [tasks.create_task(event.wait()) for event in events]
            await asyncio.wait(waiting, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
            await end(*waiting)
    return any(event.is_set() for event in events)


async def end(*tasks: asyncio.Task[Any]) -> None:
    """Cancel tasks until they have ended: nats-py waits with `wait_for` inside, so one cancellation may be lost.

    What they raised stays in them, for the TaskGroup that they belong to.
    """
    pending = {task for task in tasks if not task.done()}
    while pending:
        for task in pending:
            task.cancel()
        _, pending = await asyncio.wait(pending, timeout=_AGAIN_S)


async def whole(working: asyncio.Future[T]) -> T:
    """What a thread does; whoever is cancelled meanwhile ends when the thread has, for that cannot be stopped."""
    try:
        return await asyncio.shield(working)
    finally:
        while not working.done():
            with contextlib.suppress(asyncio.CancelledError):  # it is on its way already
                await asyncio.wait([working])


@contextlib.asynccontextmanager
async def beside(work: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """Run `work` beside the body and end it with the body, whose errors stay what they are (no ExceptionGroup).

    What `work` itself raises is raised once the body has ended well.
    """
    task = asyncio.create_task(work)
    try:
        yield
    finally:
        await end(task)
    if not task.cancelled():
        task.result()


@contextlib.contextmanager
def heeding_cancellation() -> Iterator[None]:
    """Around a wait of nats-py, which may lose a cancellation: it is raised nevertheless, in place of any outcome."""
    task = asyncio.current_task()
    before = task.cancelling() if task is not None else 0
    try:
        yield
    finally:
        if task is not None and task.cancelling() > before:
            raise asyncio.CancelledError

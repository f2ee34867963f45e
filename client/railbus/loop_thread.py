"""An event loop in a thread of its own, so that code without asyncio, or with a loop of its own, can use asyncio code.

A notebook's cell runs inside a running loop; it blocks that one while it waits for this one, as any call does.
"""

from __future__ import annotations

import asyncio
import atexit
import os
import threading
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator
from typing import Any, Final, TypeVar

from railbus_shared.waiting import end

T = TypeVar("T")

_STOP_S: Final = 10.0


class LoopThread:
    """The thread is a daemon, ends at `stop` or, after `at_exit` has been called, with the process."""

    def __init__(self, *, name: str, at_exit: Callable[[], None]) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._main, name=name, daemon=True)
        self._pid = os.getpid()
        self._at_exit = at_exit
        self._thread.start()
        atexit.register(self._exiting)

    @property
    def is_alive(self) -> bool:
        """Whether calls are possible; not in a process that was forked from this one."""
        return self._thread.is_alive() and os.getpid() == self._pid

    def call(self, work: Coroutine[Any, Any, T]) -> T:
        """Run `work` on the loop and return what it returns; an interrupt here cancels it there."""
        if not self.is_alive or threading.current_thread() is self._thread:
            work.close()
            raise RuntimeError("this client is closed, was made before a fork, or is called from its own thread")
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def iterate(self, items: AsyncGenerator[T, None]) -> Iterator[T]:
        """The items of an asynchronous generator, which is closed when this one is."""
        end = object()
        try:
            while True:
                item = self.call(_next(items, end))
                if item is end:
                    return
                yield item  # type: ignore[misc]  # what is not the end is an item
        finally:
            if self.is_alive:
                self.call(items.aclose())

    def stop(self) -> None:
        """End the thread; does nothing the second time."""
        atexit.unregister(self._exiting)
        if self.is_alive:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(_STOP_S)

    def _main(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_forever()
        finally:
            self._loop.run_until_complete(self._finish())
            self._loop.close()

    async def _finish(self) -> None:
        """Cancel what other threads still wait for, so that none of them waits for ever."""
        await end(*(asyncio.all_tasks() - {asyncio.current_task()}))
        await self._loop.shutdown_asyncgens()

    def _exiting(self) -> None:
        if os.getpid() == self._pid:
            self._at_exit()


async def _next(items: AsyncGenerator[T, None], end: object) -> T | object:
    return await anext(items, end)

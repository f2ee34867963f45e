"""A loop is woken for whatever is put there from any thread, and seldom more than once."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

from railbus_shared.waking import Waker
from until import PATIENCE_S


async def test_nothing_that_threads_put_there_goes_unseen() -> None:
    waker, there, taken = Waker(asyncio.get_running_loop()), list[int](), list[int]()

    def put(first: int) -> None:
        for number in range(first, first + 3000):
            there.append(number)
            waker(number % 7 == 0)

    threads = [threading.Thread(target=put, args=(first,)) for first in (0, 3000, 6000)]
    for thread in threads:
        thread.start()
    async with asyncio.timeout(PATIENCE_S):
        while len(taken) < 9000:
            await waker.until(lambda: bool(there))
            while there:
                taken.append(there.pop())
    for thread in threads:
        thread.join()
    assert sorted(taken) == list(range(9000))


async def test_what_is_urgent_ends_the_wait_for_company_and_the_rest_does_not() -> None:
    waker = Waker(asyncio.get_running_loop())
    waiting = asyncio.ensure_future(waker.until_urgent(lambda: False, within_s=PATIENCE_S))
    await asyncio.sleep(0)
    waker(False)
    await asyncio.sleep(0)
    assert not waiting.done()
    waker(True)
    async with asyncio.timeout(PATIENCE_S / 2):
        await waiting
    await waker.until_urgent(lambda: True, within_s=PATIENCE_S)
    await waker.until_urgent(lambda: False, within_s=0.001)


class _Counting(asyncio.SelectorEventLoop):
    """Counts how often it is woken from outside."""

    calls = 0

    def call_soon_threadsafe(self, *arguments: Any, **words: Any) -> asyncio.Handle:  # type: ignore[override]
        self.calls += 1
        return super().call_soon_threadsafe(*arguments, **words)


def test_a_loop_that_has_been_woken_is_left_alone_until_it_waits_again() -> None:
    loop = _Counting()
    waker = Waker(loop)
    for urgent in (False, False, True, False, True):
        waker(urgent)
    assert loop.calls == 2

    async def waits() -> None:
        waiting = asyncio.ensure_future(waker.until(lambda: loop.calls == 3))
        await asyncio.sleep(0)
        await asyncio.sleep(0)  # it has begun, was woken for what was told before, and waits again
        waker(False)
        async with asyncio.timeout(PATIENCE_S):
            await waiting

    with asyncio.Runner(loop_factory=lambda: loop) as runner:
        runner.run(waits())
    waker(True)  # nobody is there any more

"""Asynchronous code called from where there is no `await`."""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from collections.abc import AsyncGenerator, Iterator

import pytest

from railbus.loop_thread import LoopThread
from until import PATIENCE_S


@pytest.fixture
def thread() -> Iterator[LoopThread]:
    made = LoopThread(name="test", at_exit=lambda: None)
    yield made
    made.stop()


async def _answer(value: int) -> int:
    await asyncio.sleep(0)
    return value


async def _numbers(closed: list[bool]) -> AsyncGenerator[int, None]:
    try:
        for number in range(3):
            yield number
    finally:
        closed.append(True)


async def _fail() -> None:
    raise LookupError("as it is")


def test_a_call_returns_what_the_coroutine_does_or_raises_it(thread: LoopThread) -> None:
    assert thread.call(_answer(7)) == 7
    with pytest.raises(LookupError, match="as it is"):
        thread.call(_fail())


@pytest.mark.parametrize("taken", [1, 3])
def test_an_iteration_is_closed_at_its_end_and_when_it_is_left(thread: LoopThread, taken: int) -> None:
    closed: list[bool] = []
    numbers = thread.iterate(_numbers(closed))
    assert [next(numbers) for _ in range(taken)] == list(range(taken))
    if taken == 3:
        assert list(numbers) == []
    else:
        numbers.close()  # type: ignore[attr-defined]  # it is a generator
    assert closed == [True]


def test_a_call_from_its_own_thread_or_after_the_end_is_refused_and_hangs_nobody(thread: LoopThread) -> None:
    async def from_inside() -> str:
        with pytest.raises(RuntimeError, match="own thread"):
            thread.call(_answer(1))
        return "refused"

    assert thread.call(from_inside()) == "refused"
    thread.stop()
    thread.stop()
    with pytest.raises(RuntimeError, match="closed"):
        thread.call(_answer(1))


def test_the_end_cancels_what_others_wait_for(thread: LoopThread) -> None:
    begun, ends = threading.Event(), []

    async def wait_for_ever() -> None:
        begun.set()
        await asyncio.Event().wait()

    def waiter() -> None:
        with contextlib.suppress(asyncio.CancelledError, concurrent_cancelled()):
            thread.call(wait_for_ever())
        ends.append("cancelled")

    waiting = threading.Thread(target=waiter)
    waiting.start()
    assert begun.wait(PATIENCE_S)
    thread.stop()
    waiting.join(PATIENCE_S)
    assert ends == ["cancelled"]


def concurrent_cancelled() -> type[BaseException]:
    import concurrent.futures

    return concurrent.futures.CancelledError


def test_a_process_that_was_forked_is_told_to_connect_anew(thread: LoopThread) -> None:
    child = os.fork()
    if child == 0:
        status = 1
        with contextlib.suppress(RuntimeError):
            thread.call(_answer(1))
            status = 2
        os._exit(0 if status == 1 else status)
    assert os.waitpid(child, 0)[1] == 0
    assert thread.call(_answer(7)) == 7

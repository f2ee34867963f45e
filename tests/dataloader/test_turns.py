"""Who of many askers is served next."""

from __future__ import annotations

import asyncio

from railbus_dataloader.turns import Turns
from until import until


class Served:
    """Askers who take a turn, and who has one now."""

    def __init__(self, turns: Turns, tasks: asyncio.TaskGroup) -> None:
        self._turns, self._tasks = turns, tasks
        self.now: list[str] = []
        self._over: dict[str, asyncio.Event] = {}

    async def ask(self, name: str) -> asyncio.Task[None]:
        """`a1` is asker `a`."""
        task = self._tasks.create_task(self._take(name))
        await asyncio.sleep(0)
        return task

    async def _take(self, name: str) -> None:
        over = self._over[name] = asyncio.Event()
        async with self._turns.turn(name[0]):
            self.now.append(name)
            await over.wait()
            self.now.remove(name)

    async def end(self, name: str) -> None:
        self._over[name].set()
        for _ in range(4):
            await asyncio.sleep(0)


async def test_no_more_than_the_limit_at_a_time_and_who_asks_a_lot_waits() -> None:
    async with asyncio.TaskGroup() as tasks:
        served = Served(Turns(2), tasks)
        for name in ("a1", "a2", "a3", "a4", "b1", "c1"):
            await served.ask(name)
        assert served.now == ["a1", "a2"]
        for ended, expected in [("a1", ["a2", "b1"]), ("a2", ["b1", "a3"]), ("b1", ["a3", "c1"]), ("a3", ["c1", "a4"])]:
            await served.end(ended)
            assert served.now == expected
        await served.end("c1")
        await served.end("a4")


async def test_one_that_no_longer_waits_takes_no_turn() -> None:
    async with asyncio.TaskGroup() as tasks:
        served = Served(Turns(1), tasks)
        await served.ask("a1")
        gone = await served.ask("b1")
        await served.ask("c1")
        gone.cancel()
        await served.end("a1")
        assert served.now == ["c1"]
        await served.end("c1")


async def test_a_turn_given_to_one_that_leaves_at_that_moment_goes_to_the_next() -> None:
    async with asyncio.TaskGroup() as tasks:
        turns = Turns(1)
        served = Served(turns, tasks)
        await served.ask("a1")
        called = await served.ask("b1")
        await served.ask("c1")
        turns._active["a"] -= 1
        turns._call_next()  # b1 has its turn, and does not know of it yet
        called.cancel()
        await until(lambda: "c1" in served.now)
        turns._active["a"] += 1
        await served.end("a1")
        await served.end("c1")

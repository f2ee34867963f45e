"""Look-ahead on sessions whose trainers a test plays: in their order, within the budget, in turn."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import pytest

from railbus_dataloader.lookahead import LookAhead
from railbus_dataloader.sessions import Session, Sessions
from railbus_shared.errors import BusUnavailable, RailbusError, ShardCorrupt
from until import until


class Preparing:
    """Notes what is made ready for whom; a test can hold it up or have it fail."""

    def __init__(self) -> None:
        self.done: list[tuple[str, int]] = []
        self.running: list[tuple[str, int]] = []
        self.may_go = asyncio.Event()
        self.may_go.set()
        self.errors: dict[int, RailbusError] = {}

    async def __call__(self, session: Session, number: int) -> None:
        step = (session.stream, number)
        self.running.append(step)
        try:
            await self.may_go.wait()
            await asyncio.sleep(0)
            if number in self.errors:
                raise self.errors.pop(number)
        finally:
            self.running.remove(step)
        self.done.append(step)


class Playing:
    """A look-ahead that runs, and its sessions; every shard has one byte."""

    def __init__(self, budget: int) -> None:
        self.sessions = Sessions(ttl_s=60)
        self.preparing = Preparing()
        self.ahead = LookAhead(
            self.sessions, prepare=self.preparing, sizes=lambda _: [1] * 100, budget_bytes=lambda: budget
        )

    def tell(self, stream: str, *ahead: int, held: tuple[int, ...] = ()) -> None:
        session = self.sessions.heard(stream, "d", now_s=0)
        session.ahead, session.held = ahead, set(held)
        self.ahead.heed()

    def of(self, stream: str) -> list[int]:
        return [number for found, number in self.preparing.done if found == stream]


@contextlib.asynccontextmanager
async def playing(*, budget: int = 1000) -> AsyncIterator[Playing]:
    found = Playing(budget)
    async with asyncio.TaskGroup() as tasks:
        running = tasks.create_task(found.ahead.run())
        yield found
        running.cancel()


async def test_shards_are_made_ready_once_in_the_trainers_order() -> None:
    async with playing() as one:
        one.tell("s", 7, 2, 5)
        await until(lambda: one.of("s") == [7, 2, 5])
        one.tell("s", 2, 5, 9, held=(7,))
        await until(lambda: one.of("s") == [7, 2, 5, 9])


async def test_a_shard_that_comes_round_again_is_made_ready_again() -> None:
    async with playing() as one:
        one.tell("s", 1, 2)
        await until(lambda: one.of("s") == [1, 2])
        one.tell("s", 2)
        await asyncio.sleep(0.02)
        one.tell("s", 2, 1)
        await until(lambda: one.of("s") == [1, 2, 1])


async def test_all_sessions_have_the_same_share_however_much_one_asks_for() -> None:
    async with playing(budget=4) as one:
        one.tell("a", *range(50))
        one.tell("b", 90, 91, 92)
        await until(lambda: len(one.preparing.done) == 4)
        await asyncio.sleep(0.05)
        assert (one.of("a"), one.of("b")) == ([0, 1], [90, 91])
        one.sessions.close("b")
        one.ahead.heed()
        await until(lambda: one.of("a") == [0, 1, 2, 3])


async def test_no_session_waits_for_another_that_is_held_up() -> None:
    async with playing() as one:
        one.preparing.may_go.clear()
        one.tell("a", 1)
        await until(lambda: one.preparing.running == [("a", 1)])
        one.tell("b", 2)
        await until(lambda: one.preparing.running == [("a", 1), ("b", 2)])


async def test_what_is_not_wanted_any_more_is_given_up_and_with_a_session_ends_everything() -> None:
    async with playing() as one:
        one.preparing.may_go.clear()
        one.tell("a", 1, 2)
        await until(lambda: one.preparing.running == [("a", 1)])
        one.tell("a", 2, held=(1,))  # its reader was quicker
        await until(lambda: one.preparing.running == [("a", 2)])
        one.sessions.close("a")
        one.ahead.heed()
        await until(lambda: one.preparing.running == [])
        assert one.preparing.done == []


async def test_damage_stops_nothing_and_an_outage_is_outlived(caplog: pytest.LogCaptureFixture) -> None:
    async with playing() as one:
        one.preparing.errors = {
            1: ShardCorrupt(path="p", expected="x", actual="y"),
            2: BusUnavailable("away"),
        }
        one.tell("s", 0, 1, 2, 3)
        await until(lambda: one.of("s") == [0, 2, 3])
    assert [record.message for record in caplog.records] == ["shard not ready"] * 2


async def test_a_stream_that_is_opened_again_under_its_name_is_followed_anew() -> None:
    async with playing() as one:
        one.tell("s", 1)
        await until(lambda: one.of("s") == [1])
        one.sessions.close("s")
        one.tell("s", 1)
        await until(lambda: one.of("s") == [1, 1])

"""Work beside a body ends with it, and errors stay what they are."""

from __future__ import annotations

import asyncio

import pytest

from railbus_shared.waiting import beside


async def _for_ever(ended: list[str]) -> None:
    try:
        await asyncio.Event().wait()
    finally:
        ended.append("ended")


async def test_work_ends_with_the_body() -> None:
    ended: list[str] = []
    async with beside(_for_ever(ended)):
        await asyncio.sleep(0)
        assert ended == []
    assert ended == ["ended"]


async def test_what_the_body_raises_is_raised_as_it_is() -> None:
    ended: list[str] = []

    async def body() -> None:
        async with beside(_for_ever(ended)):
            await asyncio.sleep(0)
            raise LookupError("mine")

    with pytest.raises(LookupError, match="mine"):
        await body()
    assert ended == ["ended"]


async def test_what_the_work_raises_is_raised_once_the_body_has_ended() -> None:
    async def fail() -> None:
        raise LookupError("of the work")

    ended: list[str] = []

    async def body() -> None:
        async with beside(fail()):
            await asyncio.sleep(0.01)
            ended.append("well")

    with pytest.raises(LookupError, match="of the work"):
        await body()
    assert ended == ["well"]

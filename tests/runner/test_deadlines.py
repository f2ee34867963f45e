"""Deadlines to a trainer that does not read for long: nobody waits for it, and an order still finds room."""

from __future__ import annotations

import asyncio
import contextlib

from railbus_runner.deadlines import DeadlineTeller
from railbus_runner.frames import Deadline, FrameBuffer, Stop
from railbus_runner.link import TrainerLink
from until import until


async def test_a_trainer_that_does_not_read_holds_up_neither_renewals_nor_orders() -> None:
    link = TrainerLink()
    teller = DeadlineTeller(link)
    telling = asyncio.create_task(teller.run())
    last = 0.0
    while link.unread_bytes <= 64 << 10:  # as many as go out, then a thousand more
        last += 1
        await teller.heed(last)
        await asyncio.sleep(0)
    for _ in range(1000):
        last += 1
        await teller.heed(last)
        await asyncio.sleep(0)
    assert await link.send(Stop(reason="cancelled"))
    read, buffer = [], FrameBuffer()
    link.theirs.setblocking(False)

    def has_come() -> bool:
        with contextlib.suppress(BlockingIOError):
            read.extend(buffer.feed(link.theirs.recv(1 << 16)))
        return bool(read) and read[-1] == Deadline(boottime_s=last)

    await until(has_come)
    assert len(read) < 1000
    assert Stop(reason="cancelled") in read
    assert link.unread_bytes == 0
    telling.cancel()
    await asyncio.wait({telling})
    link.close()
    assert not await link.send(Stop(reason="cancelled"))

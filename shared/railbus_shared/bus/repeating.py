"""A request made again while nobody answers: for what changes nothing, or nothing more when it is asked twice.

NATS gives a request to any of those that serve its subject, and goes on giving it to one that hangs, or that the
network has cut off, until it has missed its pings: half a minute with the configuration that `railbus init` writes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Final

from railbus_shared import clock
from railbus_shared.bus.connection import Bus
from railbus_shared.waiting import end

_AGAIN_S: Final = 1.0


async def request_repeatedly(
    bus: Bus, subject: str, message: Mapping[str, object], *, timeout_s: float
) -> dict[str, object]:
    """As `Bus.request`, asked again each second; the first answer counts, also where it is an error."""
    give_up_s = clock.boottime_s() + timeout_s
    asked: list[asyncio.Task[dict[str, object]]] = []
    try:
        while True:
            left_s = give_up_s - clock.boottime_s()
            if left_s > 0 or not asked:
                asked.append(asyncio.create_task(bus.request(subject, message, timeout_s=max(left_s, 0.001))))
            done, _ = await asyncio.wait(asked, timeout=_AGAIN_S, return_when=asyncio.FIRST_COMPLETED)
            if done:
                return done.pop().result()
    finally:
        await end(*asked)
        await asyncio.gather(*asked, return_exceptions=True)  # the other ones' errors have been looked at with this

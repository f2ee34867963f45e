"""A thousand submissions at once, good and bad: each is accepted or refused with a code, and nothing is lost."""

from __future__ import annotations

import asyncio
import collections

import psutil
import pytest

from railbus_shared import wire
from railbus_shared.bus.connection import Bus, Outgoing
from running_up import RunningUp

pytestmark = pytest.mark.timeout(120)  # starts services that import torch

WAITS = {"model": "m", "dataset": "digits", "entrypoint": "paced:train", "after": ["never"]}
MIB = 1 << 20
_UNDER_WAY = 100  # NATS flushes before it acknowledges: a thousand at once may wait longer than one publish may take


def _submissions() -> list[bytes]:
    """In turns: seven new jobs, one that was submitted before, one that nobody offers, one that is no message."""
    made: list[bytes] = []
    for number in range(100):
        made += [wire.encode({**WAITS, "id": f"flood-{number}-{copy}"}) for copy in range(7)]
        made.append(wire.encode({**WAITS, "id": f"flood-{number}-0"}))
        made.append(wire.encode({**WAITS, "id": f"wrong-{number}", "entrypoint": "nobody:offers"}))
        made.append(b"\x81\xa5model")
    return made


async def test_each_of_a_thousand_submissions_is_accepted_or_refused_with_a_code(fragile_up: RunningUp) -> None:
    up, counted = fragile_up, collections.Counter[str]()
    async with up.client() as client, Bus.open(up.settings, name="flood") as bus:
        events = client.follow_all()
        first = asyncio.ensure_future(anext(events))
        room = asyncio.Semaphore(_UNDER_WAY)

        async def publish(data: bytes) -> None:
            async with room:
                await bus.publish(Outgoing(bus.subjects.submit, data, ""))

        await asyncio.gather(*map(publish, _submissions()))
        async with asyncio.timeout(60):
            event = await first
            while True:
                error = event["data"].get("error") if isinstance(event["data"], dict) else None
                counted[str(error["code"] if isinstance(error, dict) else event["type"])] += 1
                if counted["job.queued"] + counted["UNKNOWN_ENTRYPOINT"] + counted["BAD_MESSAGE"] == 900:
                    break
                event = await anext(events)
        await events.aclose()
        listed = await client.jobs(states=["queued"], limit=400)  # more may not fit into one message
    assert {name: counted[name] for name in ("job.queued", "UNKNOWN_ENTRYPOINT", "BAD_MESSAGE")} == {
        "job.queued": 700,
        "UNKNOWN_ENTRYPOINT": 100,
        "BAD_MESSAGE": 100,
    }
    assert (len(listed.jobs), listed.total) == (400, 700)
    assert psutil.Process(up.pid_of("device_manager")).memory_info().rss < 200 * MIB

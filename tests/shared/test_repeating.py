"""A request finds somebody who answers it, although NATS still gives requests to one that does not."""

from __future__ import annotations

import asyncio
import contextlib
import time

import pytest
from nats.aio.msg import Msg

from railbus_shared.bus.connection import Bus
from railbus_shared.bus.endpoints import Endpoint, serving
from railbus_shared.bus.repeating import request_repeatedly
from railbus_shared.contracts.requests import JobRef
from railbus_shared.errors import JobNotFound, NoResponder, RequestTimeout
from railbus_shared.metrics import Metrics
from railbus_shared.settings import CommonSettings

SUBJECT = "railbus.req.find"
QUEUE = "q"
"""The queue group of NATS micro services."""
NUM_REQUESTS = 12


async def _find(request: JobRef) -> JobRef:
    if request.id == "missing":
        raise JobNotFound("job has value 'missing': there is no such job")
    return request


async def _says_nothing(_: Msg) -> None: ...


@pytest.mark.parametrize("job", ["j-1", "missing"])
async def test_one_that_hangs_does_not_keep_others_from_answering(bus: Bus, common: CommonSettings, job: str) -> None:
    async with contextlib.AsyncExitStack() as stack:
        for name in ("one", "two"):
            own = await stack.enter_async_context(Bus.open(common, name=name))
            endpoint = Endpoint("find", SUBJECT, JobRef, _find)
            await stack.enter_async_context(
                serving(own, name, "", [endpoint], metrics=Metrics("test"), rejected=lambda *_: None)
            )
        await bus.client.subscribe(SUBJECT, queue=QUEUE, cb=_says_nothing)
        asked = (request_repeatedly(bus, SUBJECT, {"id": job}, timeout_s=30.0) for _ in range(NUM_REQUESTS))
        answers = await asyncio.gather(*asked, return_exceptions=True)
    if job == "missing":
        assert [type(answer) for answer in answers] == [JobNotFound] * NUM_REQUESTS
    else:
        assert answers == [{"id": job}] * NUM_REQUESTS


async def test_where_nobody_answers_that_is_told_in_time(bus: Bus) -> None:
    with pytest.raises(NoResponder):
        await request_repeatedly(bus, SUBJECT, {}, timeout_s=30.0)
    await bus.client.subscribe(SUBJECT, cb=_says_nothing)
    begun_s = time.monotonic()
    with pytest.raises(RequestTimeout):
        await request_repeatedly(bus, SUBJECT, {}, timeout_s=1.5)
    assert time.monotonic() - begun_s >= 1.4

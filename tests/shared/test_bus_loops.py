"""The core of the bus on both event loops: asyncio's in debug mode, and uvloop."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest
import uvloop

from railbus_shared import wire
from railbus_shared.bus import topology
from railbus_shared.bus.bucket import Bucket
from railbus_shared.bus.connection import Bus, Outgoing
from railbus_shared.bus.consume import Delivery, consume_batches
from railbus_shared.bus.endpoints import Endpoint, serving
from railbus_shared.contracts.model import Contract
from railbus_shared.contracts.requests import JobRef
from railbus_shared.errors import JobNotFound, NoResponder, RequestTimeout, RevisionConflict
from railbus_shared.metrics import Metrics
from railbus_shared.settings import CommonSettings
from railbus_shared.topology import event_consumer
from rawnats import RawClient
from servers import Server
from until import PATIENCE_S, until

Body = Callable[[Bus], Awaitable[None]]


@pytest.fixture(params=[asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio-debug", "uvloop"])
def on_loop(request: pytest.FixtureRequest, common: CommonSettings) -> Callable[[Body], None]:
    """Runs a body on one of the loops, with a bus on which everything exists."""

    def run(body: Body) -> None:
        async def main() -> None:
            async with asyncio.timeout(PATIENCE_S), Bus.open(common, name="test") as bus:
                await topology.ensure(bus, common.layout.state / "store.json")
                await body(bus)

        with asyncio.Runner(debug=request.param is asyncio.new_event_loop, loop_factory=request.param) as runner:
            runner.run(main())

    return run


async def _find(request: JobRef) -> Contract:
    if request.id == "missing":
        raise JobNotFound("job has value 'missing': there is no such job")
    return request


def test_requests_and_errors_travel(on_loop: Callable[[Body], None]) -> None:
    async def body(bus: Bus) -> None:
        endpoint = Endpoint("find", "railbus.req.find", JobRef, _find)
        async with serving(bus, "test", "", [endpoint], metrics=Metrics("test"), rejected=lambda *_: None):
            assert await bus.request("railbus.req.find", {"id": "j-1"}) == {"id": "j-1"}
            with pytest.raises(JobNotFound):
                await bus.request("railbus.req.find", {"id": "missing"})
        with pytest.raises(NoResponder):
            await bus.request("railbus.req.find", {"id": "j-1"})
        await bus.client.subscribe("railbus.req.silent")
        with pytest.raises(RequestTimeout):
            await bus.request("railbus.req.silent", {}, timeout_s=0.1)

    on_loop(body)


def test_streams_and_buckets_keep_what_they_are_given(on_loop: Callable[[Body], None], server: Server) -> None:
    async def body(bus: Bus) -> None:
        with RawClient(server.port) as raw:
            raw.publish(b"railbus.evt.a.b.c", b"hi", headers=b"XX")
        await bus.publish(Outgoing("railbus.evt.a.b.c", wire.encode({"n": 1}), "id-1"))
        stopping, taken = asyncio.Event(), list[bytes]()

        async def take(batch: list[Delivery]) -> bool:
            taken.extend(delivery.data for delivery in batch)
            if len(taken) >= 2:
                stopping.set()
            return True

        await consume_batches(bus, event_consumer(bus.subjects), take, stopping=stopping)
        assert taken == [b"hi", wire.encode({"n": 1})]
        bucket = Bucket(bus, bus.subjects.jobs)
        await bucket.create("a", {"x": 1})
        with pytest.raises(RevisionConflict):
            await bucket.create("a", {"x": 2})

    on_loop(body)


def test_a_restart_and_a_dead_reader_are_survived(on_loop: Callable[[Body], None], server: Server) -> None:
    async def body(bus: Bus) -> None:
        watching = asyncio.ensure_future(bus.run())
        try:
            async with asyncio.timeout(PATIENCE_S):
                server.kill()
                server.start()
                await until(lambda: bus.generation == 1)
                assert await bus.publish(Outgoing("railbus.evt.a.b.c", b"\x80", "id-1")) == 1
                assert bus.client._reading_task is not None
                bus.client._reading_task.cancel()
                await until(lambda: bus.generation == 2)
                assert await bus.publish(Outgoing("railbus.evt.a.b.c", b"\x80", "id-2")) == 2
        finally:
            watching.cancel()
            await asyncio.wait([watching])

    on_loop(body)

"""Endpoints: whatever is sent to them is answered or recorded, and nothing ends the service."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator

import msgpack
import pytest

from railbus_shared import wire
from railbus_shared.bus.bucket import Bucket
from railbus_shared.bus.connection import ERROR_CODE_HEADER, Bus
from railbus_shared.bus.endpoints import Endpoint, serving
from railbus_shared.contracts.logs import EventLines
from railbus_shared.contracts.model import Contract
from railbus_shared.contracts.requests import JobRef, Nothing
from railbus_shared.errors import InvalidName, MessageTooLarge, NoFreeDevice, NoResponder, RailbusError, error_from_wire
from railbus_shared.metrics import Metrics
from railbus_shared.settings import CommonSettings
from rawnats import RawClient
from servers import Server
from until import PATIENCE_S, until

SUBJECT = "railbus.req.test"


class Service:
    """What the endpoints of these tests do."""

    def __init__(self) -> None:
        self.rejected: list[tuple[str, bytes, RailbusError]] = []
        self.metrics = Metrics("test")
        self.together = asyncio.Barrier(4)
        self.begun = asyncio.Event()
        self.go = asyncio.Event()

    def endpoints(self) -> list[Endpoint[Contract]]:
        handlers = {
            "echo": (JobRef, self.echo), "meet": (Nothing, self.meet), "bug": (Nothing, self.bug),
            "refuse": (Nothing, self.refuse), "large": (Nothing, self.large), "slow": (Nothing, self.slow),
        }  # fmt: skip
        return [
            Endpoint(name, f"{SUBJECT}.{name}", cls, handle, may_wait=name == "slow")  # type: ignore[arg-type]
            for name, (cls, handle) in handlers.items()
        ]

    def reject(self, subject: str, data: bytes, error: RailbusError) -> None:
        self.rejected.append((subject, data, error))

    async def echo(self, request: JobRef) -> Contract:
        return request

    async def meet(self, request: Nothing) -> Contract:
        await self.together.wait()
        return request

    async def bug(self, _: Nothing) -> Contract:
        raise ZeroDivisionError("secret of the inside")

    async def refuse(self, _: Nothing) -> Contract:
        raise NoFreeDevice("device 'ü' is\r\ntaken: " + "x" * 600_000, hint="wait", details={"device": "d" * 600_000})

    async def large(self, _: Nothing) -> Contract:
        return EventLines(events=({"a": "x" * wire.MAX_BYTES},))

    async def slow(self, request: Nothing) -> Contract:
        self.begun.set()
        await self.go.wait()
        return request


@pytest.fixture
async def service(common: CommonSettings, bus: Bus) -> AsyncIterator[Service]:
    """Serves on a connection of its own, as a service does."""
    service = Service()
    async with (
        Bus.open(common, name="service", service=True) as own,
        serving(own, "test_thing", "For tests.", service.endpoints(), metrics=service.metrics, rejected=service.reject),
    ):
        await own.client.flush()
        yield service


async def _answer(bus: Bus, name: str, data: bytes) -> tuple[bytes, dict[str, str]]:
    reply = await bus.client.request(f"{SUBJECT}.{name}", data, timeout=PATIENCE_S)
    return reply.data, dict(reply.headers or {})


async def test_a_request_is_answered_in_its_own_encoding(bus: Bus, service: Service) -> None:
    assert await _answer(bus, "echo", b'{"id": "j-1"}') == (b'{"id":"j-1"}', {})
    assert await _answer(bus, "echo", wire.encode({"id": "j-1"})) == (wire.encode({"id": "j-1"}), {})
    assert service.rejected == []


async def test_however_many_wait_for_what_others_do_the_others_are_answered(bus: Bus, service: Service) -> None:
    for _ in range(100):  # more than are served at once
        await bus.client.publish(f"{SUBJECT}.slow", b"{}", reply=bus.client.new_inbox())
    await bus.client.flush()
    await service.begun.wait()
    assert await _answer(bus, "echo", b'{"id": "j-1"}') == (b'{"id":"j-1"}', {})
    service.go.set()


async def test_a_bad_request_is_answered_in_its_own_encoding_with_a_status(bus: Bus, service: Service) -> None:
    data, headers = await _answer(bus, "echo", b'{"id": "../x"}')
    assert headers[ERROR_CODE_HEADER] == "422"
    body = json.loads(data)
    assert (body["code"], body["details"]["field"]) == ("INVALID_NAME", "id")
    packed, _ = await _answer(bus, "echo", wire.encode({"id": "../x"}))
    assert msgpack.unpackb(packed) == body
    subject, payload, error = service.rejected[0]
    assert (subject, payload, type(error)) == (f"{SUBJECT}.echo", b'{"id": "../x"}', InvalidName)
    assert len(service.rejected) == 2


@pytest.mark.parametrize(
    ("data", "status", "code"),
    [
        (b"", "422", "INVALID_FIELD"), (b"\x80", "422", "INVALID_FIELD"), (b"garbage", "400", "BAD_MESSAGE"),
        (b'{"id": ', "400", "BAD_MESSAGE"), (b'{"id": "a", "id": "b"}', "400", "BAD_MESSAGE"),
        (b"{" + b" " * wire.MAX_BYTES + b"}", "413", "MESSAGE_TOO_LARGE"), (b"\xff" * 1_000_000, "400", "BAD_MESSAGE"),
    ],
    ids=["empty", "no field", "noise", "cut", "key twice", "large JSON", "large noise"],
)  # fmt: skip
async def test_what_is_no_request_is_answered_with_its_code(
    bus: Bus, service: Service, data: bytes, status: str, code: str
) -> None:
    answer, headers = await _answer(bus, "echo", data)
    assert (headers[ERROR_CODE_HEADER], wire.decode(answer)["code"]) == (status, code)
    assert [error.code for _, _, error in service.rejected] == [code]


async def test_random_garbage_is_answered_every_time(bus: Bus, service: Service) -> None:
    for size in (1, 2, 7, 100, 5000):
        answer, headers = await _answer(bus, "echo", os.urandom(size))
        assert ERROR_CODE_HEADER in headers
        assert wire.decode(answer)["code"] in {"BAD_MESSAGE", "INVALID_FIELD", "INVALID_NAME"}
    assert await bus.request(f"{SUBJECT}.echo", {"id": "j-1"}) == {"id": "j-1"}


async def test_unreadable_headers_are_answered_and_recorded(bus: Bus, service: Service, server: Server) -> None:
    subscription = await bus.client.subscribe("_INBOX.mine.x")
    await bus.client.flush()
    with RawClient(server.port) as raw:
        raw.publish(f"{SUBJECT}.echo".encode(), b'{"id": "j-1"}', headers=b"XX", reply=b"_INBOX.mine.x")
    assert wire.decode((await subscription.next_msg(PATIENCE_S)).data)["code"] == "BAD_MESSAGE"


async def test_an_answer_never_goes_where_state_is_kept(bus: Bus, service: Service, server: Server) -> None:
    bucket = Bucket(bus, bus.subjects.leases)
    revision = await bucket.create("x", {"holder": "me"})
    key, purge = b"$KV.railbus_leases.x", b"NATS/1.0\r\nKV-Operation: PURGE\r\nNats-Rollup: sub\r\n\r\n"
    with RawClient(server.port) as raw:
        raw.publish(f"{SUBJECT}.echo".encode(), b'{"id": "j-1"}', headers=purge, reply=key)
        raw.publish(f"{SUBJECT}.echo".encode(), b"garbage", headers=purge, reply=key)
        for verb in ("PING", "INFO", "STATS", "PING.railbus-test-thing", "INFO.railbus-test-thing"):
            raw.publish(f"$SRV.{verb}".encode(), b"", headers=purge, reply=key)
    assert await bus.request(f"{SUBJECT}.echo", {"id": "j-1"}) == {"id": "j-1"}  # all that came before is done
    await asyncio.sleep(0.1)
    entry = await bucket.get("x")
    assert entry is not None
    assert (entry.value, entry.revision) == ({"holder": "me"}, revision)
    assert [error.code for _, _, error in service.rejected] == ["UNSAFE_REPLY", "UNSAFE_REPLY"]


async def test_requests_run_side_by_side(bus: Bus, service: Service) -> None:
    async with asyncio.timeout(PATIENCE_S):
        await asyncio.gather(*(bus.request(f"{SUBJECT}.meet", {}) for _ in range(4)))


async def test_more_requests_than_there_are_slots_are_all_answered(bus: Bus, service: Service) -> None:
    async with asyncio.timeout(PATIENCE_S):
        answers = await asyncio.gather(*(bus.request(f"{SUBJECT}.echo", {"id": f"j-{n}"}) for n in range(200)))
    assert [answer["id"] for answer in answers] == [f"j-{n}" for n in range(200)]


async def test_a_bug_in_a_handler_is_answered_and_the_service_goes_on(bus: Bus, service: Service) -> None:
    data, headers = await _answer(bus, "bug", b"{}")
    assert headers[ERROR_CODE_HEADER] == "500"
    assert json.loads(data)["code"] == "INTERNAL"
    assert b"secret" not in data
    assert await bus.request(f"{SUBJECT}.echo", {"id": "j-1"}) == {"id": "j-1"}


async def test_an_answer_that_is_too_large_is_an_error_at_the_asker(bus: Bus, service: Service) -> None:
    with pytest.raises(MessageTooLarge):
        await bus.request(f"{SUBJECT}.large", {})


async def test_an_error_of_any_size_and_text_reaches_the_asker(bus: Bus, service: Service) -> None:
    data, headers = await _answer(bus, "refuse", b"{}")
    assert headers[ERROR_CODE_HEADER] == "409"
    assert headers["Nats-Service-Error"].startswith("device '?' is  taken")
    error = error_from_wire(json.loads(data))
    assert isinstance(error, NoFreeDevice)
    assert error.message.startswith("\"device 'ü' is")


async def test_the_service_is_found_and_its_errors_are_counted(bus: Bus, service: Service) -> None:
    await bus.request(f"{SUBJECT}.echo", {"id": "j-1"})
    await _answer(bus, "echo", b"garbage")
    await _answer(bus, "bug", b"{}")
    found = {
        verb: json.loads((await bus.client.request(f"$SRV.{verb}.railbus-test-thing", b"", timeout=PATIENCE_S)).data)
        for verb in ("PING", "INFO", "STATS")
    }
    assert found["PING"]["name"] == "railbus-test-thing"
    assert found["INFO"]["description"] == "For tests."
    echo = next(one for one in found["INFO"]["endpoints"] if one["name"] == "echo")
    assert echo["subject"] == f"{SUBJECT}.echo"
    assert echo["metadata"]["request-schema"].endswith("/JobRef")
    stats = {one["name"]: one for one in found["STATS"]["endpoints"]}
    assert (stats["echo"]["num_requests"], stats["echo"]["num_errors"], stats["echo"]["last_error"]) == (
        2,
        1,
        "BAD_MESSAGE",
    )
    assert (stats["bug"]["num_errors"], stats["bug"]["last_error"]) == (1, "INTERNAL")
    read = service.metrics.registry.get_sample_value
    assert read("railbus_rpc_requests_total", {"endpoint": "echo", "code": "OK"}) == 1
    assert read("railbus_rpc_requests_total", {"endpoint": "echo", "code": "BAD_MESSAGE"}) == 1
    assert read("railbus_rejected_messages_total", {"code": "INTERNAL"}) == 1


async def test_at_stop_what_is_in_flight_is_answered_and_nothing_new_is_taken(bus: Bus, common: CommonSettings) -> None:
    service = Service()
    async with Bus.open(common, name="service", service=True) as own, asyncio.TaskGroup() as tasks:
        stop = asyncio.Event()

        async def serve() -> None:
            async with serving(own, "x", "", service.endpoints(), metrics=service.metrics, rejected=service.reject):
                await stop.wait()

        serving_task = tasks.create_task(serve())
        await until(lambda: _is_served(bus))
        asked = tasks.create_task(bus.request(f"{SUBJECT}.slow", {}))
        await service.begun.wait()
        stop.set()
        await until(lambda: _is_refused(bus))
        assert not serving_task.done()
        service.go.set()
        assert await asked == {}


async def _is_served(bus: Bus) -> bool:
    return not await _is_refused(bus)


async def _is_refused(bus: Bus) -> bool:
    try:
        await bus.request(f"{SUBJECT}.echo", {"id": "j-1"})
    except NoResponder:
        return True
    return False

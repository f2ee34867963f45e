"""Attacks on everything at once: services and NATS as `railbus up` runs them, and what is left of them afterwards."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import nats.errors
import pytest

from railbus.embedded.credentials import UserKey, ensure_keys
from railbus.embedded.members import Place
from railbus.embedded.permissions import SERVICE_USERS, USERS
from railbus.embedded.reloading import reload_embedded
from railbus.embedded.server_config import SERVICE_ACCOUNT, ServerFiles
from railbus_shared import wire
from railbus_shared.bus.bucket import Bucket
from railbus_shared.bus.client import RailbusClient
from railbus_shared.bus.connection import Bus
from railbus_shared.contracts.logs import QueryEvents
from running_up import RunningUp, start_up
from until import PATIENCE_S, until

pytestmark = pytest.mark.timeout(150)  # starts services that import torch

KEY = "dev0"
WRITE = f"$KV.railbus_leases.{KEY}"
PURGE = {"KV-Operation": "PURGE", "Nats-Rollup": "sub"}
RECOVERY_S = 10.0
"""What the design promises for a service that was sent what its client library cannot read."""


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningUp]:
    running = start_up(tmp_path_factory.mktemp("up"), env={"RAILBUS_HEARTBEAT_S": "0.5"})
    try:
        running.wait_until_ready()
        yield running
    finally:
        status = running.stop()
    assert status == 0, running.output.read_text() + running.logs()
    _check_no_secret_is_told(running)


def _check_no_secret_is_told(up: RunningUp) -> None:
    """No seed stands in any file but its own, whatever was tried: not in logs, events, state or configuration."""
    seeds = [path.read_bytes().strip() for path in (up.layout.state / "keys").glob("*.nk")]
    assert len(seeds) == len(USERS)
    others = [path for path in up.root.rglob("*") if path.is_file() and path.suffix != ".nk"]
    assert len(others) > 10
    assert [path for path in (*others, up.output) if any(seed in path.read_bytes() for seed in seeds)] == []


@contextlib.asynccontextmanager
async def _as_person(up: RunningUp) -> AsyncIterator[RailbusClient]:
    key = up.settings.nats_key_file
    assert key is not None
    async with _client(up, key, "_INBOX") as client:
        yield client


@contextlib.asynccontextmanager
async def _client(up: RunningUp, seed: Path, inbox: str) -> AsyncIterator[RailbusClient]:
    async def ignore(_: Exception) -> None:
        pass

    client = RailbusClient()
    await client.connect(
        up.settings.nats_url, nkeys_seed_str=seed.read_text().strip(), inbox_prefix=inbox.encode(), error_cb=ignore
    )
    try:
        yield client
    finally:
        await client.close()


@contextlib.asynccontextmanager
async def _as_intruder(up: RunningUp, folder: Path) -> AsyncIterator[RailbusClient]:
    """Someone with every right in the account of the services, so that only their code is left to refuse."""
    place, where = Place.of_root(up.root), ServerFiles(up.layout.state / "nats")
    before = place.config.read_bytes()
    key: UserKey = ensure_keys(folder / "intruder", ["intruder"])["intruder"]
    settings = json.loads(before)
    settings["accounts"][SERVICE_ACCOUNT]["users"].append({"nkey": key.public})
    place.config.write_text(json.dumps(settings))
    assert reload_embedded(where)
    try:
        async with _client(up, key.seed_path, "_RINBOX.intruder") as client:
            yield client
    finally:
        place.config.write_bytes(before)
        assert reload_embedded(where)


async def _endpoints(client: RailbusClient) -> list[str]:
    """Every subject that a service answers, as the services say themselves."""
    inbox = client.new_inbox()
    answers = await client.subscribe(inbox)
    await client.publish("$SRV.INFO", b"", reply=inbox)
    found: list[str] = []
    for _ in SERVICE_USERS:
        info = json.loads((await answers.next_msg(PATIENCE_S)).data)
        found += [one["subject"] for one in info["endpoints"]]
    await answers.unsubscribe()
    return found


async def _rejected(up: RunningUp, code: str) -> list[str]:
    """Subjects of the messages that were recorded as refused with a code."""
    async with up.client() as client:
        await client.flush()
        found = await client.events(QueryEvents(types=("bus.rejected",), limit=1000))
    data: list[Any] = [event["data"] for event in found.events]
    return [str(one["subject"]) for one in data if one["error"]["code"] == code]


@contextlib.asynccontextmanager
async def _as_manager(up: RunningUp) -> AsyncIterator[Bus]:
    key = up.layout.state / "keys" / "device_manager.nk"
    settings = up.settings.model_copy(update={"nats_key_file": key})
    async with Bus.open(settings, name="device_manager", service=True) as bus:
        yield bus


async def _lease(up: RunningUp) -> object:
    async with _as_manager(up) as bus:
        return await Bucket(bus, "railbus_leases").get_with_deleted(KEY)


async def _num_submitted(up: RunningUp) -> int:
    async with _as_manager(up) as bus:
        return await bus.last_sequence("RAILBUS_JOBS")


async def test_no_endpoint_answers_where_state_lives_whoever_asks(up: RunningUp, tmp_path: Path) -> None:
    async with _as_intruder(up, tmp_path) as intruder:
        endpoints = await _endpoints(intruder)
        assert {subject.split(".")[2] for subject in endpoints} == {"jobs", "devices", "data", "runner", "telemetry"}
        for subject in endpoints:
            for reply in (WRITE, "$JS.API.STREAM.DELETE.RAILBUS_JOBS"):
                await intruder.publish(subject, b"{}", reply=reply, headers=PURGE)
        for verb in ("PING", "INFO", "STATS"):
            await intruder.publish(f"$SRV.{verb}", b"", reply=WRITE, headers=PURGE)
        await intruder.flush()

        async def are_recorded() -> bool:
            return set(await _rejected(up, "UNSAFE_REPLY")) == set(endpoints)

        await until(are_recorded)
        assert await _lease(up) is None
        await intruder.jetstream().stream_info("RAILBUS_JOBS")
    assert "is not an inbox" in up.logs()


async def test_a_person_writes_no_lease_by_any_endpoint(up: RunningUp) -> None:
    """Where the server brings the answer, it is the person's own account, so there is nothing to refuse."""
    async with _as_person(up) as person:
        endpoints = await _endpoints(person)
        for subject in endpoints:
            await person.publish(subject, b"{}", reply=WRITE, headers=PURGE)
        await person.publish("railbus.jobs.submit", b"{}", reply=WRITE, headers=PURGE)
        await person.flush()
        async with up.client() as client:
            await client.devices()
    assert await _lease(up) is None
    await until(up.is_ready)


HEADERS = {
    "noise": b"XX",
    "no end": b"NATS/1.0",
    "no UTF-8": b"NATS/1.0 \xff\xfe\r\n\r\n",
    "status": b"NATS/1.0 404\r\n\r\n",
}


@pytest.mark.parametrize("headers", HEADERS.values(), ids=HEADERS)
async def test_headers_that_cannot_be_read_stop_nobody_and_are_recorded(up: RunningUp, headers: bytes) -> None:
    """Sent to each endpoint, and stored among the jobs, where they would come again and again."""
    stored = await _num_submitted(up)
    async with _as_person(up) as person:
        for subject in (*await _endpoints(person), "railbus.jobs.submit"):
            line = b"HPUB %b %d %d\r\n%bhi\r\n" % (subject.encode(), len(headers), len(headers) + 2, headers)
            await person._send_command(line)
        await person.flush()
        async with asyncio.timeout(RECOVERY_S):
            for area, verb in (("jobs", "list"), ("devices", "list"), ("data", "list"), ("telemetry", "query")):
                assert (await person.request(f"railbus.req.{area}.{verb}", b"{}", timeout=RECOVERY_S)).data
    assert await _num_submitted(up) == stored + 1
    async with _as_manager(up) as bus:

        async def is_quarantined() -> bool:
            return (await bus.client.jetstream().stream_info("RAILBUS_JOBS")).state.messages == 0

        await until(is_quarantined)
    assert "railbus.req.jobs.submit" in await _rejected(up, "BAD_MESSAGE")
    await until(up.is_ready)


async def test_large_noise_on_every_subject_stops_nobody(up: RunningUp) -> None:
    async with _as_person(up) as person:
        endpoints = await _endpoints(person)
        for subject in (*endpoints, "railbus.jobs.submit"):
            await person.publish(subject, b"\xc1" * (wire.MAX_BYTES + 100_000))
        await person.flush()
        with pytest.raises(nats.errors.MaxPayloadError):
            await person.publish("railbus.jobs.submit", b"x" * (2 << 20))
    async with _as_person(up) as person:
        await person._send_command(b"PUB railbus.jobs.submit %d\r\n" % (2 << 20))  # what no client would send
        await until(lambda: not person.is_connected)
    async with up.client() as client:
        assert (await client.devices()).hosts
    await until(up.is_ready)


def test_nobody_was_started_anew(up: RunningUp) -> None:
    """The last one: whatever was sent before, no service has ended by it."""
    assert "starts again" not in up.output.read_text()
    assert "Traceback" not in up.logs()

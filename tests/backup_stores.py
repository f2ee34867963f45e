"""Stores for tests of backups: what they hold, and where it goes."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

from railbus.backup.manifest import Manifest, read, verify
from railbus.backup.restoring import restore
from railbus.backup.saving import Report, save
from railbus_shared import wire
from railbus_shared.bus import topology
from railbus_shared.bus.connection import Bus, Outgoing
from railbus_shared.bus.snapshots import messages_after, stream_info
from railbus_shared.settings import CommonSettings
from servers import Server

JOBS, RECORDS, EVENTS = "RAILBUS_JOBS", "KV_railbus_jobs", "RAILBUS_EVENTS"


def silent(stage: str, done: int, total: int | None) -> None:
    """Hears of progress."""


@contextlib.contextmanager
def another_server(folder: Path, *, extra: str = "") -> Iterator[Server]:
    """A server that holds nothing."""
    folder.mkdir()
    server = Server(folder, extra=extra)
    server.start()
    try:
        yield server
    finally:
        server.stop()


@contextlib.asynccontextmanager
async def joined(server: Server, root: Path) -> AsyncIterator[Bus]:
    async with Bus.open(CommonSettings(root=root, nats_url=server.url), name="operator", service=True) as bus:
        yield bus


async def saved(bus: Bus, folder: Path) -> Manifest:
    return await save(bus, folder, version="0", report=silent)


async def restored(bus: Bus, folder: Path, *, replaces: bool = False, report: Report = silent) -> str:
    """The new incarnation."""
    manifest = read(folder)
    verify(folder, manifest, report=silent)
    return await restore(bus, folder, manifest, replaces=replaces, accept=lambda _, __: None, report=report)


async def state(bus: Bus, stream: str) -> dict[str, object]:
    """First and last sequence of a stream and how many messages it has."""
    info = await stream_info(bus, stream)
    assert info is not None, stream
    return {name: info["state"][name] for name in ("messages", "first_seq", "last_seq")}


async def messages(bus: Bus, stream: str) -> list[dict[str, object]]:
    """All messages of a stream, as the server says them."""
    return [message async for message in messages_after(bus, stream, 0)]


async def newest(bus: Bus, stream: str) -> dict[str, object]:
    """The newest payload on each subject of a stream."""
    return {str(one["subject"]): one.get("data") for one in await messages(bus, stream)}


async def event(bus: Bus, number: int, *, num_bytes: int = 40) -> None:
    """Store one event of a producer of its own."""
    told = {"v": 1, "id": f"p-{number}", "producer": "p", "number": number, "filler": "x" * num_bytes}
    await bus.publish(Outgoing("railbus.evt.app.a.b", wire.encode(told), f"p-{number}"))


async def set_key(bus: Bus, bucket: str, key: str, value: bytes, **headers: str) -> None:
    await bus.publish(
        Outgoing(f"$KV.{bucket}.{key}", value, "", {name.replace("_", "-"): v for name, v in headers.items()})
    )


async def ensured(bus: Bus, marker: Path) -> str:
    """The incarnation of the store, as a service that starts finds it."""
    await topology.ensure(bus, marker)
    return bus.incarnation

"""`railbus restore FOLDER`: the streams of a backup into a running NATS, which then is another store than it was.

The stream of jobs comes first and is marked until all is done, so that a store into which a backup is put, or which a
killed command has left halfway, is taken for what it is: services refuse it, and the same command begins anew.

- Every stream has the new incarnation from its first message on: nothing that comes is taken for what was lost.
- What came while a bucket's snapshot was read is written behind it.
- A job that is in the queue and in the records, because it moved between the two while they were copied, is taken off
  the queue: under the new incarnation it would be another one, and run twice.
"""

from __future__ import annotations

import base64
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import orjson

from railbus.backup.manifest import BackupDamaged, Manifest, StreamEntry, read_in_chunks
from railbus_shared import wire
from railbus_shared.bus.connection import Bus
from railbus_shared.bus.snapshots import (
    CHUNK_BYTES,
    delete_message,
    delete_stream,
    forget_consumers_ahead,
    messages_after,
    need_operator,
    put_back,
    running_services,
    set_metadata,
    stream_info,
    write_again,
)
from railbus_shared.bus.topology import incarnation_in, is_marked, marked, metadata_of
from railbus_shared.errors import BadSetting, Conflict, WireError
from railbus_shared.store_marker import new_incarnation
from railbus_shared.topology import topology

Report = Callable[[str, int, int | None], None]
Accept = Callable[[str, frozenset[str]], None]
"""Told the new incarnation, and those whose place it takes: of the backup, and of what it has replaced."""

_OF_THE_SERVER: Final = "_nats."
"""Metadata that nats-server writes itself."""


async def restore(bus: Bus, folder: Path, manifest: Manifest, *, replaces: bool, accept: Accept, report: Report) -> str:
    """Put a verified backup into the store, and return the incarnation that it has now.

    With `replaces` what is there goes. `accept` is called just before the store may be used. If it is interrupted, no
    service takes the store, and the same call begins anew.
    Raises Conflict, BadSetting, BackupDamaged, BusUnavailable, RequestTimeout, StorageFull, NotAuthorized.
    """
    _check_fits(bus, manifest)
    await need_operator(bus)
    await _check_alone(bus)
    replaced = await _clear(bus, manifest, replaces=replaces)
    incarnation = new_incarnation()
    first = bus.subjects.jobs_stream
    for entry in sorted(manifest.streams, key=lambda one: one.name != first):
        metadata = metadata_of(incarnation)
        await _put_back(bus, folder, entry, marked(metadata) if entry.name == first else metadata, report=report)
    await _take_off_the_queue(bus, manifest)
    accept(incarnation, frozenset({manifest.incarnation, replaced} - {""}))
    await set_metadata(bus, first, metadata_of(incarnation))
    return incarnation


def _check_fits(bus: Bus, manifest: Manifest) -> None:
    if manifest.prefix != bus.subjects.prefix:
        raise BadSetting(
            f"the backup is of prefix {manifest.prefix!r}, and RAILBUS_SUBJECT_PREFIX is {bus.subjects.prefix!r}",
            hint="set it to that of the backup",
        )
    known, named = [one.name for one in topology(bus.subjects).streams], {one.name for one in manifest.streams}
    if missing := [name for name in known if name not in named]:
        raise BackupDamaged(f"the backup has no {', '.join(missing)}", hint="nothing was put back")
    if bus.replicas > 1 and not bus.is_clustered:
        raise BadSetting(
            f"setting RAILBUS_REPLICAS has value {bus.replicas}, but this NATS is no cluster", hint="unset it, or 1"
        )


async def _check_alone(bus: Bus) -> None:
    if services := await running_services(bus):
        raise Conflict(
            f"services run on this bus: {', '.join(services)}", hint="stop them on all hosts first; NATS stays"
        )


async def _clear(bus: Bus, manifest: Manifest, *, replaces: bool) -> str:
    """Remove what is there, if that was said or if it is what an interrupted restore has left.

    Returns its incarnation, empty if nothing was there. Raises Conflict.
    """
    first = bus.subjects.jobs_stream
    found = {one.name: info for one in manifest.streams if (info := await stream_info(bus, one.name))}
    metadata: dict[str, str] = (found[first]["config"].get("metadata") or {}) if first in found else {}
    if found and not replaces and not is_marked(metadata):
        held = ", ".join(f"{name} ({info['state']['messages']} messages)" for name, info in found.items())
        raise Conflict(
            f"this NATS holds a store already: {held}",
            hint="back it up, and say --replace to put this one into its place; or restore into an empty NATS",
        )
    if first in found:  # what is left of it, if this is interrupted, must not be taken for a store
        await set_metadata(bus, first, marked(metadata))
    for name in sorted(found, key=lambda one: one == first):
        await delete_stream(bus, name)
    return incarnation_in(metadata)


async def _put_back(bus: Bus, folder: Path, entry: StreamEntry, metadata: dict[str, str], *, report: Report) -> None:
    own = {
        name: value for name, value in (entry.config.get("metadata") or {}).items() if name.startswith(_OF_THE_SERVER)
    }
    config = {**entry.config, "num_replicas": bus.replicas, "metadata": {**own, **metadata}}
    done = 0

    def told(chunk: bytes) -> bytes:
        nonlocal done
        done += len(chunk)
        report(entry.name, done, entry.snapshot.bytes)
        return chunk

    chunks = map(told, read_in_chunks(folder / entry.snapshot.file, CHUNK_BYTES))
    state = await put_back(bus, config, entry.state, chunks)
    _check_whole(entry, state)
    await forget_consumers_ahead(bus, entry.name, int(state["last_seq"]))
    if entry.later is not None:
        with (folder / entry.later.file).open("rb") as lines:
            for line in lines:
                await write_again(bus, orjson.loads(line))


def _check_whole(entry: StreamEntry, state: dict[str, Any]) -> None:
    """That the server has made of the snapshot what was in it; what expires may have expired since."""
    expires = entry.config.get("max_age") or entry.config.get("allow_msg_ttl")
    if int(state["last_seq"]) < int(entry.state["last_seq"]) and not expires:
        problem = f"ends with message {state['last_seq']}, and the backup with {entry.state['last_seq']}"
    elif int(state["messages"]) < entry.least_messages and not expires:
        problem = f"has {state['messages']} messages, and the backup at least {entry.least_messages}"
    else:
        return
    raise BackupDamaged(
        f"stream {entry.name!r}, put back, {problem}", hint="the store is not to be used; restore another backup"
    )


async def _take_off_the_queue(bus: Bus, manifest: Manifest) -> None:
    """Remove from the queue what has a record of the store that was backed up."""
    queue, records = bus.subjects.jobs_stream, f"KV_{bus.subjects.jobs}"
    waiting = {int(message["seq"]) async for message in messages_after(bus, queue, 0)}
    if not waiting:
        return
    async for message in messages_after(bus, records, 0):
        sequence = _sequence_of(message, manifest.incarnation)
        if sequence in waiting:
            waiting.discard(sequence)
            await delete_message(bus, queue, sequence)


def _sequence_of(message: dict[str, Any], incarnation: str) -> int:
    """Of the job event that a record was made of; 0 if it was one of another store, or this is no record."""
    try:
        record = wire.decode(base64.b64decode(message.get("data") or b""))
    except WireError:
        return 0
    sequence = record.get("sequence")
    return sequence if isinstance(sequence, int) and record.get("incarnation") == incarnation else 0

"""`railbus backup`: every stream and bucket of a running NATS into a folder, which is there whole or not at all.

Each stream is copied as it was at one moment, and the moments differ. The order makes them fit: first the queue of
jobs, then the records and all other buckets, then the events. A job moves from the queue into its record, so it is in
one of them or in both; and events come after the records that they tell of. Telemetry's position is in the copy of the
events, and what it has acknowledged is in the log files: so files are to be copied after this.

A bucket changes while its snapshot is read, and a snapshot lacks what is overwritten meanwhile (`bus.snapshots`). What
came is read behind it and kept beside it; both are the bucket when that reading ended. The queue and the events are
never overwritten: what a snapshot of them lacks was taken, or was too old.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final

import orjson

from railbus.backup.manifest import FileEntry, Manifest, StreamEntry
from railbus.backup.manifest import write as write_manifest
from railbus_shared import clock, files
from railbus_shared.bus.connection import Bus
from railbus_shared.bus.snapshots import messages_after, need_operator, server_version, snapshot, stream_info
from railbus_shared.bus.topology import incarnation_of_store, is_marked
from railbus_shared.errors import AlreadyRunning, Conflict, RequestTimeout, StoreMissing
from railbus_shared.topology import topology

Report = Callable[[str, int, int | None], None]

_LATER_S: Final = 60.0
"""Longest time for what has come meanwhile; a bucket is written more slowly than it is read."""


async def save(bus: Bus, folder: Path, *, version: str, report: Report) -> Manifest:
    """Copy the whole store into `folder`, which must not exist.

    Raises Conflict, AlreadyRunning, StoreMissing, StorageFull, BusUnavailable, RequestTimeout, NotAuthorized.
    """
    await need_operator(bus)
    with _appearing(folder) as beside:
        created_at = clock.now()
        incarnation = await _incarnation(bus)
        streams = [await _save_stream(bus, name, beside, report=report) for name in order(bus)]
        manifest = Manifest(
            railbus=version,
            nats_server=server_version(bus),
            created_at=created_at,
            completed_at=clock.now(),
            prefix=bus.subjects.prefix,
            incarnation=incarnation,
            streams=tuple(streams),
        )
        write_manifest(beside, manifest)
    return manifest


def order(bus: Bus) -> list[str]:
    """Names of all streams, in the order in which they are copied: the queue first and the events last."""
    events = bus.subjects.events_stream
    return [*(stream.name for stream in topology(bus.subjects).streams if stream.name != events), events]


async def _incarnation(bus: Bus) -> str:
    found = await stream_info(bus, bus.subjects.jobs_stream)
    if found is None:
        raise StoreMissing(f"there is no stream {bus.subjects.jobs_stream!r}", hint="start the services once")
    if is_marked(found["config"].get("metadata") or {}):
        raise Conflict("a restore of this store has not come to its end", hint="run `railbus restore FOLDER` again")
    return await incarnation_of_store(bus)


async def _save_stream(bus: Bus, name: str, folder: Path, *, report: Report) -> StreamEntry:
    info = await stream_info(bus, name)
    if info is None:
        raise StoreMissing(f"there is no stream {name!r}", hint="start the services once")
    size = int(info["state"]["bytes"])
    with _Sink.open(folder / f"{name}.snapshot", told=lambda done: report(name, done, max(done, size))) as sink:
        taken = await snapshot(bus, name, sink.write)
    later = None
    if bus.subjects.events_stream != name != bus.subjects.jobs_stream:
        later = await _save_later(bus, name, taken.last_sequence, folder)
    now = (await stream_info(bus, name) or info)["state"]
    least = int(now["messages"]) - (int(now["last_seq"]) - taken.last_sequence)
    snapshot_entry = sink.entry(messages=int(taken.state["messages"]))
    return StreamEntry(name, taken.config, taken.state, max(0, least), snapshot_entry, later)


async def _save_later(bus: Bus, name: str, sequence: int, folder: Path) -> FileEntry | None:
    """What a bucket holds behind a sequence; None if nothing came."""
    give_up_s, count = clock.boottime_s() + _LATER_S, 0
    with _Sink.open(folder / f"{name}.later.jsonl") as sink:
        async for message in messages_after(bus, name, sequence):
            sink.write(_line(message))
            count += 1
            if clock.boottime_s() > give_up_s:
                raise RequestTimeout(f"bucket {name!r} is written faster than it can be read", hint="try again later")
    if count:
        return sink.entry(messages=count)
    sink.path.unlink()
    return None


def _line(message: dict[str, Any]) -> bytes:
    return orjson.dumps(message, option=orjson.OPT_APPEND_NEWLINE)


@dataclass
class _Sink:
    """A file that is written once; its size and hash are known at the end."""

    path: Path
    file: BinaryIO
    told: Callable[[int], None]
    num_bytes: int = 0

    def __post_init__(self) -> None:
        self._digest = hashlib.sha256()

    @classmethod
    @contextlib.contextmanager
    def open(cls, path: Path, *, told: Callable[[int], None] = lambda _: None) -> Iterator[_Sink]:
        """Flushed to disk at the end; raises StorageFull."""
        with (
            files.storage_errors(path),
            os.fdopen(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "wb") as f,
        ):
            yield cls(path, f, told)
            f.flush()
            os.fsync(f.fileno())

    def write(self, data: bytes) -> None:
        self.file.write(data)
        self._digest.update(data)
        self.num_bytes += len(data)
        self.told(self.num_bytes)

    def entry(self, *, messages: int) -> FileEntry:
        return FileEntry(self.path.name, self.num_bytes, self._digest.hexdigest(), messages)


@contextlib.contextmanager
def _appearing(folder: Path) -> Iterator[Path]:
    """A folder beside the final one, under a name with a dot, that takes its place at the end.

    One that a killed command has left is used again. Raises Conflict if the final one exists, AlreadyRunning.
    """
    beside = files.temporary_path(folder)
    with files.storage_errors(folder):
        _need_free(folder)
        folder.parent.mkdir(parents=True, exist_ok=True)
        beside.mkdir(mode=0o700, exist_ok=True)
        fd = os.open(beside, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            _lock(fd, folder)
            for left in beside.iterdir():
                left.unlink()
            try:
                yield beside
                os.fsync(fd)
                _need_free(folder)
                beside.rename(folder)
            except BaseException:
                shutil.rmtree(beside, ignore_errors=True)  # what stays is cleared by the next backup of this name
                raise
            files.fsync_dir(folder.parent)
        finally:
            os.close(fd)


def _need_free(folder: Path) -> None:
    if folder.exists():
        raise Conflict(f"{str(folder)!r} exists already", hint="name a folder that does not exist")


def _lock(fd: int, folder: Path) -> None:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as exc:
        raise AlreadyRunning(f"another backup into {str(folder)!r} is under way", hint="wait for it") from exc

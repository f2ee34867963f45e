"""`FileServer`: sends files of this host's datasets to the dataloaders of other hosts.

Read, never mapped: a file that is cut while it is sent must end one transfer and not the service. A file that changes
while it is sent is not sent on. So many transfers go on at a time, and hosts take turns; in one that waits, the
receiver is told that it is not forgotten.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import stat
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from railbus_dataloader.turns import Turns
from railbus_shared import files
from railbus_shared.bus.chunks import CHUNK_BYTES, ChunkSender, sending
from railbus_shared.bus.connection import Bus
from railbus_shared.contracts.requests import SendFile, SendingFile
from railbus_shared.data.index import DatasetIndex
from railbus_shared.errors import (
    BusUnavailable,
    InvalidField,
    NotFound,
    RailbusError,
    TooManyTransfers,
    TransferBroken,
    shorten,
)
from railbus_shared.layout import Layout
from railbus_shared.waiting import end

logger = logging.getLogger(__name__)

_READ_CHUNKS: Final = 8
"""Read in one go in a thread: a hop costs as much as reading a chunk."""
_MAX_WAITING: Final = 64
_PAGE_BYTES: Final = 4096

Sent = Callable[[int], None]
"""Told of every chunk that was sent, by its size."""
FindIndex = Callable[[str], Awaitable[DatasetIndex]]
"""The index of a dataset on this host, as it is now."""


@dataclass(frozen=True)
class SendLimits:
    """How many at once, and how long silence is borne."""

    transfers: int = 4
    stall_s: float = 10.0
    """Without credit from the receiver."""
    sign_s: float = 2.0
    """Between two signs of life to a receiver that waits its turn."""


class OpenFile:
    """A file to send, open; what it was when it was opened it must stay. Its methods run in threads."""

    def __init__(self, path: Path) -> None:
        """Raises OSError; a symbolic link counts as one."""
        self._path = path
        self._in_use = threading.Lock()  # a thread whose task was cancelled goes on for a moment
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        self._stamp = self._look()
        self.size = self._stamp[0]

    @property
    def is_regular(self) -> bool:
        return stat.S_ISREG(os.fstat(self._fd).st_mode)

    def read(self, offset: int, into: Sequence[memoryview]) -> None:
        """Fill these with what stands there; raises TransferBroken if the file is no longer what it was."""
        with self._in_use:
            try:
                length = os.preadv(self._fd, into, offset)
                is_same = self._look() == self._stamp
            except OSError as exc:
                raise TransferBroken(f"{self._path.name} cannot be read: {exc.strerror}") from exc
        if length != sum(map(len, into)) or not is_same:
            raise TransferBroken(f"{self._path.name} changed while it was sent", hint="it is asked for again")

    def close(self) -> None:
        """May be called while `read` runs in a thread."""
        with self._in_use:
            os.close(self._fd)
            self._fd = -1

    def _look(self) -> tuple[int, int]:
        status = os.fstat(self._fd)
        return status.st_size, status.st_mtime_ns


class Ring:
    """Memory for the chunks that are under way, so that no chunk is copied, or written into fresh pages.

    It has room for a window and one chunk more: when there is credit for a chunk, the receiver has the one whose place
    it takes.
    """

    def __init__(self, start: int, *, window_bytes: int) -> None:
        """For a transfer that begins at `start`."""
        self._start = start
        self._places = -(-window_bytes // CHUNK_BYTES) + 1
        block = np.empty(self._places * CHUNK_BYTES + _PAGE_BYTES, np.uint8)
        self._memory = block.data[-block.ctypes.data % _PAGE_BYTES :]  # elsewhere than on a page, copies are slower

    def chunks(self, offset: int, length: int) -> list[memoryview]:
        """The places of the chunks of so many bytes of the file, of which the last may be a short one."""
        found: list[memoryview] = []
        for at in range(offset, offset + length, CHUNK_BYTES):
            place = (at - self._start) // CHUNK_BYTES % self._places * CHUNK_BYTES
            found.append(self._memory[place : place + min(CHUNK_BYTES, offset + length - at)])
        return found


class FileServer:
    """Answers SendFile; the bytes go over a connection of their own. `running` must be entered for it to serve."""

    def __init__(
        self, bus: Bus, layout: Layout, find_index: FindIndex, *, limits: SendLimits, sent: Sent = lambda _: None
    ) -> None:
        """`bus` is for bulk only."""
        self._bus = bus
        self._layout = layout
        self._find_index = find_index
        self._limits = limits
        self._sent = sent
        self._turns = Turns(limits.transfers)
        self._tasks: asyncio.TaskGroup | None = None
        self._transfers: set[asyncio.Task[None]] = set()

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Send while inside; what is under way at the end is cut off, and resumed by its receiver."""
        async with asyncio.TaskGroup() as tasks:
            self._tasks = tasks
            try:
                yield
            finally:
                self._tasks = None
                await end(*self._transfers)

    async def send(self, request: SendFile) -> SendingFile:
        """Begin to send a file; raises NotFound, InvalidField, UnsafeReply, TooManyTransfers, BusUnavailable."""
        if self._tasks is None or not self._bus.is_connected:
            raise BusUnavailable("this dataloader cannot send files at present", hint="ask again")
        path = await self._path(request)
        if len(self._transfers) >= self._limits.transfers + _MAX_WAITING:
            raise TooManyTransfers(
                f"{self._limits.transfers} files are being sent, and {_MAX_WAITING} wait", hint="ask later"
            )
        started: asyncio.Future[SendingFile] = asyncio.get_running_loop().create_future()
        transfer = self._tasks.create_task(self._transfer(request, path, started))
        self._transfers.add(transfer)
        transfer.add_done_callback(self._transfers.discard)
        return await started

    async def _path(self, request: SendFile) -> Path:
        """Where the file lies; raises NotFound if this host has not this version, or not this file of it."""
        index, folder = await self._find_index(request.dataset), self._layout.dataset(request.dataset)
        if index.sha256 != request.index_sha256:
            index, folder = await asyncio.to_thread(_older, folder, request.index_sha256)
        match request.file:
            case "schema":
                return folder / "schema.json"
            case "index":
                return folder / "index.json"
            case name if name in file_names(index):
                return self._layout.shards(request.dataset) / name
            case name:
                raise NotFound(f"field 'file' has value {name!r}: dataset {request.dataset!r} has no such file")

    async def _transfer(self, request: SendFile, path: Path, started: asyncio.Future[SendingFile]) -> None:
        """One file, from its opening to its last byte; what goes wrong ends it alone."""
        try:
            async with _opened(path, request.offset) as file, sending(self._bus, request.to) as sender:
                if started.cancelled():
                    return
                started.set_result(SendingFile(bytes=file.size, credit=sender.credit_subject))
                await self._send_all(request, file, sender)
        except RailbusError as exc:
            _fail(started, exc)
            logger.info("file not sent", extra={"file": request.file, "to": request.asker, "problem": str(exc)})
        except Exception as exc:  # a bug in one transfer must not end the others
            _fail(started, exc)
            logger.exception("bug while a file was sent", extra={"file": request.file})
        finally:
            _fail(started, BusUnavailable("this dataloader stops", hint="ask another host"))

    async def _send_all(self, request: SendFile, file: OpenFile, sender: ChunkSender) -> None:
        try:
            async with self._turn(request, sender):
                sender.grant(request.offset + request.window_bytes)
                await self._send_chunks(request.offset, request.window_bytes, file, sender)
        except RailbusError as exc:
            with contextlib.suppress(RailbusError):
                await sender.give_up(exc)
            raise

    async def _send_chunks(self, offset: int, window_bytes: int, file: OpenFile, sender: ChunkSender) -> None:
        ring = Ring(offset, window_bytes=window_bytes)
        while offset < file.size:
            whole = min(offset + CHUNK_BYTES, file.size)
            granted = await sender.credit_up_to(whole, timeout_s=self._limits.stall_s)
            length = min(granted, file.size) - offset
            if granted < file.size:
                length -= length % CHUNK_BYTES
            length = min(length, _READ_CHUNKS * CHUNK_BYTES)
            chunks = ring.chunks(offset, length)
            await asyncio.to_thread(file.read, offset, chunks)
            for data in chunks:
                await sender.send(offset, data)
                self._sent(len(data))
                offset += len(data)

    @contextlib.asynccontextmanager
    async def _turn(self, request: SendFile, sender: ChunkSender) -> AsyncIterator[None]:
        """This asker's turn; until then the receiver gets signs of life."""
        async with contextlib.AsyncExitStack() as stack:
            waiting = asyncio.create_task(stack.enter_async_context(self._turns.turn(request.asker)))
            try:
                while not waiting.done():
                    await asyncio.wait({waiting}, timeout=self._limits.sign_s)
                    if not waiting.done():
                        await sender.send(request.offset, b"")
            except BaseException:
                await end(waiting)
                raise
            yield


def _older(dataset: Path, index_sha256: str) -> tuple[DatasetIndex, Path]:
    """An older version of a dataset and its folder, for readers that opened it before an append; raises NotFound."""
    for path in sorted(dataset.glob("versions/*/index.json"), reverse=True):
        if files.sha256_file(path) == index_sha256:
            return DatasetIndex.read(path.with_name("schema.json"), path), path.parent
    raise NotFound(f"dataset {dataset.name!r} has no version {index_sha256} here", hint="ask another host")


def file_names(index: DatasetIndex) -> set[str]:
    """The files under `shards/` of a dataset."""
    shards = index.file.shards
    return {shard.file for shard in shards} | {shard.sidecar.file for shard in shards if shard.sidecar is not None}


def _fail(started: asyncio.Future[SendingFile], error: Exception) -> None:
    """Answer the asker with an error, unless it has its answer or has gone."""
    if not started.done():
        started.set_exception(error)


@contextlib.asynccontextmanager
async def _opened(path: Path, offset: int) -> AsyncIterator[OpenFile]:
    """A file to be sent from an offset on; raises NotFound for what is no plain file, InvalidField."""
    try:
        file = await asyncio.to_thread(OpenFile, path)
    except OSError as exc:
        raise NotFound(f"{shorten(path.name)} cannot be opened: {exc.strerror}", hint="ask another host") from exc
    try:
        if not file.is_regular:
            raise NotFound(f"{shorten(path.name)} is no plain file", hint="ask another host")
        if offset > file.size:
            raise InvalidField(field="offset", value=offset, problem=f"the file has {file.size} bytes")
        yield file
    finally:
        file.close()

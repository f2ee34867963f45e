"""`Arrival`: a file while it comes in, in order and hashed as it is written, whatever its source; `Intake` has what
came flushed while more of it comes.

Nothing is written that does not follow what is there: a doubled chunk, a gap, and bytes beyond the end are refused
before they touch the file. So what lies on disk is always a beginning of the file as its source has it, from which
another attempt, or another source, may go on; whether it is the right file is known at the end, by its hash.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from railbus_dataloader.sources import WantedFile
from railbus_shared import files
from railbus_shared.bus.chunks import CHUNK_BYTES, Chunk
from railbus_shared.data.verified import Fingerprint
from railbus_shared.errors import ShardCorrupt, TransferBroken

_MAX_UNTOLD_BYTES: Final = (
    1 << 28
)  # of an index, of which only the hash is known; a thousand shards take less than 1 MB
_HASH_BYTES: Final = 1 << 20
FLUSH_BYTES: Final = 32 << 20
"""Flushed while the next ones come; 64 MiB did as well."""


class Arrival:
    """One file on its way in. What reads, writes and hashes is to be called in a thread; `close` is quick."""

    def __init__(self, wanted: WantedFile, into: Path) -> None:
        self.wanted = wanted
        self.size = wanted.bytes
        self.position = 0
        """So many bytes are there."""
        self._path = into
        self._digest = hashlib.sha256()
        self._fd = -1
        self._is_closed = False
        self._in_use = threading.Lock()  # a thread whose task was cancelled goes on for a moment
        self._flushing = threading.Lock()
        self._problem: OSError | None = None
        self._is_checked = False

    def open(self) -> None:
        """Open the file, made if it is missing, and hash what it holds; more than it can have is thrown away."""
        with self._in_use, files.storage_errors(self._path):
            self._fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
            if os.fstat(self._fd).st_size > (self.size or 0):
                os.ftruncate(self._fd, 0)
            while not self._is_closed and (data := os.pread(self._fd, _HASH_BYTES, self.position)):
                self._digest.update(data)
                self.position += len(data)

    def close(self) -> None:
        """May be called while another method runs in a thread: that one ends after its present piece."""
        self._is_closed = True
        with self._in_use:
            if self._fd >= 0:
                os.close(self._fd)
            self._fd = -1

    @property
    def is_complete(self) -> bool:
        return self.position == self.size

    def expect(self, size: int) -> None:
        """What a source says of the file's size; raises TransferBroken if it cannot be the file."""
        if self.size is None and size <= _MAX_UNTOLD_BYTES:
            self.size = size
        if size != self.size:
            raise TransferBroken(
                f"it has {size} bytes there, expected {self.size or f'at most {_MAX_UNTOLD_BYTES}'}",
                hint="another source is asked",
            )

    def take(self, chunks: Sequence[Chunk]) -> None:
        """Write chunks that follow each other and what is there; raises TransferBroken at the first that does not."""
        self._check_flushed()
        with self._in_use, files.storage_errors(self._path):
            for chunk in chunks:
                self._check(chunk)
                if self._is_closed:
                    return
                self._write(chunk.data)
                self._digest.update(chunk.data)
                self.position += len(chunk.data)

    def flush(self) -> None:
        """Flush what is there while more of it may come; what goes wrong is raised by `take` or `check`."""
        with self._flushing:
            with self._in_use:
                if self._is_closed or self._is_checked:
                    return
                fd = os.dup(self._fd)
            try:
                os.fdatasync(fd)
            except OSError as exc:  # the system tells it once, and not to who flushes next
                self._problem = exc
            finally:
                os.close(fd)

    def check(self, source: str) -> Fingerprint:
        """What the file is now, if its bytes have the hash that is wanted; else removes it and raises ShardCorrupt.

        Raises StorageFull, OSError if a flush has failed.
        """
        with self._flushing:
            self._is_checked = True
        self._check_flushed()
        found = Fingerprint.of_open(self._fd)
        actual = self._digest.hexdigest()
        if actual != self.wanted.sha256:
            self._path.unlink(missing_ok=True)
            where = f"{source}/{self.wanted.dataset}/{self.wanted.file}"
            raise ShardCorrupt(path=where, expected=self.wanted.sha256, actual=actual)
        return found

    def _check_flushed(self) -> None:
        if self._problem is not None:
            with files.storage_errors(self._path):
                raise self._problem

    def _check(self, chunk: Chunk) -> None:
        size, length = self.size or 0, len(chunk.data)
        if chunk.offset != self.position:
            problem = "twice" if chunk.offset < self.position else "out of order"
            raise TransferBroken(f"a chunk came {problem}: at {chunk.offset}, expected {self.position}")
        if length > size - self.position:
            raise TransferBroken(f"{length} bytes came at {chunk.offset}, but the file ends at {size}")
        if length not in {0, size - self.position} and length < CHUNK_BYTES:
            raise TransferBroken(f"a chunk of {length} bytes came, expected {CHUNK_BYTES} but for the last")

    def _write(self, data: memoryview) -> None:
        done = 0
        while done < len(data):
            done += os.pwrite(self._fd, data[done:], self.position + done)


class Intake:
    """Takes chunks into an arrival in threads, and has what came flushed while the next ones come.

    A large file that is flushed only once it is whole keeps the next one waiting.
    """

    def __init__(self, arrival: Arrival) -> None:
        self._arrival = arrival
        self._flushed_to = arrival.position
        self._flushing: asyncio.Future[None] | None = None

    async def take(self, chunks: Sequence[Chunk]) -> None:
        """See `Arrival.take`."""
        await asyncio.to_thread(self._arrival.take, chunks)
        is_idle = self._flushing is None or self._flushing.done()
        if is_idle and self._arrival.position - self._flushed_to >= FLUSH_BYTES:
            self._flushed_to = self._arrival.position
            self._flushing = asyncio.get_running_loop().run_in_executor(None, self._arrival.flush)

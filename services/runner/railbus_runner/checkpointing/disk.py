"""How a large file reaches the disk: whole, hashed on the way, and without passing through the page cache.

The caller's thread hashes while another one writes the same bytes, both without the GIL, so that the time is that of
the slower of the two. Blocks of 16 MiB go straight from the source's memory where that is page aligned, else through
one bounce buffer. A file system that takes no direct writes (some network and union file systems) gets buffered ones,
whose way to the disk is begun at once, so that the flush at the end finds little to do.

Space is taken before the first byte is written, so a disk that is too full is found out at once.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import hashlib
import mmap
import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Final

import numpy as np

from railbus_shared import files
from railbus_shared.errors import BadSetting, StorageFull

BLOCK_BYTES: Final = 16 << 20
"""Of one write; from some 8 MiB on, a larger one is no faster."""
MAX_AHEAD_BYTES: Final = 128 << 20
"""How far the hashing may be ahead of the writing: what an iterable's chunks may take of memory at a time."""
_ALIGNMENT: Final = mmap.PAGESIZE
"""Of memory, offsets and lengths of direct writes; a multiple of every disk's block that is in use."""
_NO_DIRECT: Final = {errno.EINVAL, errno.EOPNOTSUPP}
_UNWRITABLE: Final = {errno.EACCES, errno.EPERM, errno.EROFS}
_SYNC_FILE_RANGE_WRITE: Final = 2

_libc = ctypes.CDLL(None, use_errno=True)


def write_draft(final: Path, source: memoryview | Iterable[memoryview], *, nbytes: int) -> str:
    """Write the draft of a file (`files.temporary_path`) that has exactly these bytes; gives their hex SHA-256.

    Once this returns the bytes are on the disk; the name is not, before the folder is flushed. The source is one piece
    of memory, or chunks of any size. After any error there is no draft. Raises StorageFull, BadSetting for a folder
    that nobody may write to, FileExistsError for a draft that is there already, ValueError if the source has another
    length.
    """
    draft = files.temporary_path(final)
    with files.storage_errors(final), setting_errors(final.parent):
        descriptor = _create(draft)
        try:
            _reserve(descriptor, final, nbytes)
            if isinstance(source, memoryview):
                writer = _Writer(descriptor, max_ahead_bytes=nbytes)
                digest, length = writer.write([source])
            else:
                writer = _Writer(descriptor, max_ahead_bytes=MAX_AHEAD_BYTES)
                digest, length = writer.write(source)
            _check_length(length, nbytes)
            os.ftruncate(descriptor, nbytes)
            os.fsync(descriptor)
        except BaseException:
            draft.unlink(missing_ok=True)
            raise
        finally:
            os.close(descriptor)
    return digest


@contextlib.contextmanager
def setting_errors(folder: Path) -> Iterator[None]:
    """Turn the system's errors for a folder that cannot be written to into BadSetting, naming it."""
    try:
        yield
    except OSError as exc:
        if exc.errno not in _UNWRITABLE:
            raise
        raise BadSetting(
            f"cannot write to the folder {str(folder)!r}: {exc.strerror}",
            hint="let the user that railbus runs as write to it, or set RAILBUS_ROOT to another folder",
        ) from exc


def _create(path: Path) -> int:
    """A new file, for direct writes where they are to be had."""
    flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC
    try:
        return os.open(path, flags | os.O_DIRECT, 0o644)
    except OSError as exc:
        if exc.errno not in _NO_DIRECT:
            raise
        path.unlink(missing_ok=True)  # some systems make the file before they refuse
        return os.open(path, flags, 0o644)


def _reserve(descriptor: int, final: Path, nbytes: int) -> None:
    """Take the space before it is written to; raises StorageFull if there is not enough."""
    system = os.fstatvfs(descriptor)
    if (free := system.f_bavail * system.f_frsize) < nbytes:
        raise StorageFull(
            f"no space left to write {str(final)!r}: it takes {nbytes} bytes, and {free} are free",
            hint="free space or move the root; nothing older was touched",
            details={"needed_bytes": nbytes, "free_bytes": free},
        )
    # not os.posix_fallocate: where the file system cannot reserve, it would write a byte into every block instead
    length = max(1, nbytes)
    if _libc.fallocate(descriptor, 0, ctypes.c_int64(0), ctypes.c_int64(length)) != 0:
        number = ctypes.get_errno()
        if number not in {errno.EOPNOTSUPP, errno.ENOSYS}:
            raise OSError(number, os.strerror(number), str(final))


def _check_length(length: int, announced: int) -> None:
    if length != announced:
        raise ValueError(f"the source has {length} bytes, and {announced} were announced")


class _Writer:
    """Hashes and writes one file; the offsets of direct writes are always aligned."""

    def __init__(self, descriptor: int, *, max_ahead_bytes: int) -> None:
        self._descriptor = descriptor
        self._max_ahead_bytes = max_ahead_bytes
        self._is_direct = bool(fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT)
        self._bounce = np.frombuffer(mmap.mmap(-1, BLOCK_BYTES), np.uint8)
        self._num_bounced = 0
        self._offset = 0
        self._pending: deque[tuple[Future[None], int]] = deque()
        self._bytes_ahead = 0

    def write(self, chunks: Iterable[memoryview]) -> tuple[str, int]:
        """The hash of the chunks, and their length, once all of them are written."""
        digest, num_bytes = hashlib.sha256(), 0
        pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint-disk")
        try:
            for batch in _batches(chunks):
                size = sum(len(part) for part in batch)
                self._pending.append((pool.submit(self._write_batch, batch), size))
                self._bytes_ahead += size
                for part in batch:
                    digest.update(part)
                num_bytes += size
                self._await_writes(self._max_ahead_bytes)
            self._pending.append((pool.submit(self._flush), 0))
            self._await_writes(0)
        finally:
            pool.shutdown(cancel_futures=True)
        return digest.hexdigest(), num_bytes

    def _await_writes(self, max_ahead_bytes: int) -> None:
        """Wait until so much or less is yet to be written; raises what a write raised."""
        while self._pending and (
            self._bytes_ahead > max_ahead_bytes or self._pending[0][0].done() or not max_ahead_bytes
        ):
            written, size = self._pending.popleft()
            written.result()
            self._bytes_ahead -= size

    # --- in the other thread -----------------------------------------------------------------------------------------

    def _write_batch(self, batch: list[memoryview]) -> None:
        for part in batch:
            if not self._is_direct:
                self._flush()
                self._write(part)
            elif not self._num_bounced and _is_aligned(part):
                self._write(part)
            else:
                self._write_bounced(part)

    def _write_bounced(self, part: memoryview) -> None:
        """Gather what is not aligned; NumPy copies without the GIL."""
        source, start = np.frombuffer(part, np.uint8), 0
        while start < len(source):
            length = min(len(source) - start, BLOCK_BYTES - self._num_bounced)
            self._bounce[self._num_bounced : self._num_bounced + length] = source[start : start + length]
            self._num_bounced += length
            start += length
            if self._num_bounced == BLOCK_BYTES:
                self._flush()

    def _flush(self) -> None:
        """Write what was gathered. Less than a block is the end of the file, or no direct write.

        The end is filled up with zeros, which are cut off afterwards.
        """
        end = self._num_bounced + (-self._num_bounced % _ALIGNMENT if self._is_direct else 0)
        self._bounce[self._num_bounced : end] = 0
        self._num_bounced = 0
        self._write(memoryview(self._bounce)[:end])  # type: ignore[arg-type]

    def _write(self, part: memoryview) -> None:
        while part:
            try:
                written = os.pwrite(self._descriptor, part, self._offset)
            except OSError as exc:
                if not self._is_direct or exc.errno not in _NO_DIRECT:
                    raise
                self._write_through_cache()  # opened for direct writes, and yet it takes none
                continue
            if not self._is_direct:
                _libc.sync_file_range(self._descriptor, self._offset, written, _SYNC_FILE_RANGE_WRITE)
            self._offset += written
            part = part[written:]

    def _write_through_cache(self) -> None:
        flags = fcntl.fcntl(self._descriptor, fcntl.F_GETFL)
        fcntl.fcntl(self._descriptor, fcntl.F_SETFL, flags & ~os.O_DIRECT)
        self._is_direct = False


def _batches(chunks: Iterable[memoryview]) -> Iterator[list[memoryview]]:
    """The same bytes as parts of at most a block, and as many small parts at a time as make one."""
    batch: list[memoryview] = []
    size = 0
    for chunk in chunks:
        octets = chunk.cast("B") if chunk.nbytes else memoryview(b"")
        for start in range(0, len(octets), BLOCK_BYTES):
            part = octets[start : start + BLOCK_BYTES]
            batch.append(part)
            size += len(part)
            if size >= BLOCK_BYTES:
                yield batch
                batch, size = [], 0
    if batch:
        yield batch


def _is_aligned(part: memoryview) -> bool:
    address = np.frombuffer(part, np.uint8).ctypes.data
    return address % _ALIGNMENT == 0 and len(part) % _ALIGNMENT == 0

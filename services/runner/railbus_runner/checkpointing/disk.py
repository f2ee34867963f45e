"""How a large file reaches the disk: whole, hashed on the way, and without passing through the page cache.

One thread hashes while another writes the same bytes and flushes them, both without the GIL, so that the time is that
of the slower of the two. Blocks of 16 MiB go straight from the source's memory where that is page aligned, else through
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
from typing import Final, cast

import numpy as np

from railbus_shared import files
from railbus_shared.errors import BadSetting, StorageFull

BLOCK_BYTES: Final = 16 << 20
"""Of one write; from some 8 MiB on, a larger one is no faster."""
MAX_AHEAD_BYTES: Final = 128 << 20
"""How much of an iterable's chunks may be in memory: those that are yet to be hashed or written."""
_ALIGNMENT: Final = mmap.PAGESIZE
"""Of memory, offsets and lengths of direct writes; a multiple of every disk's block that is in use."""
_NO_DIRECT: Final = {errno.EINVAL, errno.EOPNOTSUPP}
_NO_RESERVE: Final = {errno.EOPNOTSUPP, errno.ENOSYS}
_UNWRITABLE: Final = {errno.EACCES, errno.EPERM, errno.EROFS}
_SYNC_FILE_RANGE_WRITE: Final = 2

_libc = ctypes.CDLL(None, use_errno=True)


def write_draft(final: Path, source: memoryview | Iterable[memoryview], *, nbytes: int) -> str:
    """Write the draft of a file (`files.temporary_path`) that has exactly these bytes; gives their hex SHA-256.

    Once this returns the bytes are on the disk; the name is not, before the folder is flushed. The source is one piece
    of memory, or chunks of any size. After any error there is no draft. Raises StorageFull, with `needed_bytes` in its
    details, BadSetting for a folder that cannot be written to, FileExistsError for a draft that is there already, and
    ValueError if the source has another length.
    """
    draft = files.temporary_path(final)
    with _full(final, nbytes), setting_errors(final.parent):
        descriptor = _create(draft)
        try:
            _reserve(descriptor, final, nbytes)
            return _written(descriptor, source, nbytes)
        except BaseException:
            draft.unlink(missing_ok=True)
            raise
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def _full(final: Path, nbytes: int) -> Iterator[None]:
    try:
        with files.storage_errors(final):
            yield
    except StorageFull as exc:
        exc.details["needed_bytes"] = nbytes
        raise


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
    """Take the space before it is written to; raises StorageFull, OSError if there is not enough."""
    system = os.fstatvfs(descriptor)
    if (free := system.f_bavail * system.f_frsize) < nbytes:
        raise StorageFull(
            f"no space left to write {str(final)!r}: it takes {nbytes} bytes, and {free} are free",
            hint="free space or move the root; nothing older was touched",
        )
    # not os.posix_fallocate: where the file system cannot reserve, it would write a byte into every block instead
    length = ctypes.c_int64(max(1, nbytes))
    if _libc.fallocate(descriptor, 0, ctypes.c_int64(0), length) and (number := ctypes.get_errno()) not in _NO_RESERVE:
        raise OSError(number, os.strerror(number), str(final))


def _written(descriptor: int, source: memoryview | Iterable[memoryview], nbytes: int) -> str:
    """Write, flush and hash; gives the hash."""
    is_memory = isinstance(source, memoryview)  # which is there anyway, however much is ahead
    chunks = [cast("memoryview", source)] if is_memory else cast("Iterable[memoryview]", source)
    digest, file, ahead = hashlib.sha256(), _File(descriptor), _Ahead(nbytes if is_memory else MAX_AHEAD_BYTES)
    with _thread("checkpoint-hash") as hashing, _thread("checkpoint-write") as writing:
        length = 0
        for batch in _batches(chunks):
            size = sum(len(part) for part in batch)
            length += size
            ahead.add(size, writing.submit(file.append, batch), hashing.submit(_hash, digest, batch))
        if length != nbytes:
            raise ValueError(f"the source has {length} bytes, and {nbytes} were announced")
        ahead.add(0, writing.submit(file.finish, nbytes))
        ahead.wait()
    return digest.hexdigest()


@contextlib.contextmanager
def _thread(name: str) -> Iterator[ThreadPoolExecutor]:
    """One, which does what it is given in turn, and after an error nothing more."""
    pool = ThreadPoolExecutor(1, thread_name_prefix=name)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def _hash(digest: hashlib._Hash, batch: list[memoryview]) -> None:
    for part in batch:
        digest.update(part)


class _Ahead:
    """Bytes that were handed over and are not done with."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._num_bytes = 0
        self._pending: deque[tuple[int, tuple[Future[None], ...]]] = deque()

    def add(self, size: int, *works: Future[None]) -> None:
        """Waits while there are too many; raises what any of the works raised that are done."""
        self._pending.append((size, works))
        self._num_bytes += size
        while self._num_bytes > self._max_bytes or (self._pending and all(work.done() for work in self._pending[0][1])):
            self._take_one()

    def wait(self) -> None:
        """For all of them."""
        while self._pending:
            self._take_one()

    def _take_one(self) -> None:
        size, works = self._pending.popleft()
        for work in works:
            work.result()
        self._num_bytes -= size


class _File:
    """An empty file that is filled from its start on; the offsets of direct writes are always aligned."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._is_direct = bool(fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT)
        self._bounce = np.frombuffer(mmap.mmap(-1, BLOCK_BYTES), np.uint8)
        self._num_bounced = 0
        self._offset = 0

    def append(self, batch: list[memoryview]) -> None:
        for part in batch:
            if not self._is_direct:
                self._flush_bounce()
                self._write(part)
            elif not self._num_bounced and _is_aligned(part):
                self._write(part)
            else:
                self._bounce_off(part)

    def finish(self, nbytes: int) -> None:
        """Make the file durable, and so long."""
        self._flush_bounce()
        os.ftruncate(self._descriptor, nbytes)
        os.fsync(self._descriptor)

    def _bounce_off(self, part: memoryview) -> None:
        """Gather what is not aligned; NumPy copies without the GIL."""
        source, start = np.frombuffer(part, np.uint8), 0
        while start < len(source):
            length = min(len(source) - start, BLOCK_BYTES - self._num_bounced)
            self._bounce[self._num_bounced : self._num_bounced + length] = source[start : start + length]
            self._num_bounced += length
            start += length
            if self._num_bounced == BLOCK_BYTES:
                self._flush_bounce()

    def _flush_bounce(self) -> None:
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
                _begin_flush(self._descriptor, self._offset, written)
            self._offset += written
            part = part[written:]

    def _write_through_cache(self) -> None:
        flags = fcntl.fcntl(self._descriptor, fcntl.F_GETFL)
        fcntl.fcntl(self._descriptor, fcntl.F_SETFL, flags & ~os.O_DIRECT)
        self._is_direct = False


def _begin_flush(descriptor: int, offset: int, length: int) -> None:
    """A hint; where it is not taken, the flush at the end does all of it."""
    _libc.sync_file_range(descriptor, ctypes.c_int64(offset), ctypes.c_int64(length), _SYNC_FILE_RANGE_WRITE)


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

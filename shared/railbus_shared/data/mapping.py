"""Shards and sidecars as files: looked at, opened, mapped.

Whatever lies in place of a file (nothing, a folder, a pipe, a link out of the dataset, a file of another size) is an
error that names it, and nothing waits for it. A map keeps no descriptor open, so a process may hold thousands; it ends
with the last array that views it. Only trainers map: a file that is cut under a map kills whoever touches what is gone
with SIGBUS, so a service reads instead.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from railbus_shared.errors import IndexInvalid, ShardCorrupt

Bytes = npt.NDArray[np.uint8]

_MADV_POPULATE_READ: Final = 22
"""Since Linux 5.14; the module `mmap` has no name for it."""
_MAP_FAILED: Final = ctypes.c_void_p(-1).value

_libc: Final = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64)
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


def look_at(path: Path, *, size_bytes: int) -> None:
    """Make sure, without reading, that a file of an index is there with its size.

    Raises IndexInvalid if it is missing or leads out of the dataset's folder, ShardCorrupt if it has another size.
    """
    try:
        _check(path, path.stat(), size_bytes=size_bytes)
    except OSError as exc:
        raise IndexInvalid(
            f"{path} cannot be looked at, but the index names it: {exc.strerror}",
            hint="import the dataset again, or restore the file from a copy",
            details={"path": str(path)},
        ) from exc


@contextlib.contextmanager
def opened(path: Path, *, size_bytes: int) -> Iterator[int]:
    """A descriptor of a file that has the size of its index.

    Raises ShardCorrupt if it is missing, unreadable or of another size, IndexInvalid if it leads out of the dataset.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a pipe would wait for a writer
    except OSError as exc:
        raise _unlike(path, size_bytes, exc.strerror or repr(exc)) from exc
    try:
        _check(path, os.fstat(fd), size_bytes=size_bytes)
        yield fd
    finally:
        os.close(fd)


def map_file(path: Path, *, size_bytes: int, populate: bool = False) -> Bytes:
    """A file as read-only memory, uint8 (size_bytes,).

    Args:
        path: of the file.
        size_bytes: that it must have.
        populate: read all of it at once and enter it into the page table, where the kernel can.

    Raises:
        ShardCorrupt, IndexInvalid: as `opened` does.
    """
    with opened(path, size_bytes=size_bytes) as fd:
        address = _libc.mmap(None, size_bytes, mmap.PROT_READ, mmap.MAP_SHARED, fd, 0)
    if address == _MAP_FAILED:
        raise _unlike(path, size_bytes, f"a file that cannot be mapped: {os.strerror(ctypes.get_errno())}")
    if populate:
        _libc.madvise(address, size_bytes, _MADV_POPULATE_READ)  # a refusal costs time later, and nothing else
    return np.asarray(_Map(address, size_bytes))


class _Map:
    """Mapped memory, unmapped with the last array on it. `mmap.mmap` would hold a descriptor as well, till 3.13."""

    def __init__(self, address: int, size_bytes: int) -> None:
        self._address = address
        self._size_bytes = size_bytes

    @property
    def __array_interface__(self) -> dict[str, Any]:
        is_read_only = True
        return {"version": 3, "shape": (self._size_bytes,), "typestr": "|u1", "data": (self._address, is_read_only)}

    def __del__(self, *, _munmap: Any = _libc.munmap) -> None:
        _munmap(self._address, self._size_bytes)


def _check(path: Path, status: os.stat_result, *, size_bytes: int) -> None:
    if path.is_symlink() and not path.resolve().is_relative_to(path.parent.parent.resolve()):
        raise IndexInvalid(
            f"{path} is a link that leads out of the dataset's folder, to {path.resolve()}",
            hint="put the file itself there",
            details={"path": str(path)},
        )
    if not stat.S_ISREG(status.st_mode):
        raise _unlike(path, size_bytes, "no plain file")
    if status.st_size != size_bytes:
        raise _unlike(path, size_bytes, f"{status.st_size} bytes")


def _unlike(path: Path, size_bytes: int, actual: str) -> ShardCorrupt:
    return ShardCorrupt(path=str(path), expected=f"{size_bytes} bytes", actual=actual)

"""Proves that an open file has the size and hash that are stated, in one pass that keeps what is asked for. No torch.

The pass goes through a small buffer that stays in the processor's cache, and asks the kernel for what comes next; the
descriptor is the one that all later reads use, so another file that takes the name meanwhile is never read.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from typing import Final

from railbus_shared.archive import Extent

BUFFER_BYTES: Final = 1 << 20
_AHEAD_BYTES: Final = 16 << 20


class NotProven(Exception):
    """The file is not the one that was stated."""

    def __init__(self, *, expected: str, actual: str) -> None:
        super().__init__(f"expected {expected}, found {actual}")
        self.expected = expected
        self.actual = actual


def check_size(descriptor: int, nbytes: int) -> None:
    """Raises NotProven unless the open file has so many bytes."""
    if (size := os.fstat(descriptor).st_size) != nbytes:
        raise NotProven(expected=f"{nbytes} bytes", actual=f"{size} bytes")


def prove(descriptor: int, *, nbytes: int, sha256: str, keep: Iterable[Extent] = ()) -> dict[Extent, bytes]:
    """Hash the whole file, and give the bytes of the extents in `keep` as they went into the hash; raises NotProven."""
    check_size(descriptor, nbytes)
    found, kept = digest(descriptor, nbytes=nbytes, keep=keep)
    if found != sha256:
        raise NotProven(expected=f"sha256 {sha256}", actual=f"sha256 {found}")
    return kept


def digest(descriptor: int, *, nbytes: int, keep: Iterable[Extent] = ()) -> tuple[str, dict[Extent, bytes]]:
    """The SHA-256 of the first `nbytes` of a file in hexadecimal digits, and the bytes of the extents in `keep`.

    Raises NotProven if the file is shorter.
    """
    hashed = hashlib.sha256()
    buffer = memoryview(bytearray(BUFFER_BYTES))
    keeper = _Keeper(keep)
    os.posix_fadvise(descriptor, 0, nbytes, os.POSIX_FADV_SEQUENTIAL)
    offset = 0
    while offset < nbytes:
        if offset % _AHEAD_BYTES == 0:
            os.posix_fadvise(descriptor, offset + _AHEAD_BYTES, _AHEAD_BYTES, os.POSIX_FADV_WILLNEED)
        count = os.preadv(descriptor, [buffer[: nbytes - offset]], offset)
        if count == 0:
            raise NotProven(expected=f"{nbytes} bytes", actual=f"{offset} bytes")
        hashed.update(buffer[:count])
        keeper.see(offset, buffer[:count])
        offset += count
    return hashed.hexdigest(), keeper.kept()


class _Keeper:
    """Gathers the bytes of some extents from chunks that come in the order of the file."""

    def __init__(self, extents: Iterable[Extent]) -> None:
        self._waiting = sorted(set(extents), key=lambda extent: extent.offset, reverse=True)
        self._open: dict[Extent, bytearray] = {}

    def see(self, offset: int, chunk: memoryview) -> None:
        end = offset + len(chunk)
        while self._waiting and self._waiting[-1].offset < end:
            self._open[self._waiting.pop()] = bytearray()
        for extent, gathered in self._open.items():
            if len(gathered) < extent.nbytes:
                start = extent.offset + len(gathered) - offset
                gathered.extend(chunk[start : extent.offset + extent.nbytes - offset])

    def kept(self) -> dict[Extent, bytes]:
        return {extent: bytes(gathered) for extent, gathered in self._open.items()}

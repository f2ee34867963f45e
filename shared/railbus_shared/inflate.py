"""Reading files of several gzip members in bounded memory, and stopping cleanly where one is torn.

The standard library's reader raises in the middle of a torn tail; this one says how far the file is whole.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterable, Iterator
from typing import BinaryIO, Final

CHUNK_BYTES: Final = 1 << 20
_GZIP_WBITS: Final = 31
_TRAILER_BYTES: Final = 8
_MEMBER_BYTES: Final = 18  # of the smallest member


class Members:
    """One walk over the members of a file, from `offset` on; the caller closes the file."""

    def __init__(self, file: BinaryIO, *, offset: int = 0) -> None:
        self.last_start = offset
        """Where the last whole member begins, once the walk is over."""
        self.whole_end = offset
        """Where the last whole member ends."""
        self.is_torn = False
        """Whether something that is no whole member follows it."""
        self._file = file
        self._read = offset
        self._raw = b""

    def chunks(self) -> Iterator[bytes]:
        """The plain bytes, at most 1 MiB at a time; of a torn member as far as they can be had."""
        self._file.seek(self._read)
        while not self.is_torn and (self._raw or self._refill()):
            yield from self._member()

    def _member(self) -> Iterator[bytes]:
        decoder = zlib.decompressobj(wbits=_GZIP_WBITS)
        while not decoder.eof:
            if not self._raw and not self._refill():
                self.is_torn = True
                return
            try:
                plain = decoder.decompress(self._raw, CHUNK_BYTES)
            except zlib.error:
                self.is_torn = True
                return
            self._raw = decoder.unused_data if decoder.eof else decoder.unconsumed_tail
            if plain:
                yield plain
        self.last_start, self.whole_end = self.whole_end, self._read - len(self._raw)

    def _refill(self) -> bool:
        self._raw = self._file.read(CHUNK_BYTES)
        self._read += len(self._raw)
        return bool(self._raw)


def chunks_of(file: BinaryIO) -> Iterator[bytes]:
    """The rest of a plain file."""
    while chunk := file.read(CHUNK_BYTES):
        yield chunk


def complete_lines(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """Lines without their newlines; what follows the last newline is left out."""
    rest = b""
    for chunk in chunks:
        *whole, rest = (rest + chunk).split(b"\n")
        yield from whole


def ends_with(closed: BinaryIO, plain: BinaryIO) -> bool:
    """Whether the last member of `closed` is the bytes of `plain`, by the length and CRC-32 in the member's trailer.

    Costs a pass over `plain` only where the lengths agree.
    """
    plain_bytes = os.fstat(plain.fileno()).st_size
    if plain_bytes == 0 or os.fstat(closed.fileno()).st_size < _MEMBER_BYTES:
        return False
    closed.seek(-_TRAILER_BYTES, os.SEEK_END)
    trailer = closed.read(_TRAILER_BYTES)
    if int.from_bytes(trailer[4:], "little") != plain_bytes % 2**32:
        return False
    plain.seek(0)
    crc = 0
    for chunk in chunks_of(plain):
        crc = zlib.crc32(chunk, crc)
    return int.from_bytes(trailer[:4], "little") == crc

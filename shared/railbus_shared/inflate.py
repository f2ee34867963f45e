"""Reading files of several gzip members in bounded memory, and stopping cleanly where one is torn.

The standard library's reader raises in the middle of a torn tail; this one says how far the file is whole. `salvage`
goes on behind what is damaged, with the next member that begins.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import BinaryIO, Final, NamedTuple, cast

try:
    from isal import isal_zlib
except ImportError:  # no wheel for this machine: half as fast
    isal_zlib = None  # type: ignore[assignment]

CHUNK_BYTES: Final = 1 << 20
_GZIP_WBITS: Final = 31
_TRAILER_BYTES: Final = 8
_MEMBER_BYTES: Final = 18  # of the smallest member
_MAGIC: Final = b"\x1f\x8b\x08"

inflater = zlib.decompressobj if isal_zlib is None else isal_zlib.decompressobj
_ERRORS: Final = (zlib.error, zlib.error if isal_zlib is None else cast("type[Exception]", isal_zlib.error))


class Piece(NamedTuple):
    """Plain bytes of a member."""

    member: int
    """Where in the file the member begins."""
    data: bytes
    """From `salvage` empty where a member is damaged: what comes next does not join what came before."""


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
        self._end: int | None = None

    def chunks(self) -> Iterator[bytes]:
        """The plain bytes, at most 1 MiB at a time; of a torn member as far as they can be had."""
        return (piece.data for piece in self.pieces())

    def pieces(self, *, end: int | None = None, of_one: bool = False) -> Iterator[Piece]:
        """As `chunks`, each with its member; of the file as if it ended at `end`, or of one member only."""
        self._end = end
        self._file.seek(self._read)
        while not self.is_torn and (self._raw or self._refill()):
            yield from self._member()
            if of_one:
                return

    def _member(self) -> Iterator[Piece]:
        decoder, start = inflater(wbits=_GZIP_WBITS), self.whole_end
        while not decoder.eof:
            is_over = not self._raw and not self._refill()
            try:
                plain = decoder.decompress(self._raw, CHUNK_BYTES)
            except _ERRORS:
                self.is_torn = True
                return
            self._raw = decoder.unused_data if decoder.eof else decoder.unconsumed_tail
            if plain:
                yield Piece(start, plain)
            elif is_over and not decoder.eof:
                self.is_torn = True
                return
        self.last_start, self.whole_end = start, self._read - len(self._raw)

    def _refill(self) -> bool:
        self._raw = self._file.read(CHUNK_BYTES if self._end is None else min(CHUNK_BYTES, self._end - self._read))
        self._read += len(self._raw)
        return bool(self._raw)


def salvage(
    file: BinaryIO, *, start: int = 0, end: int | None = None, damaged: Callable[[int], object]
) -> Iterator[Piece]:
    """What can be had of the members from `start` on, as if the file ended at `end`.

    Where a member is damaged, its place is told to `damaged` and the walk goes on with the next one that begins.
    """
    at: int | None = start
    while at is not None and (end is None or at < end):
        members = Members(file, offset=at)
        yield from members.pieces(end=end)
        if not members.is_torn:
            return
        damaged(members.whole_end)
        yield Piece(members.whole_end, b"")
        at = _next_member(file, members.whole_end + 1)


def _next_member(file: BinaryIO, offset: int) -> int | None:
    """Where, from `offset` on, a member seems to begin that gives anything."""
    kept = b""
    file.seek(offset)
    while chunk := file.read(CHUNK_BYTES):
        data, start = kept + chunk, offset - len(kept)
        at = data.find(_MAGIC)
        while at >= 0:
            if _gives_anything(file, start + at):
                return start + at
            at = data.find(_MAGIC, at + 1)
        offset += len(chunk)
        kept = data[-len(_MAGIC) + 1 :]
        file.seek(offset)
    return None


def _gives_anything(file: BinaryIO, offset: int) -> bool:
    return next(Members(file, offset=offset).pieces(), None) is not None


def chunks_of(file: BinaryIO) -> Iterator[bytes]:
    """The rest of a plain file."""
    while chunk := file.read(CHUNK_BYTES):
        yield chunk


def complete_lines(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """Lines without their newlines; what is left of one at the end, or before an empty chunk, is left out."""
    rest = b""
    for chunk in chunks:
        *whole, rest = (rest + chunk).split(b"\n") if chunk else (b"",)
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

"""The directory of a file of `torch.save`: a zip whose records are stored as they are. No torch, and no unpickling.

Only what the directory says is read here, and it may be damaged or forged: every length is checked against the file.
`Directory.kept` are the bytes that the answer rests on, so that whoever hashes the file can prove them.
Source: APPNOTE.TXT 6.3.10 of PKWARE, sections 4.3.7 (local header), 4.3.12 (central directory), 4.3.14 to 4.3.16 (end).
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

_LOCAL: Final = struct.Struct("<4s5H3I2H")
_CENTRAL: Final = struct.Struct("<4s6H3I5H2I")
_END: Final = struct.Struct("<4s4H2IH")
_END64: Final = struct.Struct("<4sQ2H2I4Q")
_LOCATOR64: Final = struct.Struct("<4sIQI")
_BEYOND_32: Final = 0xFFFFFFFF
_ZIP64_EXTRA: Final = 1


class NotAnArchive(Exception):
    """The bytes are no zip of stored records; the message says why."""


@dataclass(frozen=True)
class Extent:
    """Bytes of a file, one after the other."""

    offset: int
    nbytes: int


@dataclass(frozen=True)
class Directory:
    """Where the records of an archive lie, by their names without the archive's own, for instance `data/0`.

    Attributes:
        records: extents of the records' bytes.
        kept: the bytes, by where they lie, that `records` was worked out from.
    """

    records: Mapping[str, Extent]
    kept: Mapping[Extent, bytes]


def read_directory(descriptor: int, nbytes: int) -> Directory:
    """The directory of an open file of this size; raises NotAnArchive."""
    reader = _Reader(descriptor, nbytes)
    central, num_records = _find_central(reader)
    records: dict[str, Extent] = {}
    for name, header, length in _entries(reader.read(central), num_records):
        local = reader.read(Extent(header, _LOCAL.size))
        signature, *_, name_bytes, extra_bytes = _LOCAL.unpack(local)
        data = Extent(header + _LOCAL.size + name_bytes + extra_bytes, length)
        plain = name.partition("/")[2]
        if signature != b"PK\x03\x04" or data.offset + length > nbytes or plain in records:
            raise NotAnArchive(f"record {name!r} is not where the directory says")
        records[plain] = data
    return Directory(records, reader.kept)


class _Reader:
    """Reads from a file, and remembers what it read."""

    def __init__(self, descriptor: int, nbytes: int) -> None:
        self.nbytes = nbytes
        self.kept: dict[Extent, bytes] = {}
        self._descriptor = descriptor

    def read(self, extent: Extent) -> bytes:
        if extent.offset < 0 or extent.offset + extent.nbytes > self.nbytes:
            raise NotAnArchive(f"it points to byte {extent.offset + extent.nbytes} of {self.nbytes}")
        found = os.pread(self._descriptor, extent.nbytes, extent.offset)
        if len(found) != extent.nbytes:
            raise NotAnArchive(f"it was cut short to {extent.offset + len(found)} bytes")
        self.kept[extent] = found
        return found


def _find_central(reader: _Reader) -> tuple[Extent, int]:
    """The central directory and its number of records; an archive with a comment at its end is none of torch's."""
    end_at = reader.nbytes - _END.size
    signature, _, _, _, count, length, offset, _ = _END.unpack(reader.read(Extent(end_at, _END.size)))
    if signature != b"PK\x05\x06":
        raise NotAnArchive("it does not end as a zip does")
    locator_at = end_at - _LOCATOR64.size
    if locator_at < 0:
        return Extent(offset, length), count
    signature, _, end64_at, _ = _LOCATOR64.unpack(reader.read(Extent(locator_at, _LOCATOR64.size)))
    if signature != b"PK\x06\x07":
        return Extent(offset, length), count
    signature, *_, count, length, offset = _END64.unpack(reader.read(Extent(end64_at, _END64.size)))
    if signature != b"PK\x06\x06":
        raise NotAnArchive("its end for large files is missing")
    return Extent(offset, length), count


def _entries(central: bytes, num_records: int) -> Iterator[tuple[str, int, int]]:
    """Name, offset of the local header and length in bytes of each record."""
    at = 0
    for _ in range(num_records):
        if at + _CENTRAL.size > len(central):
            raise NotAnArchive("its directory is cut short")
        found = _CENTRAL.unpack_from(central, at)
        signature, flags, method, packed, length = found[0], found[3], found[4], found[8], found[9]
        name_bytes, extra_bytes, comment_bytes, header = found[10], found[11], found[12], found[16]
        name_at = at + _CENTRAL.size
        extra_at = name_at + name_bytes
        at = extra_at + extra_bytes + comment_bytes
        name = central[name_at:extra_at].decode("utf-8", errors="replace")
        length, packed, header = _widened(central[extra_at : extra_at + extra_bytes], length, packed, header)
        if signature != b"PK\x01\x02" or method != 0 or flags & 1 or packed != length:
            raise NotAnArchive(f"record {name!r} is packed, encrypted or damaged")
        yield name, header, length


def _widened(extra: bytes, *values: int) -> tuple[int, ...]:
    """The values, those that did not fit into 32 bits from the extra field that holds them in 64."""
    if _BEYOND_32 not in values:
        return values
    at = 0
    while at + 4 <= len(extra):
        kind, size = struct.unpack_from("<2H", extra, at)
        if kind == _ZIP64_EXTRA and size >= 8 * values.count(_BEYOND_32) and at + 4 + size <= len(extra):
            wide = iter(struct.unpack_from(f"<{size // 8}Q", extra, at + 4))
            return tuple(next(wide) if value == _BEYOND_32 else value for value in values)
        at += 4 + size
    raise NotAnArchive("a record is too large for what its directory says of it")

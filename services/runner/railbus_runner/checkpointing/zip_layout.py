"""Where the records of a `.pt` lie in it: a zip of stored records, the data first, so that sizes alone fix the offsets.

    archive/data/0, archive/data/1, ...         one storage each, at multiples of 64 bytes
    archive/data.pkl, /byteorder, /version      what the tensors are made of
    central directory                           with zip64 wherever a size, an offset or a count needs it

What comes before the tail is the same for every state with storages of the same sizes. torch.save writes the same
records in another order. The checksum (CRC-32) of a data record is 0, as after
`torch.serialization.set_crc32_options(False)`, because a checksum would be a second pass over the data: torch.load asks
for none, `unzip -t` complains, and the SHA-256 in a checkpoint's meta proves the file.

Source: PKWARE APPNOTE.TXT 6.3.10, sections 4.3.7 (local header), 4.3.12 (central directory), 4.3.14 to 4.3.16 (its
end), 4.5.3 (zip64); alignment by an extra field `FB` as in torch's caffe2/serialize/inline_container.cc.
"""

from __future__ import annotations

import functools
import struct
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

ALIGNMENT: Final = 64
"""Bytes; of the start of every record's data."""
_ROOT: Final = "archive"
_MAX_16: Final = 0xFFFF
_MAX_32: Final = 0xFFFFFFFF
"""A field of this value says that the real one stands in a zip64 field; so it is no value itself."""
_LOCAL: Final = struct.Struct("<4s5H3I2H")
_CENTRAL: Final = struct.Struct("<4s6H3I5H2I")
_END: Final = struct.Struct("<4s4H2IH")
_END_64: Final = struct.Struct("<4sQ2H2I4Q")
_LOCATOR: Final = struct.Struct("<4sIQI")
_EXTRA: Final = struct.Struct("<2sH")
_PADDING_ID: Final = b"FB"
_ZIP64_ID: Final = b"\x01\x00"
_VERSION: Final = 20
_VERSION_64: Final = 45
_NO_TIME: Final = 0
_NO_DATE: Final = (1 << 5) | 1  # 1980-01-01: the same state gives the same bytes


@dataclass(frozen=True)
class ZipLayout:
    """The part of a file that depends on the sizes of its data records alone."""

    sizes: tuple[int, ...]
    """Bytes of each data record."""
    headers: tuple[bytes, ...]
    """What stands right before each data record; it begins where the record before ends."""
    offsets: tuple[int, ...]
    """Of each data record's first byte from the start of the file; multiples of 64."""
    directory: bytes
    """The central directory's entries of the data records."""

    @property
    def data_end(self) -> int:
        """Where the tail begins, in bytes from the start of the file."""
        return self.offsets[-1] + self.sizes[-1] if self.sizes else 0

    @classmethod
    def of(cls, sizes: Iterable[int]) -> ZipLayout:
        """The layout of data records of so many bytes; the last few are remembered, since a state keeps its form."""
        return _layout(tuple(sizes))

    def tail(self, records: Mapping[str, bytes]) -> bytes:
        """All that follows the data: these small records by name, then the central directory."""
        parts: list[bytes] = []
        entries = [self.directory]
        num_records, end = len(self.sizes), self.data_end
        for name, data in records.items():
            header, entry = _headers(name, len(data), at=end, crc=zlib.crc32(data))
            parts += (header, data)
            entries.append(entry)
            num_records, end = num_records + 1, end + len(header) + len(data)
        directory = b"".join(entries)
        return b"".join((*parts, directory, _end(num_records, len(directory), at=end)))


@functools.lru_cache(maxsize=4)
def _layout(sizes: tuple[int, ...]) -> ZipLayout:
    headers, offsets, entries = [], [], []
    end = 0
    for number, size in enumerate(sizes):
        header, entry = _headers(f"data/{number}", size, at=end, crc=0)
        headers.append(header)
        entries.append(entry)
        offsets.append(end + len(header))
        end += len(header) + size
    return ZipLayout(sizes, tuple(headers), tuple(offsets), b"".join(entries))


def _headers(name: str, size: int, *, at: int, crc: int) -> tuple[bytes, bytes]:
    """The local header at this offset, padded so that the data after it is aligned, and the directory's entry."""
    path = f"{_ROOT}/{name}".encode()
    is_large = size >= _MAX_32
    version = _VERSION_64 if is_large or at >= _MAX_32 else _VERSION
    said = _MAX_32 if is_large else size
    stated = (version, 0, 0, _NO_TIME, _NO_DATE, crc, said, said, len(path))
    local_extra = _zip64(size, size) if is_large else b""  # a local header states both or none
    local_extra += _padding(at + _LOCAL.size + len(path) + len(local_extra))
    local = _LOCAL.pack(b"PK\x03\x04", *stated, len(local_extra)) + path + local_extra
    extra = _zip64(*((size, size) if is_large else ()), *((at,) if at >= _MAX_32 else ()))
    central = _CENTRAL.pack(b"PK\x01\x02", version, *stated, len(extra), 0, 0, 0, 0, min(at, _MAX_32))
    return local, central + path + extra


def _padding(end: int) -> bytes:
    """An extra field after which the offset is aligned; it has four bytes at least."""
    length = -(end + _EXTRA.size) % ALIGNMENT
    return _EXTRA.pack(_PADDING_ID, length) + bytes(length)


def _zip64(*values: int) -> bytes:
    return _EXTRA.pack(_ZIP64_ID, 8 * len(values)) + struct.pack(f"<{len(values)}Q", *values) if values else b""


def _end(num_records: int, directory_bytes: int, *, at: int) -> bytes:
    """The end of the central directory that begins at this offset."""
    end = b""
    if num_records >= _MAX_16 or directory_bytes >= _MAX_32 or at >= _MAX_32:
        counts = (num_records, num_records, directory_bytes, at)
        end += _END_64.pack(b"PK\x06\x06", _END_64.size - 12, _VERSION_64, _VERSION_64, 0, 0, *counts)
        end += _LOCATOR.pack(b"PK\x06\x07", 0, at + directory_bytes, 1)
    count = min(num_records, _MAX_16)
    return end + _END.pack(b"PK\x05\x06", 0, 0, count, count, min(directory_bytes, _MAX_32), min(at, _MAX_32), 0)

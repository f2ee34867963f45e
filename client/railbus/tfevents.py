"""TensorBoard's event files, written by hand: records of TFRecord that hold the few fields of `Event` that curves need.

A record is the length of its data (8 bytes, little endian), the masked CRC-32C of those, the data, and the masked
CRC-32C of that. The data is protobuf: a field is its number and wire type in one byte, then a varint, 8 or 4 bytes, or
a length and bytes.

Source: tensorflow/core/lib/io/record_writer.h, util/event.proto and framework/summary.proto beside it.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Final

_VARINT: Final = 0
_FIXED64: Final = 1
_BYTES: Final = 2
_FIXED32: Final = 5
_DT_STRING: Final = 7
_SESSION_START: Final = 1
_MASK_DELTA: Final = 0xA282EAD8
_CRC_POLYNOMIAL: Final = 0x82F63B78  # Castagnoli's, reflected


def file_version(wall_s: float) -> bytes:
    """The first record of every file."""
    return _record(_event(wall_s) + _field(3, b"brain.Event:2"))


def scalars(wall_s: float, *, step: int, values: Mapping[str, float]) -> bytes:
    """One value for each tag, as 32-bit floats; NaN and the infinities are values too."""
    summary = b"".join(_field(1, _field(1, tag.encode()) + _float(2, value)) for tag, value in values.items())
    return _record(_event(wall_s, step) + _field(5, summary))


def text(wall_s: float, *, step: int, tag: str, value: str) -> bytes:
    """A text, which TensorBoard shows as Markdown."""
    shape = _field(2, _varint_field(1, 1))
    tensor = _varint_field(1, _DT_STRING) + _field(2, shape) + _field(8, value.encode())
    metadata = _field(1, _field(1, b"text"))
    summary = _field(1, _field(1, tag.encode()) + _field(8, tensor) + _field(9, metadata))
    return _record(_event(wall_s, step) + _field(5, summary))


def restart(wall_s: float, *, step: int) -> bytes:
    """From here on a run goes on from before: what it told of this step and later ones is not to be shown."""
    return _record(_event(wall_s, step) + _field(7, _varint_field(1, _SESSION_START)))


def masked_crc32c(data: bytes) -> int:
    """CRC-32C, rotated and shifted so that the CRC of data that holds CRCs is no trivial one."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = _CRC_TABLE[(crc ^ byte) & 0xFF] ^ (crc >> 8)
    crc ^= 0xFFFFFFFF
    return ((crc >> 15 | crc << 17) + _MASK_DELTA) & 0xFFFFFFFF


def _record(data: bytes) -> bytes:
    length = struct.pack("<Q", len(data))
    return b"".join((length, struct.pack("<I", masked_crc32c(length)), data, struct.pack("<I", masked_crc32c(data))))


def _event(wall_s: float, step: int = 0) -> bytes:
    return bytes((1 << 3 | _FIXED64,)) + struct.pack("<d", wall_s) + (_varint_field(2, step) if step else b"")


def _field(number: int, data: bytes) -> bytes:
    return bytes((number << 3 | _BYTES,)) + _varint(len(data)) + data


def _varint_field(number: int, value: int) -> bytes:
    return bytes((number << 3 | _VARINT,)) + _varint(value)


def _float(number: int, value: float) -> bytes:
    try:
        packed = struct.pack("<f", value)
    except OverflowError:  # beyond what 32 bits can say
        packed = struct.pack("<f", float("inf") if value > 0 else float("-inf"))
    return bytes((number << 3 | _FIXED32,)) + packed


def _varint(value: int) -> bytes:
    """Seven bits a byte, the lowest first; of numbers that are not negative."""
    found = bytearray()
    while value > 0x7F:
        found.append(value & 0x7F | 0x80)
        value >>= 7
    found.append(value)
    return bytes(found)


def _crc_of(byte: int) -> int:
    for _ in range(8):
        byte = byte >> 1 ^ (_CRC_POLYNOMIAL if byte & 1 else 0)
    return byte


_CRC_TABLE: Final = tuple(map(_crc_of, range(256)))

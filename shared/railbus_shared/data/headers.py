"""What a shard says of itself, compared with what its index says of it.

A header is data of others: its length is checked before anything of that length is read, it is never evaluated, and
bytes are never found by it. The index alone says where they lie; a header that says otherwise makes the shard corrupt.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np
import orjson

from railbus_shared.data.dtypes import OFFSETS, PADDING, SAFETENSORS_DTYPES, numpy_dtype, sample_bytes
from railbus_shared.data.mapping import Bytes
from railbus_shared.errors import ShardCorrupt

if TYPE_CHECKING:
    from railbus_shared.data.plain import AnyColumn, AnySchema, AnyShard

_MAX_HEADER_BYTES: Final = 1 << 20
"""More than 256 columns of 32 axes each need."""
_SHOWN: Final = 200
"""Characters of a header that an error shows."""

Entry = dict[str, object]


def check_safetensors(path: Path, data: Bytes, schema: AnySchema, shard: AnyShard) -> None:
    """Compare the header of a shard of payload `columns` with its index; raises ShardCorrupt."""
    length = int.from_bytes(data[:8].tobytes(), "little")
    if length > min(len(data) - 8, _MAX_HEADER_BYTES):
        raise _other(path, "a header of its columns", f"one that claims {length} bytes")
    found = _entries(path, data[8 : 8 + length].tobytes())
    expected = dict(_expected_entries(schema, shard, begin=8 + length))
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise _other(path, f"{name} {expected.get(name, 'absent')}", f"{found.get(name, 'no such tensor')}")


def _entries(path: Path, header: bytes) -> dict[str, object]:
    """The tensors that a header names, without those that only fill gaps."""
    try:
        found = orjson.loads(header)
    except orjson.JSONDecodeError as exc:
        raise _other(path, "a header in JSON", f"one that is not: {exc}") from exc
    if not isinstance(found, dict):
        raise _other(path, "a header that is a map", f"a {type(found).__name__}")
    return {name: entry for name, entry in found.items() if name != "__metadata__" and not name.startswith(PADDING)}


def _expected_entries(schema: AnySchema, shard: AnyShard, *, begin: int) -> Iterator[tuple[str, Entry]]:
    for name, extent in shard.columns.items():
        column = schema.columns[name]
        rows = extent.bytes // sample_bytes(column)
        yield name, _entry(SAFETENSORS_DTYPES[column.dtype], (rows, *column.shape), extent.offset - begin, extent.bytes)
        if (offsets := extent.offsets) is not None:
            yield OFFSETS + name, _entry("I64", (shard.samples + 1,), offsets.offset - begin, offsets.bytes)


def _entry(dtype: str, shape: tuple[int, ...], start: int, size: int) -> Entry:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, start + size]}


def check_npy(path: Path, data: Bytes, column: AnyColumn, shard: AnyShard) -> None:
    """Compare the header of a shard of payload `npy` with its index; raises ShardCorrupt.

    The index tells how the header has to read, as NumPy writes it, so none is parsed.
    Source: https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html
    """
    (extent,) = shard.columns.values()
    width = {b"\1\0": 2, b"\2\0": 4}.get(data[6:8].tobytes(), 0)
    if data[:6].tobytes() != b"\x93NUMPY" or not width:
        raise _other(path, "a NumPy file of version 1.0 or 2.0", f"one that begins with {data[:8].tobytes()!r}")
    length = int.from_bytes(data[8 : 8 + width].tobytes(), "little")
    if 8 + width + length != extent.offset or length > _MAX_HEADER_BYTES:
        raise _other(path, f"an array that begins at byte {extent.offset}", f"a header that claims {length} bytes")
    dtype = np.dtype(numpy_dtype(column)).newbyteorder("<").str
    expected = f"{{'descr': {dtype!r}, 'fortran_order': False, 'shape': {(shard.samples, *column.shape)}, }}"
    found = data[8 + width : extent.offset].tobytes().decode("latin1")
    if found.rstrip(" \n") != expected:
        raise _other(path, expected, found.rstrip())


def _other(path: Path, expected: str, actual: str) -> ShardCorrupt:
    return ShardCorrupt(path=str(path), expected=expected[:_SHOWN], actual=actual[:_SHOWN])

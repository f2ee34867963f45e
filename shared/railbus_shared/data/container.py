"""The `columns` container, written: a safetensors file in which every column begins on a multiple of 64 bytes.

The format is eight bytes of little-endian header length, a JSON header, and the tensors without gaps between them; what
aligns a column is therefore a tensor of padding bytes after the one before it.
Source: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import BinaryIO, Final

import orjson

from railbus_shared import files
from railbus_shared.contracts.artifacts import ColumnExtent, DatasetSchema, Shard
from railbus_shared.data.index import sample_bytes

ALIGN_BYTES: Final = 64
PADDING: Final = "__padding__."
"""Begins the names of padding tensors; no column's name can begin so."""
_COPY_BYTES: Final = 4 << 20
_DTYPES: Final = {
    "bool": "BOOL", "uint8": "U8", "int8": "I8", "uint16": "U16", "int16": "I16", "uint32": "U32", "int32": "I32",
    "uint64": "U64", "int64": "I64", "float16": "F16", "bfloat16": "BF16", "float32": "F32", "float64": "F64",
}  # fmt: skip


def write_shard(path: Path, schema: DatasetSchema, columns: dict[str, Path], *, first: int, samples: int) -> Shard:
    """Write one shard from files that hold each column's samples back to back, and hash it on the way.

    Args:
        path: of the shard; it must not exist.
        schema: of the dataset.
        columns: a file for each column.
        first: the sample that the shard begins with.
        samples: how many it holds.
    """
    header, extents, size_bytes = _header(schema, samples)
    digest = hashlib.sha256()
    with files.temporary(path) as file:
        _put(file, digest, header)
        for name, extent in extents.items():
            _put(file, digest, b"\0" * (extent.offset - file.tell()))
            _copy(columns[name], file, digest, start=first * sample_bytes(schema.columns[name]), size=extent.bytes)
        _put(file, digest, b"\0" * (size_bytes - file.tell()))
    files.publish(files.temporary_path(path), path)
    return Shard(
        file=path.name,
        bytes=size_bytes,
        sha256=digest.hexdigest(),
        first_sample=first,
        samples=samples,
        columns=extents,
    )


def _header(schema: DatasetSchema, samples: int) -> tuple[bytes, dict[str, ColumnExtent], int]:
    """The header with its length, where each column lies in the file, and the size of the file."""
    entries: dict[str, object] = {}
    places: dict[str, tuple[int, int]] = {}
    end = 0
    for name in sorted(schema.columns):
        column = schema.columns[name]
        size = sample_bytes(column) * samples
        places[name] = (end, size)
        entries[name] = _entry(_DTYPES[column.dtype], (samples, *column.shape), end, size)
        end += size
        if padding := -end % ALIGN_BYTES:
            entries[PADDING + name] = _entry("U8", (padding,), end, padding)
            end += padding
    text = orjson.dumps(entries)
    text += b" " * (-(len(text) + 8) % ALIGN_BYTES)
    header = len(text).to_bytes(8, "little") + text
    extents = {name: ColumnExtent(offset=len(header) + at, bytes=size) for name, (at, size) in places.items()}
    return header, extents, len(header) + end


def _entry(dtype: str, shape: tuple[int, ...], start: int, size: int) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, start + size]}


def _put(file: BinaryIO, digest: hashlib._Hash, data: bytes) -> None:
    file.write(data)
    digest.update(data)


def _copy(source: Path, target: BinaryIO, digest: hashlib._Hash, *, start: int, size: int) -> None:
    with source.open("rb") as column:
        column.seek(start)
        while size > 0:
            data = column.read(min(size, _COPY_BYTES))
            if not data:
                raise EOFError(f"{source} is {size} bytes short")
            _put(target, digest, data)
            size -= len(data)

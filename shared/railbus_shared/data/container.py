"""The `columns` container, written: a safetensors file in which every tensor begins on a multiple of 64 bytes.

The format is eight bytes of little-endian header length, a JSON header, and the tensors without gaps between them; what
aligns a tensor is therefore a tensor of padding bytes after the one before it. A column of variable length is two
tensors: its items, and where each sample begins.
Source: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import orjson

from railbus_shared.contracts.artifacts import ColumnExtent, DatasetSchema, Extent, Shard
from railbus_shared.data.dtypes import OFFSETS, PADDING, SAFETENSORS_DTYPES, sample_bytes
from railbus_shared.data.shard_files import new_file
from railbus_shared.data.slices import Slices

ALIGN_BYTES: Final = 64
_OFFSET_BYTES: Final = 8


@dataclass(frozen=True)
class _Tensor:
    name: str
    dtype: str
    shape: tuple[int, ...]
    size: int
    """Bytes."""


def write_shard(path: Path, schema: DatasetSchema, slices: Slices, *, first: int) -> Shard:
    """Write one shard out of the spool, and hash it on the way.

    Args:
        path: of the shard; it must not exist.
        schema: of the dataset.
        slices: of every column.
        first: the sample that the shard begins with.
    """
    tensors = [tensor for name in sorted(schema.columns) for tensor in _tensors(schema, name, slices)]
    header, places, size = _header(tensors)
    with new_file(path) as file:
        file.write(header)
        for name in sorted(schema.columns):
            file.fill(places[name])
            file.write_all(slices[name].blocks())
            if OFFSETS + name in places:
                file.fill(places[OFFSETS + name])
                file.write_all(slices[name].offset_blocks())
        file.fill(size)
    return Shard(
        file=path.name,
        bytes=file.size,
        sha256=file.sha256,
        first_sample=first,
        samples=next(iter(slices.values())).samples,
        columns={name: _extent(name, places, slices) for name in sorted(schema.columns)},
    )


def _tensors(schema: DatasetSchema, name: str, slices: Slices) -> Iterator[_Tensor]:
    """One for a column of fixed length, two for one of variable length."""
    column, one = schema.columns[name], slices[name]
    items = one.bytes // sample_bytes(column)
    yield _Tensor(name, SAFETENSORS_DTYPES[column.dtype], (items, *column.shape), one.bytes)
    if one.lengths is not None:
        yield _Tensor(
            OFFSETS + name, SAFETENSORS_DTYPES["int64"], (one.samples + 1,), _OFFSET_BYTES * (one.samples + 1)
        )


def _header(tensors: list[_Tensor]) -> tuple[bytes, dict[str, int], int]:
    """The header with its length, where each tensor lies in the file, and the size of the file."""
    entries: dict[str, object] = {}
    starts: dict[str, int] = {}
    end = 0
    for tensor in tensors:
        starts[tensor.name] = end
        entries[tensor.name] = _entry(tensor.dtype, tensor.shape, end, tensor.size)
        end += tensor.size
        if padding := -end % ALIGN_BYTES:
            entries[PADDING + tensor.name] = _entry("U8", (padding,), end, padding)
            end += padding
    text = orjson.dumps(entries)
    text += b" " * (-(len(text) + 8) % ALIGN_BYTES)
    header = len(text).to_bytes(8, "little") + text
    return header, {name: len(header) + start for name, start in starts.items()}, len(header) + end


def _entry(dtype: str, shape: tuple[int, ...], start: int, size: int) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, start + size]}


def _extent(name: str, places: dict[str, int], slices: Slices) -> ColumnExtent:
    one = slices[name]
    offsets = None
    if one.lengths is not None:
        offsets = Extent(offset=places[OFFSETS + name], bytes=_OFFSET_BYTES * (one.samples + 1))
    return ColumnExtent(offset=places[name], bytes=one.bytes, offsets=offsets)

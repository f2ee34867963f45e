"""Readers of payloads: one interface, whatever a shard's bytes are; arrays are mapped, not read."""

from __future__ import annotations

import math
import mmap
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np
import numpy.typing as npt

from railbus_shared.contracts.artifacts import Column, ColumnExtent
from railbus_shared.data.index import DatasetIndex
from railbus_shared.data.order import Positions
from railbus_shared.errors import NotSupported, ShardCorrupt

Array = npt.NDArray[Any]

_PAGE_BYTES: Final = mmap.PAGESIZE
_SHORT_BYTES: Final = 128
"""Samples up to this size are gathered item by item in one call; longer ones each by a copy of their own."""


class ShardReader(Protocol):
    """A shard that is open, whatever its payload.

    Rows are int64 (N,) within the shard; one that it does not have is the caller's mistake, and no check is made.
    bfloat16 passes as its bits in uint16.
    """

    def take(self, column: str, rows: Positions, out: Array) -> None:
        """Rows of a column of fixed length into `out` (N, *shape), contiguous and of the column's dtype."""
        ...

    def lengths(self, column: str, rows: Positions) -> Positions:
        """How many items rows of a column of variable length have, int64 (N,)."""
        ...

    def take_items(self, column: str, rows: Positions, out: Array) -> None:
        """Items of rows of a column of variable length, back to back into `out` (sum of their lengths, *shape)."""
        ...


@dataclass(frozen=True)
class MappedColumn:
    """One column in mapped memory."""

    values: Array
    """(samples, *shape), or all items (items, *shape) where the length varies."""
    offsets: Positions | None = None
    """Where each sample begins, and where the last one ends (samples + 1,); None for a column of fixed length."""


class MappedShard:
    """A shard whose columns lie in mapped memory, which stays mapped for as long as the reader lives."""

    def __init__(self, columns: Mapping[str, MappedColumn]) -> None:
        self._values = {name: column.values for name, column in columns.items()}
        self._offsets = {name: column.offsets for name, column in columns.items() if column.offsets is not None}

    def take(self, column: str, rows: Positions, out: Array) -> None:
        self._values[column].take(rows, axis=0, out=out, mode="clip")  # any other mode makes a hidden copy

    def lengths(self, column: str, rows: Positions) -> Positions:
        offsets = self._offsets[column]
        lengths: Positions = offsets.take(rows + 1)
        lengths -= offsets.take(rows)
        return lengths

    def take_items(self, column: str, rows: Positions, out: Array) -> None:
        values, offsets = self._values[column], self._offsets[column]
        starts, ends = offsets.take(rows), offsets.take(rows + 1)
        if out.nbytes > _SHORT_BYTES * len(rows):
            pieces = [values[start:end] for start, end in zip(starts.tolist(), ends.tolist(), strict=True)]
            np.concatenate(pieces, out=out)
            return
        lengths = ends - starts
        shifts = starts - (np.cumsum(lengths) - lengths)
        items = np.repeat(shifts, lengths)
        items += np.arange(len(items))
        values.take(items, axis=0, out=out, mode="clip")


def _columns_shard(path: Path, index: DatasetIndex, number: int) -> ShardReader:
    """A shard of the `columns` payload: a safetensors file, mapped once; offsets come from the index."""
    shard = index.file.shards[number]
    mapped = _mapped(path, size_bytes=shard.bytes)
    return MappedShard(
        {
            name: _column(mapped, column, shard.columns[name], samples=shard.samples)
            for name, column in index.schema.columns.items()
        }
    )


def _column(mapped: mmap.mmap, column: Column, extent: ColumnExtent, *, samples: int) -> MappedColumn:
    dtype = numpy_dtype(column)
    count = extent.bytes // dtype.itemsize
    values = np.frombuffer(mapped, dtype, count, extent.offset).reshape(-1, *column.shape)
    if extent.offsets is None:
        return MappedColumn(values)
    return MappedColumn(values, np.frombuffer(mapped, np.int64, samples + 1, extent.offsets.offset))


def _mapped(path: Path, *, size_bytes: int) -> mmap.mmap:
    """A file as read-only memory; the arrays that view it keep it mapped."""
    expected = f"{size_bytes} bytes"
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            if size != size_bytes:
                raise ShardCorrupt(path=str(path), expected=expected, actual=f"{size} bytes")
            return mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
    except OSError as exc:
        raise ShardCorrupt(path=str(path), expected=expected, actual=exc.strerror or repr(exc)) from exc


def open_shard(path: Path, index: DatasetIndex, number: int) -> ShardReader:
    """Open a shard whose hash has been verified; raises ShardCorrupt if its size is not the index's, NotSupported."""
    if index.schema.payload != "columns":
        raise NotSupported(
            f"dataset {index.schema.name!r} has payload {index.schema.payload!r}, which this version cannot read",
            hint="import it again with payload 'columns'",
        )
    return _columns_shard(path, index, number)


def numpy_dtype(column: Column) -> np.dtype[Any]:
    """NumPy's dtype of a column; NumPy has no bfloat16, so its bits are shown as uint16."""
    return np.dtype("uint16" if column.dtype == "bfloat16" else column.dtype)


def page_aligned_empty(shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    """An uninitialised array that begins on a page: gathers to 16 bytes behind one took 1.5 to 12 times as long.

    It is cut out of a block of the heap and not mapped by itself: pages of a new mapping fault one by one, and a batch
    of 1 MiB took 0.7 ms instead of 0.1.
    """
    size = math.prod(shape) * dtype.itemsize
    block = np.empty(size + _PAGE_BYTES, np.uint8)
    return np.ndarray(shape, dtype, buffer=block.data, offset=-block.ctypes.data % _PAGE_BYTES)

"""Readers of payloads: a shard's columns as arrays that are mapped, not read."""

from __future__ import annotations

import math
import mmap
import os
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, Protocol

import numpy as np
import numpy.typing as npt

from railbus_shared.contracts.artifacts import Column
from railbus_shared.data.index import DatasetIndex
from railbus_shared.errors import NotSupported, ShardCorrupt

Array = npt.NDArray[Any]

_PAGE_BYTES: Final = mmap.PAGESIZE


class ShardReader(Protocol):
    """A shard that is open."""

    @property
    def columns(self) -> Mapping[str, Array]:
        """Read-only arrays of shape (samples, *shape); bfloat16 as its bits in uint16."""
        ...


class ColumnsReader:
    """A shard of the `columns` payload: a safetensors file, mapped once; offsets come from the index."""

    def __init__(self, path: Path, index: DatasetIndex, number: int) -> None:
        """Raises ShardCorrupt if the file is missing or not of the index's size."""
        shard = index.file.shards[number]
        mapped = _mapped(path, size_bytes=shard.bytes)
        columns = {
            name: np.frombuffer(
                mapped,
                dtype=numpy_dtype(column),
                count=shard.samples * math.prod(column.shape),
                offset=shard.columns[name].offset,
            ).reshape(shard.samples, *column.shape)
            for name, column in index.schema.columns.items()
        }
        self.columns: Mapping[str, Array] = MappingProxyType(columns)


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
    return ColumnsReader(path, index, number)


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

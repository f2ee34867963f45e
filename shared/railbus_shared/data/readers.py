"""Readers of payloads: one interface, whatever a shard's bytes are."""

from __future__ import annotations

import math
import mmap
from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np

from railbus_shared.data import mapped
from railbus_shared.data.dtypes import Array, numpy_dtype
from railbus_shared.data.index import DatasetIndex
from railbus_shared.data.order import Positions

__all__ = ["Array", "ShardReader", "numpy_dtype", "open_shard", "page_aligned_empty"]

_PAGE_BYTES: Final = mmap.PAGESIZE


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

    def pieces(self, column: str, rows: Positions) -> list[Array] | None:
        """The items of each row of such a column, as views; None if the shard has to be decoded for them."""
        ...


def open_shard(path: Path, index: DatasetIndex, number: int, *, populate: bool = False) -> ShardReader:
    """Open a shard whose hash has been verified, and compare what it says of itself with the index.

    Args:
        path: of the shard; a sidecar lies beside it.
        index: that the shard belongs to.
        number: of the shard.
        populate: read all of a mapped shard now, so that no batch waits for its pages.

    Raises:
        ShardCorrupt: it is missing, or its size, header or offsets are not what the index says.
        IndexInvalid: it is a link that leads out of the dataset.
        ConfigError: it is a Parquet file, and pyarrow is not installed.
    """
    match index.about.payload:
        case "columns":
            return mapped.open_columns(path, index, number, populate=populate)
        case "npy":
            return mapped.open_npy(path, index, number, populate=populate)
        case "raw":
            return mapped.open_raw(path, index, number, populate=populate)
        case "parquet":
            from railbus_shared.data.parquet import open_parquet  # noqa: PLC0415 - it loads pyarrow

            return open_parquet(path, index, number)


def page_aligned_empty(shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    """An uninitialised array that begins on a page: gathers to 16 bytes behind one took 1.5 to 12 times as long.

    It is cut out of a block of the heap and not mapped by itself: pages of a new mapping fault one by one, and a batch
    of 1 MiB took 0.7 ms instead of 0.1.
    """
    size = math.prod(shape) * dtype.itemsize
    block = np.empty(size + _PAGE_BYTES, np.uint8)
    return np.ndarray(shape, dtype, buffer=block.data, offset=-block.ctypes.data % _PAGE_BYTES)

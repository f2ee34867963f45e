"""Payloads `columns`, `npy` and `raw`: shards whose columns are arrays in mapped memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np

from railbus_shared.data.dtypes import Array, numpy_dtype
from railbus_shared.data.headers import check_npy, check_safetensors
from railbus_shared.data.index import DatasetIndex
from railbus_shared.data.mapping import Bytes, map_file
from railbus_shared.data.order import Positions
from railbus_shared.data.plain import PlainExtent
from railbus_shared.errors import ShardCorrupt

if TYPE_CHECKING:
    from railbus_shared.data.plain import AnyColumn, AnyColumnExtent, AnyExtent

SHORT_ITEMS: Final = 128
"""Samples of so many items are gathered item by item in one call; longer ones each by a copy of their own."""


@dataclass(frozen=True)
class MappedColumn:
    """One column in mapped memory."""

    values: Array
    """(samples, *shape), or all items (items, *shape) where the length varies."""
    offsets: Positions | None = None
    """Where each sample begins, and where the last one ends (samples + 1,); None for a column of fixed length."""


class MappedShard:
    """A `ShardReader` of mapped columns; the file stays mapped for as long as the reader lives."""

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
        if len(rows):
            gather_items(self._values[column], self._offsets[column], rows, out)

    def pieces(self, column: str, rows: Positions) -> list[Array]:
        return pieces_of(self._values[column], self._offsets[column], rows)


def pieces_of(values: Array, offsets: Positions, rows: Positions) -> list[Array]:
    """The items of each sample, as views."""
    starts, ends = offsets.take(rows).tolist(), offsets.take(rows + 1).tolist()
    return [values[start:end] for start, end in zip(starts, ends, strict=True)]


def gather_items(values: Array, offsets: Positions, rows: Positions, out: Array) -> None:
    """Items of samples, back to back: sample i is `values[offsets[i]:offsets[i + 1]]`. There must be rows."""
    if len(out) > SHORT_ITEMS * len(rows):
        np.concatenate(pieces_of(values, offsets, rows), out=out)
        return
    starts, ends = offsets.take(rows), offsets.take(rows + 1)
    lengths = ends - starts
    items = np.repeat(starts - (np.cumsum(lengths) - lengths), lengths)
    items += np.arange(len(items))
    values.take(items, axis=0, out=out, mode="clip")


def open_columns(path: Path, index: DatasetIndex, number: int, *, populate: bool) -> MappedShard:
    """A safetensors file, mapped once. Raises ShardCorrupt, IndexInvalid."""
    shard = index.shard_map.shards[number]
    data = map_file(path, size_bytes=shard.bytes, populate=populate)
    check_safetensors(path, data, index.about, shard)
    return MappedShard(
        {name: _column(path, data, column, shard.columns[name]) for name, column in index.about.columns.items()}
    )


def open_npy(path: Path, index: DatasetIndex, number: int, *, populate: bool) -> MappedShard:
    """One `.npy` file. Raises ShardCorrupt, IndexInvalid."""
    shard = index.shard_map.shards[number]
    ((name, column),) = index.about.columns.items()
    data = map_file(path, size_bytes=shard.bytes, populate=populate)
    check_npy(path, data, column, shard)
    return MappedShard({name: _column(path, data, column, shard.columns[name])})


def open_raw(path: Path, index: DatasetIndex, number: int, *, populate: bool) -> MappedShard:
    """Bytes without a header, and the sidecar with their offsets beside them. Raises ShardCorrupt, IndexInvalid."""
    shard = index.shard_map.shards[number]
    ((name, column),) = index.about.columns.items()
    if shard.sidecar is None:
        raise ValueError(f"shard {number} of an index that was not checked")
    sidecar_path = path.with_name(shard.sidecar.file)
    sidecar = map_file(sidecar_path, size_bytes=shard.sidecar.bytes, populate=populate)
    data = map_file(path, size_bytes=shard.bytes, populate=populate)
    values = _values(data, column, shard.columns[name])
    whole = PlainExtent(0, shard.sidecar.bytes)
    return MappedShard({name: MappedColumn(values, _offsets(sidecar_path, sidecar, whole, items=len(values)))})


def _column(path: Path, data: Bytes, column: AnyColumn, extent: AnyColumnExtent) -> MappedColumn:
    values = _values(data, column, extent)
    if extent.offsets is None:
        return MappedColumn(values)
    return MappedColumn(values, _offsets(path, data, extent.offsets, items=len(values)))


def _values(data: Bytes, column: AnyColumn, extent: AnyColumnExtent) -> Array:
    dtype = numpy_dtype(column)
    flat = np.frombuffer(data, dtype, extent.bytes // dtype.itemsize, extent.offset)
    return flat.reshape(-1, *column.shape)


def _offsets(path: Path, data: Bytes, extent: AnyExtent, *, items: int) -> Positions:
    """Raises ShardCorrupt unless they begin with 0, never decrease and end with the number of items."""
    found = np.frombuffer(data, np.int64, extent.bytes // 8, extent.offset)
    if found[0] != 0 or found[-1] != items:
        raise ShardCorrupt(path=str(path), expected=f"offsets 0 to {items}", actual=f"{found[0]} to {found[-1]}")
    falls = found[1:] < found[:-1]
    if falls.any():
        row = int(falls.argmax())
        raise ShardCorrupt(
            path=str(path),
            expected="offsets that never decrease",
            actual=f"{found[row]} and then {found[row + 1]} at sample {row}",
        )
    return found

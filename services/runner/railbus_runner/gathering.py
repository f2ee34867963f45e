"""Batches gathered from open shards: one `take` per column and shard, into memory that nobody holds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch

from railbus_runner.buffers import Buffers, Pinned, Ring
from railbus_runner.packed import Packed
from railbus_runner.places import Part
from railbus_runner.shards import Readable
from railbus_shared.data.dtypes import sample_bytes
from railbus_shared.data.mapped import SHORT_ITEMS
from railbus_shared.data.plain import PlainColumn
from railbus_shared.data.readers import Array, ShardReader, numpy_dtype, page_aligned_empty

if TYPE_CHECKING:
    from railbus_shared.data.plain import AnyColumn

Batch = dict[str, Any]
"""A tensor (batch, *shape) of each column, or a `Packed` where its length varies; the schema tells which."""


class Gatherer:
    """Gathers batches from the shards that are open."""

    def __init__(self, columns: Mapping[str, AnyColumn], shards: Readable, *, is_pinned: bool = False) -> None:
        self._shards = shards
        kinds = [(name, column, _Variable if column.variable_length else _Fixed) for name, column in columns.items()]
        self._columns: list[tuple[str, _Fixed | _Variable]] = [
            (name, kind(name, column, is_pinned)) for name, column, kind in kinds
        ]

    def gather(self, part: Part) -> Batch:
        """The samples of a part, in order; raises what keeps one of its shards from being opened."""
        readers = self._shards.readers
        for shard, _, _ in part.segments:
            if shard not in readers:
                self._shards.hold(one for one, _, _ in part.segments)
        return {name: column.gathered(readers, part) for name, column in self._columns}


def _buffers(column: AnyColumn, is_pinned: bool) -> Buffers:
    return Pinned(column) if is_pinned else Ring(column)


_SCATTERED_BYTES: Final = 1 << 20
"""From here on rows of several shards go to their places by way of memory that stays in the processor's cache: a batch
of 8 MiB took 0.67 ms instead of 1.16, and a trainer need not have room for one more."""
_SCATTERED_ROW_BYTES: Final = 512
"""Shorter rows are put into order faster all at once."""
_TOGETHER_BYTES: Final = 512 << 10


class _Scratch:
    """Memory that is good until it is asked for again."""

    def __init__(self, column: AnyColumn) -> None:
        self._dtype = numpy_dtype(column)
        self._shape = column.shape
        self._array: Array | None = None

    def take(self, rows: int) -> Array:
        if self._array is None or len(self._array) < rows:
            self._array = page_aligned_empty((rows, *self._shape), self._dtype)
        return self._array[:rows]


class _Fixed:
    """A column of fixed length."""

    def __init__(self, name: str, column: AnyColumn, is_pinned: bool) -> None:
        self._name = name
        self._buffers = _buffers(column, is_pinned)
        self._scratch = _Scratch(column)
        self._row_bytes = max(1, sample_bytes(column))

    def gathered(self, readers: Mapping[int, ShardReader], part: Part) -> torch.Tensor:
        tensor, array = self._buffers.take(len(part.rows))
        if len(part.segments) == 1:
            readers[part.segments[0][0]].take(self._name, part.rows, array)
            return tensor
        if part.back is not None and self._is_scattered(len(part.rows)):
            self._scatter(readers, part, part.back, array)
            return tensor
        target = array if part.back is None else self._scratch.take(len(part.rows))
        for shard, begin, end in part.segments:
            readers[shard].take(self._name, part.rows[begin:end], target[begin:end])
        if part.back is not None:
            target.take(part.back, axis=0, out=array, mode="clip")
        return tensor

    def _is_scattered(self, rows: int) -> bool:
        return self._row_bytes >= _SCATTERED_ROW_BYTES and rows * self._row_bytes >= _SCATTERED_BYTES

    def _scatter(self, readers: Mapping[int, ShardReader], part: Part, back: Array, array: Array) -> None:
        """Some rows at a time: out of their shard, and each to its place in the batch."""
        places = np.empty_like(back)
        places[back] = np.arange(len(back))
        together = max(1, _TOGETHER_BYTES // self._row_bytes)
        for shard, begin, end in part.segments:
            for start in range(begin, end, together):
                stop = min(start + together, end)
                some = self._scratch.take(stop - start)
                readers[shard].take(self._name, part.rows[start:stop], some)
                array[places[start:stop]] = some


class _Variable:
    """A column of variable length."""

    def __init__(self, name: str, column: AnyColumn, is_pinned: bool) -> None:
        self._name = name
        self._buffers = _buffers(column, is_pinned)
        self._offsets = _buffers(PlainColumn("int64", ()), is_pinned)
        self._scratch = _Scratch(column)

    def gathered(self, readers: Mapping[int, ShardReader], part: Part) -> Packed:
        ends = self._ends(readers, part)
        offsets, array = self._offsets.take(len(part.rows) + 1)
        total = int(ends[-1])
        if part.back is None:
            array[:] = ends
            values, target = self._buffers.take(total)
            self._fill(readers, part, ends, target)
            return Packed(values, offsets)
        array[0] = 0
        np.cumsum(np.diff(ends)[part.back], out=array[1:])
        values, target = self._buffers.take(total)
        if total > SHORT_ITEMS * len(part.rows) and self._join(readers, part, part.back, target):
            return Packed(values, offsets)
        staged = self._scratch.take(total)
        self._fill(readers, part, ends, staged)
        bounds: list[int] = ends.tolist()
        if total:
            np.concatenate([staged[bounds[row] : bounds[row + 1]] for row in part.back.tolist()], out=target)
        return Packed(values, offsets)

    def _join(self, readers: Mapping[int, ShardReader], part: Part, back: Array, target: Array) -> bool:
        """Long items straight to their places; False if a shard must be decoded first."""
        pieces: list[Array] = []
        for shard, begin, end in part.segments:
            found = readers[shard].pieces(self._name, part.rows[begin:end])
            if found is None:
                return False
            pieces += found
        np.concatenate([pieces[row] for row in back.tolist()], out=target)
        return True

    def _ends(self, readers: Mapping[int, ShardReader], part: Part) -> Array:
        """Where each of the part's rows begins in the items of all of them, and where the last one ends."""
        ends = np.zeros(len(part.rows) + 1, np.int64)
        for shard, begin, end in part.segments:
            ends[begin + 1 : end + 1] = readers[shard].lengths(self._name, part.rows[begin:end])
        return np.cumsum(ends, out=ends)

    def _fill(self, readers: Mapping[int, ShardReader], part: Part, ends: Array, target: Array) -> None:
        for shard, begin, end in part.segments:
            readers[shard].take_items(self._name, part.rows[begin:end], target[ends[begin] : ends[end]])

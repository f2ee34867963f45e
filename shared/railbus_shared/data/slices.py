"""Slices: samples that lie in the spool, named but not read."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Final

import numpy as np

from railbus_shared.contracts.artifacts import Column, DatasetSchema
from railbus_shared.data.chunks import Piece, bytes_of
from railbus_shared.data.dtypes import numpy_dtype, sample_bytes
from railbus_shared.data.order import Positions
from railbus_shared.data.spreading import Weights
from railbus_shared.data.tape import BLOCK_BYTES, Tape

LENGTH_BYTES: Final = 8
_ROWS: Final = BLOCK_BYTES // LENGTH_BYTES


@dataclass(frozen=True)
class ColumnSlice:
    """Some samples of a column, where they lie in the spool."""

    values: Tape
    start: int
    """Byte of the tape."""
    bytes: int
    samples: int
    lengths: Tape | None = None
    """Of a column of variable length: the items of each sample, int64."""
    first: int = 0
    """Sample of that tape."""

    def blocks(self) -> Generator[memoryview]:
        """The values, each block good until the next is asked for."""
        return self.values.read(self.start, self.start + self.bytes)

    def length_blocks(self) -> Iterator[Positions]:
        """Items of each sample."""
        if self.lengths is not None:
            for block in self.lengths.read(LENGTH_BYTES * self.first, LENGTH_BYTES * (self.first + self.samples)):
                yield np.frombuffer(block, np.int64)

    def offset_blocks(self) -> Generator[memoryview]:
        """Where each sample begins, counted in items from the first one, and where the last one ends."""
        yield memoryview(bytes(LENGTH_BYTES))
        end = 0
        for lengths in self.length_blocks():
            offsets = np.cumsum(lengths)
            offsets += end
            end = int(offsets[-1])
            yield bytes_of(offsets).data


Slices = dict[str, ColumnSlice]
"""All columns of a shard to be."""


def loaded(one: ColumnSlice, column: Column) -> Piece:
    """Some samples of a column, in memory."""
    values = np.empty(one.bytes, np.uint8)
    end = 0
    for block in one.blocks():
        values[end : end + len(block)] = block
        end += len(block)
    shaped = values.view(numpy_dtype(column)).reshape(-1, *column.shape)
    if one.lengths is None:
        return Piece(shaped)
    return Piece(shaped, np.concatenate([np.empty(0, np.int64), *(block.copy() for block in one.length_blocks())]))


def parts(slices: Slices, schema: DatasetSchema, counts: Iterable[int]) -> Iterator[Slices]:
    """The next so many samples of each column, again and again."""
    starts = {name: one.start for name, one in slices.items()}
    row = 0
    for count in counts:
        found = {}
        for name, one in slices.items():
            size = sample_bytes(schema.columns[name])
            found[name] = part = sized(replace(one, start=starts[name], samples=count, first=one.first + row), size)
            starts[name] += part.bytes
        row += count
        yield found


def sized(one: ColumnSlice, size: int) -> ColumnSlice:
    """A slice that knows how many bytes its samples have."""
    items = one.samples if one.lengths is None else sum(int(block.sum()) for block in one.length_blocks())
    return replace(one, bytes=items * size)


def weight_blocks(slices: Slices, weights: Weights) -> Iterator[Positions]:
    """What each sample weighs."""
    varying = [(one, weights.item[name]) for name, one in slices.items() if one.lengths is not None]
    if not varying:
        samples = next(iter(slices.values())).samples
        yield from (np.full(min(_ROWS, samples - row), weights.fixed) for row in range(0, samples, _ROWS))
    for blocks in zip(*(one.length_blocks() for one, _ in varying), strict=True):
        found = np.full(len(blocks[0]), weights.fixed)
        for block, (_, size) in zip(blocks, varying, strict=True):
            found += block * size
        yield found

"""Samples of a dataset that lies under the root, for commands that show, count and export: some at a time, any of them.

A shard that is read from is hashed first where its reader asks for that: what leaves the tree is as whole as what is
trained on.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

import numpy as np

from railbus.importers.source import Array, Chunk, Report, Values, rows_per_chunk
from railbus_shared.contracts.artifacts import Column, Shard
from railbus_shared.data.index import DatasetIndex
from railbus_shared.data.order import Positions
from railbus_shared.data.ragged import Ragged
from railbus_shared.data.readers import ShardReader, numpy_dtype, open_shard
from railbus_shared.errors import ShardCorrupt
from railbus_shared.files import sha256_file
from railbus_shared.layout import Layout

_BFLOAT16_SHIFT: Final = 16


class Rows:
    """The samples of a dataset, or of one of its splits, in their order."""

    def __init__(
        self, layout: Layout, index: DatasetIndex, *, split: str | None = None, verifies: bool = False
    ) -> None:
        """Raises NotFound for a split that there is not."""
        self.index = index
        self.split = split
        self._folder = layout.shards(index.schema.name)
        self._verifies = verifies
        self._open: tuple[int, ShardReader] | None = None
        runs = [(one.first, one.samples) for one in index.split(split).runs] if split else [(0, index.file.samples)]
        self._runs = runs
        self.samples = sum(count for _, count in runs)

    @property
    def columns(self) -> dict[str, Column]:
        return self.index.schema.columns

    def chunks(self, names: Sequence[str] | None = None, *, report: Report | None = None) -> Iterator[Chunk]:
        """All samples, some at a time, of some columns or of all."""
        step = rows_per_chunk(self.index.file.bytes // self.index.file.samples)
        done = 0
        for first, count in self._runs:
            for start in range(first, first + count, step):
                stop = min(start + step, first + count)
                yield self.take(np.arange(start, stop, dtype=np.int64), names)
                done += stop - start
                if report is not None:
                    report("reading", done, self.samples)

    def places(self, places: Positions) -> Positions:
        """Samples of the dataset at places of the split."""
        firsts, counts = (np.array(one, np.int64) for one in zip(*self._runs, strict=True))
        begins = np.cumsum(counts) - counts
        runs = np.searchsorted(begins, places, side="right") - 1
        return places - begins[runs] + firsts[runs]

    def take(self, samples: Positions, names: Sequence[str] | None = None) -> Chunk:
        """Samples of the dataset by their numbers, in that order. Raises ShardCorrupt."""
        numbers, rows = self.index.locate(samples)
        wanted = list(self.columns) if names is None else list(names)
        cuts = [0, *(np.flatnonzero(np.diff(numbers)) + 1).tolist(), len(samples)]
        parts: dict[str, list[Values]] = {name: [] for name in wanted}
        for start, stop in itertools.pairwise(cuts):
            reader = self._reader(int(numbers[start]))
            for name in wanted:
                parts[name].append(_taken(reader, name, self.columns[name], rows[start:stop]))
        return {name: _together(found) for name, found in parts.items()}

    def num_items(self, name: str) -> int:
        """Items of a column of variable length in all samples."""
        total = 0
        for number, rows in self._shards():
            total += int(self._reader(number).lengths(name, rows).sum())
        return total

    def _shards(self) -> Iterator[tuple[int, Positions]]:
        """Every shard that has samples of the split, with their rows in it."""
        for first, count in self._runs:
            for number, shard in enumerate(self.index.file.shards):
                start = max(first, shard.first_sample)
                stop = min(first + count, shard.first_sample + shard.samples)
                if start < stop:
                    rows = np.arange(start - shard.first_sample, stop - shard.first_sample, dtype=np.int64)
                    yield number, rows

    def _reader(self, number: int) -> ShardReader:
        if self._open is None or self._open[0] != number:
            shard = self.index.file.shards[number]
            path = self._folder / shard.file
            if self._verifies:
                check_shard(path.parent, shard)
            self._open = number, open_shard(path, self.index, number)
        return self._open[1]


def check_shard(folder: Path, shard: Shard) -> None:
    """Hash a shard and its sidecar; raises ShardCorrupt for what is not as the index states."""
    stated = [(shard.file, shard.sha256)]
    stated += [(shard.sidecar.file, shard.sidecar.sha256)] if shard.sidecar else []
    for name, expected in stated:
        try:
            actual = sha256_file(folder / name)
        except OSError as exc:
            actual = (exc.strerror or repr(exc)).lower()
        if actual != expected:
            raise ShardCorrupt(path=str(folder / name), expected=expected, actual=actual)


def _taken(reader: ShardReader, name: str, column: Column, rows: Positions) -> Values:
    dtype = numpy_dtype(column)
    if not column.variable_length:
        found: Array = np.empty((len(rows), *column.shape), dtype)
        reader.take(name, rows, found)
        return found
    offsets = np.zeros(len(rows) + 1, np.int64)
    np.cumsum(reader.lengths(name, rows), out=offsets[1:])
    items: Array = np.empty((int(offsets[-1]), *column.shape), dtype)
    if items.size:
        reader.take_items(name, rows, items)
    return Ragged(items, offsets)


def _together(parts: list[Values]) -> Values:
    """Parts of one column as one."""
    if len(parts) == 1:
        return parts[0]
    plain = [part for part in parts if not isinstance(part, Ragged)]
    if plain:
        return np.concatenate(plain)
    varying = [part for part in parts if isinstance(part, Ragged)]
    starts = np.cumsum([0, *(len(part.values) for part in varying)])
    offsets = [part.offsets[:-1] + start for part, start in zip(varying, starts.tolist(), strict=False)]
    return Ragged(np.concatenate([part.values for part in varying]), np.concatenate([*offsets, starts[-1:]]))


def as_numbers(values: Array, column: Column) -> Array:
    """Values as NumPy can reckon with them: bfloat16 becomes float32, which holds each of its values."""
    if column.dtype == "bfloat16":
        return (values.astype(np.uint32) << _BFLOAT16_SHIFT).view(np.float32)
    return values


def values_of(values: Values) -> Array:
    """All items of a column of a chunk."""
    return values.values if isinstance(values, Ragged) else values

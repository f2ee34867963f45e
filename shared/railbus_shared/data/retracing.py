"""Retracing: samples that an import finished before it was killed, held against what its source gives now.

They are compared byte by byte with the finished shards, whose hashes are known to be right; so a finished shard stays
only if the source would make the same one again, and nothing has to be hashed twice for the case that an import is
killed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from railbus_shared.contracts.artifacts import DatasetSchema, IndexFile, Shard
from railbus_shared.data.chunks import Piece, Pieces, num_samples, part
from railbus_shared.data.dtypes import numpy_dtype
from railbus_shared.data.index import DatasetIndex
from railbus_shared.data.readers import ShardReader, open_shard
from railbus_shared.data.tape import BLOCK_BYTES

_NO_HASH = "0" * 64


class Retracing:
    """How far a source has agreed with finished shards."""

    def __init__(self, folder: Path, schema: DatasetSchema, shards: Sequence[Shard]) -> None:
        """`folder` is where the shards lie; there is at least one."""
        self._folder = folder
        self._index = _index_of(schema, shards)
        self._firsts = [0]
        for shard in shards:
            self._firsts.append(self._firsts[-1] + shard.samples)
        self._number = 0
        self._reader: ShardReader | None = None
        self.agreed = 0
        """Samples of the source that are those of the shards."""

    @property
    def samples(self) -> int:
        """Of all shards."""
        return self._firsts[-1]

    def agrees(self, pieces: Pieces) -> bool:
        """Hold the source's next samples against the shards, which have at least as many left; none counts if not."""
        start, total = 0, num_samples(pieces)
        while start < total:
            stop = min(total, start + self._firsts[self._number + 1] - self.agreed - start)
            if not self._same(part(pieces, start, stop), self.agreed + start - self._firsts[self._number]):
                return False
            start = stop
            if self.agreed + start == self._firsts[self._number + 1]:
                self._open(self._number + 1)
        self.agreed += total
        return True

    def again(self, folder: Path) -> Iterator[Pieces]:
        """The samples that agreed, out of the shards, which lie in `folder` now."""
        self._folder = folder
        self._open(0)
        start = 0
        while start < self.agreed:
            first, end = self._firsts[self._number], self._firsts[self._number + 1]
            stop = min(self.agreed, end, start + self._rows_of_a_block())
            yield self._pieces(start - first, stop - first)
            start = stop
            if start == end:
                self._open(self._number + 1)
        self._reader = None

    def _open(self, number: int) -> None:
        self._number = number
        self._reader = None

    def _rows_of_a_block(self) -> int:
        shard = self._index.file.shards[self._number]
        return max(1, BLOCK_BYTES * shard.samples // max(1, shard.bytes))

    def _same(self, pieces: Pieces, row: int) -> bool:
        found = self._pieces(row, row + num_samples(pieces))
        return all(piece.equals(found[name]) for name, piece in pieces.items())

    def _pieces(self, start: int, stop: int) -> Pieces:
        """Rows of the shard that is open."""
        if self._reader is None:
            shard = self._index.file.shards[self._number]
            self._reader = open_shard(self._folder / shard.file, self._index, self._number)
        return {name: self._piece(self._reader, name, start, stop) for name in self._index.schema.columns}

    def _piece(self, reader: ShardReader, name: str, start: int, stop: int) -> Piece:
        column = self._index.schema.columns[name]
        rows = np.arange(start, stop)
        lengths = reader.lengths(name, rows) if column.variable_length else None
        items = len(rows) if lengths is None else int(lengths.sum())
        values = np.empty((items, *column.shape), numpy_dtype(column))
        if lengths is None:
            reader.take(name, rows, values)
        else:
            reader.take_items(name, rows, values)
        return Piece(values, lengths)


def _index_of(schema: DatasetSchema, shards: Sequence[Shard]) -> DatasetIndex:
    """An index of shards that no index names yet, for readers to find their way."""
    file = IndexFile(
        dataset=schema.name,
        schema_sha256=_NO_HASH,
        payload=schema.payload,
        samples=sum(shard.samples for shard in shards),
        bytes=sum(shard.bytes for shard in shards),
        shards=tuple(shards),
    )
    return DatasetIndex(schema, file, _NO_HASH)

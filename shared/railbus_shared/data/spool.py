"""The spool: samples on disk, column by column, between the chunk they came in and the shard they go to.

Memory holds one block of a column, whatever was spooled. Files are removed as soon as their samples lie in a shard, so
disk holds no more of them than the rule that cuts shards waits for.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from railbus_shared.contracts.artifacts import DatasetSchema
from railbus_shared.data.chunks import Pieces, bytes_of, num_samples
from railbus_shared.data.dtypes import sample_bytes
from railbus_shared.data.slices import LENGTH_BYTES, ColumnSlice, Slices, loaded, sized, weight_blocks
from railbus_shared.data.spreading import Boundary, Weights
from railbus_shared.data.tape import BLOCK_BYTES, Tape


class Spool:
    """Samples that no shard holds yet."""

    def __init__(self, folder: Path, schema: DatasetSchema, weights: Weights) -> None:
        self._schema = schema
        self._weights = weights
        varying = [name for name, column in schema.columns.items() if column.variable_length]
        self._values = {name: Tape(folder, f"values.{name}") for name in schema.columns}
        self._lengths = {name: Tape(folder, f"lengths.{name}") for name in varying}
        self._starts = dict.fromkeys(schema.columns, 0)
        self._first = 0
        self.samples = 0
        """Held, from the end of the last shard on."""
        self.weight = 0
        """Of these."""

    def add(self, pieces: Pieces) -> None:
        """Take in a chunk."""
        for name, piece in pieces.items():
            self._values[name].append(bytes_of(piece.values).data)
            if piece.lengths is not None:
                self._lengths[name].append(bytes_of(piece.lengths).data)
        self.samples += num_samples(pieces)
        self.weight += self._weights.fixed * num_samples(pieces)
        for name, size in self._weights.item.items():
            self.weight += size * len(pieces[name].values)

    def find(self, goal: int) -> Boundary:
        """The last boundary that is not past a goal, in bytes from the first sample held."""
        if not self._lengths:
            samples = goal // self._weights.fixed
            return Boundary(samples, samples * self._weights.fixed, (samples + 1) * self._weights.fixed)
        samples = below = 0
        for block in weight_blocks(self._held(), self._weights):
            ends = np.cumsum(block)
            ends += below
            here = int(np.searchsorted(ends, goal, side="right"))
            below = int(ends[here - 1]) if here else below
            samples += here
            if here < len(ends):
                return Boundary(samples, below, int(ends[here]))
        return Boundary(samples, below, below)

    def cut(self, samples: int) -> Slices:
        """The first samples, for a shard; they stay on disk until they are dropped."""
        slices = {name: self._slice(name, samples) for name in self._schema.columns}
        for name, one in slices.items():
            self._starts[name] += one.bytes
        self._first += samples
        self.samples -= samples
        self.weight -= self._weights.fixed * samples
        for name, size in self._weights.item.items():
            self.weight -= size * (slices[name].bytes // sample_bytes(self._schema.columns[name]))
        return slices

    @staticmethod
    def drop(slices: Slices) -> None:
        """Remove samples that lie in a shard, and all before them."""
        for one in slices.values():
            one.values.drop(one.start + one.bytes)
            if one.lengths is not None:
                one.lengths.drop(LENGTH_BYTES * (one.first + one.samples))

    def pieces(self) -> Iterator[Pieces]:
        """Take out all samples held, as if they came again: blocks of a megabyte, or of one sample."""
        while self.samples:
            samples = min(self.samples, max(1, self.find(BLOCK_BYTES).samples))
            yield {name: loaded(one, self._schema.columns[name]) for name, one in self.cut(samples).items()}

    def close(self) -> None:
        for tape in (*self._values.values(), *self._lengths.values()):
            tape.close()

    def _slice(self, name: str, samples: int) -> ColumnSlice:
        whole = ColumnSlice(self._values[name], self._starts[name], 0, samples, self._lengths.get(name), self._first)
        return sized(whole, sample_bytes(self._schema.columns[name]))

    def _held(self) -> Slices:
        """The lengths of all samples held, without their values."""
        return {
            name: ColumnSlice(self._values[name], 0, 0, self.samples, tape, self._first)
            for name, tape in self._lengths.items()
        }

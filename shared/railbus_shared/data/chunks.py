"""Chunks: what is given to the writer, held against the schema before a byte of it is kept."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from railbus_shared.contracts.artifacts import Column, DatasetSchema
from railbus_shared.data.dtypes import numpy_dtype
from railbus_shared.data.order import Positions
from railbus_shared.data.ragged import Ragged
from railbus_shared.data.spreading import Weights
from railbus_shared.errors import InvalidField

Array = npt.NDArray[Any]
Chunk = Mapping[str, Array | Ragged]
"""Samples column by column: an array (samples, *shape), or a `Ragged` where the length varies."""

MAX_SAMPLE_BYTES: Final = (2 << 30) - (1 << 20)
"""A shard has at most 2 GiB; a MiB of it is left to the container's header."""
MAX_PARQUET_SAMPLE_BYTES: Final = 768 << 20
"""A sample lies in one row group, and readers refuse to decode one of more than 1 GiB."""


def max_sample_bytes(schema: DatasetSchema) -> int:
    """The largest sample that a shard can hold, as it is stored."""
    return MAX_PARQUET_SAMPLE_BYTES if schema.payload == "parquet" else MAX_SAMPLE_BYTES


@dataclass(frozen=True)
class Piece:
    """A column of a chunk that fits its schema."""

    values: Array
    """Laid out row by row: (samples, *shape), or all items (items, *shape) where the length varies."""
    lengths: Positions | None = None
    """Items of each sample where the length varies."""

    def __len__(self) -> int:
        return len(self.values if self.lengths is None else self.lengths)

    def part(self, start: int, stop: int) -> Piece:
        """Some of the samples, as a view."""
        if self.lengths is None:
            return Piece(self.values[start:stop])
        first = int(self.lengths[:start].sum())
        lengths = self.lengths[start:stop]
        return Piece(self.values[first : first + int(lengths.sum())], lengths)

    def equals(self, other: Piece) -> bool:
        """Whether both hold the same bytes; unlike numbers, a NaN is then equal to itself."""
        if not np.array_equal(lengths_of(self), lengths_of(other)):
            return False
        return self.values.shape == other.values.shape and np.array_equal(bytes_of(self.values), bytes_of(other.values))


def lengths_of(piece: Piece) -> Positions:
    """Items of each sample; one each where the length does not vary."""
    return np.ones(len(piece.values), np.int64) if piece.lengths is None else piece.lengths


Pieces = Mapping[str, Piece]
"""All columns of a chunk."""


def num_samples(pieces: Pieces) -> int:
    return len(next(iter(pieces.values())))


def part(pieces: Pieces, start: int, stop: int) -> Pieces:
    """Some of the samples of each column."""
    return {name: piece.part(start, stop) for name, piece in pieces.items()}


def bytes_of(array: Array) -> npt.NDArray[np.uint8]:
    """The bytes of an array that is laid out row by row."""
    return array.reshape(-1).view(np.uint8)


def fitting(schema: DatasetSchema, chunk: Chunk, *, first: int) -> Pieces:
    """A chunk's columns; raises InvalidField, naming column and sample, if they are not what the schema says.

    Args:
        schema: of the dataset.
        chunk: with whatever is in it.
        first: the number of its first sample, for messages.
    """
    if chunk.keys() != schema.columns.keys():
        raise InvalidField(
            field="columns",
            value=sorted(chunk),
            problem="not the columns of the schema",
            hint=f"give {', '.join(sorted(schema.columns))}",
        )
    pieces = {name: _piece(name, column, chunk[name]) for name, column in schema.columns.items()}
    lengths = {name: len(piece) for name, piece in pieces.items()}
    if len(set(lengths.values())) != 1:
        raise InvalidField(field="columns", value=lengths, problem="columns of different lengths")
    _check_sizes(schema, pieces, first=first)
    return pieces


def _piece(name: str, column: Column, given: Array | Ragged) -> Piece:
    if isinstance(given, Ragged) != column.variable_length:
        raise InvalidField(
            field=f"columns.{name}",
            value=type(given).__name__,
            problem=f"the schema says variable_length is {str(column.variable_length).lower()}",
            hint="give a Ragged for a column of variable length, and an array for any other",
        )
    if not isinstance(given, Ragged):
        return Piece(_array(name, column, given, axis="samples"))
    values = _array(name, column, given.values, axis="items")
    offsets = _offsets(name, given.offsets, items=len(values))
    return Piece(values[int(offsets[0]) : int(offsets[-1])], np.diff(offsets))


def _array(name: str, column: Column, array: Array, *, axis: str) -> Array:
    if array.ndim == 0 or array.dtype != numpy_dtype(column) or array.shape[1:] != column.shape:
        raise InvalidField(
            field=f"columns.{name}",
            value=f"{array.dtype}{list(array.shape)}",
            problem=f"the schema says {column.dtype}[{axis}{''.join(f', {length}' for length in column.shape)}]",
        )
    if column.num_classes is not None and array.size and array.dtype.kind in "iu":
        wrong = [int(value) for value in (array.min(), array.max()) if not 0 <= value < column.num_classes]
        if wrong:
            raise InvalidField(
                field=f"columns.{name}",
                value=wrong[0],
                problem=f"the schema says classes 0 to {column.num_classes - 1}",
            )
    return np.ascontiguousarray(array)


def _offsets(name: str, offsets: Positions, *, items: int) -> Positions:
    if (offsets.ndim, offsets.dtype) != (1, np.dtype(np.int64)) or not offsets.size:
        raise InvalidField(
            field=f"columns.{name}",
            value=f"{offsets.dtype}{list(offsets.shape)}",
            problem="offsets are int64[samples + 1]",
        )
    if offsets[0] < 0 or offsets[-1] > items or (offsets[1:] < offsets[:-1]).any():
        raise InvalidField(
            field=f"columns.{name}",
            value=f"offsets {int(offsets[0])} to {int(offsets[-1])}",
            problem=f"offsets do not decrease, and lie within the {items} items",
        )
    return offsets


def _check_sizes(schema: DatasetSchema, pieces: Pieces, *, first: int) -> None:
    """Raises InvalidField, naming the sample, if one does not fit into a shard."""
    weights = Weights.of(schema)
    sizes = np.full(num_samples(pieces), weights.fixed)
    for name, size in weights.item.items():
        sizes += lengths_of(pieces[name]) * size
    if sizes.size and sizes.max() > (most := max_sample_bytes(schema)):
        worst = int(sizes.argmax())
        raise InvalidField(
            field=f"samples.{first + worst}",
            value=f"{int(sizes[worst])} bytes",
            problem=f"a sample takes at most {most} bytes of a shard",
            hint="cut it into several samples",
        )

"""The `parquet` payload, written: one file a shard, row groups of some megabytes, nothing compressed.

Without compression and dictionaries a shard has the size that was planned for it, and a row group decodes to no more
than its size in the file lets expect. The same samples give the same bytes with one version of pyarrow, which writes
its name and version into each file; another version may give others.
Columns: a scalar as itself, a shape as nested lists of fixed size, a variable length as a list, or as binary where the
items are bytes (a string where they are UTF-8). bfloat16 passes as its bits in uint16.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np

from railbus_shared.contracts.artifacts import Column, DatasetSchema, RowGroup, Shard
from railbus_shared.data.chunks import Piece
from railbus_shared.data.order import Positions
from railbus_shared.data.shard_files import HashedFile, new_file
from railbus_shared.data.slices import Slices, loaded, parts, weight_blocks
from railbus_shared.data.spreading import Weights
from railbus_shared.errors import ConfigError, InvalidField

try:
    import pyarrow as pa
    import pyarrow.parquet as pq
except ImportError as exc:
    raise ConfigError("payload 'parquet' needs pyarrow", hint="pip install 'railbus[parquet]'") from exc

ROW_GROUP_BYTES: Final = 4 << 20
_FORMAT: Final = "2.6"


def library() -> str:
    """The library whose version decides about the bytes of shards."""
    return f"pyarrow {pa.__version__}"


def write_shard(path: Path, schema: DatasetSchema, slices: Slices, *, first: int) -> Shard:
    """Write one shard out of the spool, and hash it on the way; arguments as for `columns`."""
    names = sorted(schema.columns)
    types = pa.schema([pa.field(name, _type(schema.columns[name])) for name in names])
    samples = next(iter(slices.values())).samples
    rows = list(row_groups(weight_blocks(slices, Weights.of(schema)), limit=ROW_GROUP_BYTES))
    with new_file(path) as file, _writer(file, types) as writer:
        for group in parts(slices, schema, rows):
            columns = [_array(name, schema.columns[name], loaded(group[name], schema.columns[name])) for name in names]
            writer.write_table(pa.Table.from_arrays(columns, schema=types), row_group_size=samples)
    return Shard(
        file=path.name,
        bytes=file.size,
        sha256=file.sha256,
        first_sample=first,
        samples=samples,
        row_groups=tuple(RowGroup(samples=count) for count in rows),
    )


def row_groups(weights: Iterable[Positions], *, limit: int) -> Iterator[int]:
    """Samples of each row group: as many as have no more than so many bytes, or one; blocks decide nothing."""
    rows = weight = 0
    for block in weights:
        ends = np.concatenate([[0], np.cumsum(block)])
        start = 0
        while start < len(block):
            stop = int(np.searchsorted(ends, ends[start] + limit - weight, side="right")) - 1
            stop = max(stop, start + (rows == 0))
            rows += stop - start
            weight += int(ends[stop] - ends[start])
            start = stop
            if start < len(block):
                yield rows
                rows = weight = 0
    if rows:
        yield rows


class _Sink:
    """A file as pyarrow wants it; closing it is left to whoever opened it."""

    def __init__(self, file: HashedFile) -> None:
        self._file = file
        self.closed = False

    def write(self, data: bytes) -> int:
        return self._file.write(data)

    def flush(self) -> None:
        """Nothing: the file is flushed once, when it is whole."""

    def close(self) -> None:
        self.closed = True


def _writer(file: HashedFile, types: Any) -> Any:
    sink = pa.PythonFile(_Sink(file), mode="w")
    return pq.ParquetWriter(
        sink, types, version=_FORMAT, compression="none", use_dictionary=False, write_statistics=False
    )


def _type(column: Column) -> Any:
    if _is_binary(column):
        return pa.string() if column.encoding == "utf-8" else pa.binary()
    name = {"float16": "halffloat", "bfloat16": "uint16", "bool": "bool_"}.get(column.dtype, column.dtype)
    found = pa.type_for_alias(name.rstrip("_"))
    for length in reversed(column.shape):
        found = pa.list_(found, length)
    return pa.list_(found) if column.variable_length else found


def _is_binary(column: Column) -> bool:
    return column.variable_length and column.dtype == "uint8" and not column.shape


def _array(name: str, column: Column, piece: Piece) -> Any:
    if piece.lengths is None:
        return _nested(column, piece)
    offsets = np.concatenate([[0], np.cumsum(piece.lengths)]).astype(np.int32)
    if not _is_binary(column):
        return pa.ListArray.from_arrays(pa.array(offsets), _nested(column, piece))
    buffers = [None, pa.py_buffer(offsets), pa.py_buffer(piece.values)]
    array = pa.Array.from_buffers(_type(column), len(piece), buffers)
    try:
        array.validate(full=True)
    except pa.ArrowInvalid as exc:
        raise InvalidField(
            field=f"columns.{name}", value=str(exc), problem="not UTF-8", hint="leave the column's encoding out"
        ) from exc
    return array


def _nested(column: Column, piece: Piece) -> Any:
    array = pa.array(piece.values.reshape(-1))
    for length in reversed(column.shape):
        array = pa.FixedSizeListArray.from_arrays(array, length)
    return array

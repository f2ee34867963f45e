"""Payload `parquet`: shards that are decoded, a row group and column at a time, by pyarrow (extra `parquet`).

What is decoded stays in one memory of this process that is bounded in bytes. How much a row group may decode to is
limited as well: a few bytes of Parquet can say millions of equal values. The footer is asked first, and what comes out
is counted while it is decoded, since a footer can lie. Only what one page of the format unpacks to, at most 2 GiB, is
in the hands of pyarrow.
"""

from __future__ import annotations

import itertools
import math
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from railbus_shared.data.dtypes import Array, numpy_dtype, sample_bytes
from railbus_shared.data.index import DatasetIndex
from railbus_shared.data.mapped import MappedColumn, gather_items
from railbus_shared.data.mapping import Bytes, map_file
from railbus_shared.data.order import Positions
from railbus_shared.errors import ConfigError, ShardCorrupt

if TYPE_CHECKING:
    from railbus_shared.data.plain import AnyColumn

try:
    import pyarrow as pa
    import pyarrow.parquet as pq
except ImportError as exc:
    raise ConfigError("payload 'parquet' needs pyarrow", hint="pip install 'railbus[parquet]'") from exc

MAX_GROUP_BYTES: Final = 1 << 30
"""A column of one row group may decode to so much."""
KEPT_BYTES: Final = 256 << 20
"""Of decoded row groups, of all shards that are open; the newest is kept even if it is larger."""
_MAX_FOOTER_BYTES: Final = 16 << 20
_BATCH_BYTES: Final = 4 << 20
"""About as much is decoded before it is counted."""
_TAIL_BYTES: Final = 8


def open_parquet(path: Path, index: DatasetIndex, number: int) -> ParquetShard:
    """Map a Parquet file and compare its footer with the index. Raises ShardCorrupt, IndexInvalid."""
    shard = index.shard_map.shards[number]
    data = map_file(path, size_bytes=shard.bytes)
    _check_tail(path, data)
    with _faults(path):
        return ParquetShard(path, data, index, number)


class ParquetShard:
    """A `ShardReader` of a Parquet file."""

    def __init__(self, path: Path, data: Bytes, index: DatasetIndex, number: int) -> None:
        samples = np.array([group.samples for group in index.shard_map.shards[number].row_groups], dtype=np.int64)
        self._path = path
        self._columns = index.about.columns
        self._samples = samples
        self._firsts = np.cumsum(samples) - samples
        self._file = _opened(path, data, self._columns)
        self._places = {name: place for place, name in enumerate(self._file.schema_arrow.names)}
        self._key = next(_keys)
        _check_footer(path, self._file, self._columns, samples.tolist())
        weakref.finalize(self, _decoded.forget, self._key)

    def take(self, column: str, rows: Positions, out: Array) -> None:
        for here, within, found in self._parts(column, rows):
            out[here] = found.values.take(within, axis=0)

    def lengths(self, column: str, rows: Positions) -> Positions:
        lengths = np.zeros(len(rows), np.int64)
        for here, within, found in self._parts(column, rows):
            lengths[here] = _offsets(found).take(within + 1) - _offsets(found).take(within)
        return lengths

    def take_items(self, column: str, rows: Positions, out: Array) -> None:
        pieces: list[Array] = [out[:0]] * len(rows)
        for here, within, found in self._parts(column, rows):
            bounds = _offsets(found)
            starts, ends = bounds.take(within).tolist(), bounds.take(within + 1).tolist()
            for place, start, end in zip(here.tolist(), starts, ends, strict=True):
                pieces[place] = found.values[start:end]
        if pieces:
            np.concatenate(pieces, out=out)

    def pieces(self, column: str, rows: Positions) -> None:
        """None: views would keep decoded groups of many shards."""

    def _parts(self, column: str, rows: Positions) -> Iterator[tuple[Positions, Positions, MappedColumn]]:
        """For each row group that rows lie in: places among the rows, rows within the group, the decoded column."""
        groups = np.searchsorted(self._firsts, rows, side="right") - 1
        for group in np.flatnonzero(np.bincount(groups)).tolist() if len(rows) else []:
            here = np.flatnonzero(groups == group)
            yield here, rows[here] - self._firsts[group], self._group(column, group)

    def _group(self, column: str, group: int) -> MappedColumn:
        def decode() -> MappedColumn:
            with _faults(self._path):
                return self._decode(column, group)

        return _decoded.get((self._key, group, self._places[column]), decode)

    def _decode(self, name: str, group: int) -> MappedColumn:
        column, samples = self._columns[name], int(self._samples[group])
        per_batch = max(1, min(samples, _BATCH_BYTES // sample_bytes(column)))
        batches = self._file.reader.iter_batches(
            per_batch, row_groups=[group], column_indices=[self._places[name]], use_threads=False
        )
        values, lengths = _joined(self._path, (batch.column(0) for batch in batches), column)
        rows = len(values) if lengths is None else len(lengths)
        if rows != samples:
            raise _other(self._path, f"{samples} samples in row group {group}", f"{rows}")
        if lengths is None:
            return MappedColumn(values)
        return MappedColumn(values, np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)]))


def _offsets(column: MappedColumn) -> Positions:
    if column.offsets is None:
        raise ValueError("a column of fixed length has no lengths")
    return column.offsets


# --- what is decoded -------------------------------------------------------------------------------------------------


def _joined(path: Path, arrays: Iterator[Any], column: AnyColumn) -> tuple[Array, Positions | None]:
    """All samples, and their lengths where those vary; counted as they come."""
    values: list[Array] = [np.empty((0, *column.shape), numpy_dtype(column))]
    lengths: list[Positions] = [np.empty(0, np.int64)]
    total = 0
    for array in arrays:
        if array.null_count:
            raise _other(path, "samples without nulls", f"{array.null_count} of {len(array)}")
        found, sizes = _plain(path, array, column, spare_bytes=MAX_GROUP_BYTES - total)
        total += found.nbytes
        if total > MAX_GROUP_BYTES:
            raise _bomb(path, total)
        values.append(found)
        if sizes is not None:
            lengths.append(sizes)
    return np.concatenate(values), np.concatenate(lengths) if column.variable_length else None


def _plain(path: Path, array: Any, column: AnyColumn, *, spare_bytes: int) -> tuple[Array, Positions | None]:
    """An Arrow array as NumPy's: its values, and the samples' lengths where those vary."""
    if not column.variable_length:
        return _leaf(path, array, depth=len(column.shape)).reshape(len(array), *column.shape), None
    if not pa.types.is_dictionary(array.type):
        return _leaf(path, array, depth=1), np.diff(array.offsets.to_numpy()).astype(np.int64)
    # Strings stay in their dictionary until it is known how large they are without it.
    words, rows = array.dictionary.cast(pa.large_binary()), array.indices.to_numpy().astype(np.int64)
    if len(rows) and not 0 <= rows.min() <= rows.max() < len(words):
        raise _other(path, f"words of a dictionary of {len(words)}", f"word {rows.max()}, or {rows.min()}")
    _, bounds, content = words.buffers()
    offsets = np.frombuffer(bounds, np.int64, len(words) + 1, words.offset * 8) if len(words) else np.zeros(1, np.int64)
    lengths = np.diff(offsets).take(rows)
    if (total := int(lengths.sum())) > spare_bytes:
        raise _bomb(path, total)
    values = np.empty(total, np.uint8)
    if total:
        gather_items(np.frombuffer(content, np.uint8), offsets, rows, values)
    return values, lengths


def _leaf(path: Path, array: Any, *, depth: int) -> Array:
    for _ in range(depth):
        array = array.flatten()
        if array.null_count:
            raise _other(path, "items without nulls", f"{array.null_count} of {len(array)}")
    found: Array = array.to_numpy(zero_copy_only=False)
    return found


class Decoded:
    """Decoded columns of row groups; those that were not used for longest make room."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._held: OrderedDict[tuple[int, int, int], MappedColumn] = OrderedDict()
        self._lock = threading.Lock()
        self.bytes = 0

    def get(self, key: tuple[int, int, int], decode: Callable[[], MappedColumn]) -> MappedColumn:
        """What is held, else what `decode` gives; two threads may both decode."""
        with self._lock:
            if key in self._held:
                self._held.move_to_end(key)
                return self._held[key]
        found = decode()
        with self._lock:
            self._drop(key)
            self._held[key] = found
            self.bytes += _size(found)
            while self.bytes > self._max_bytes and len(self._held) > 1:
                self._drop(next(iter(self._held)))
        return found

    def forget(self, reader: int) -> None:
        """Drop what a reader decoded."""
        with self._lock:
            for key in [key for key in self._held if key[0] == reader]:
                self._drop(key)

    def _drop(self, key: tuple[int, int, int]) -> None:
        gone = self._held.pop(key, None)
        self.bytes -= 0 if gone is None else _size(gone)


def _size(column: MappedColumn) -> int:
    return column.values.nbytes + (0 if column.offsets is None else column.offsets.nbytes)


_decoded: Final = Decoded(KEPT_BYTES)
_keys: Final = itertools.count()


# --- the footer ------------------------------------------------------------------------------------------------------


def _check_tail(path: Path, data: Bytes) -> None:
    tail = data[-_TAIL_BYTES:].tobytes()
    length = int.from_bytes(tail[:4], "little")
    if tail[4:] != b"PAR1" or len(tail) < _TAIL_BYTES:
        raise _other(path, "a Parquet file", f"one that ends with {tail[4:]!r}")
    if length > min(len(data), _MAX_FOOTER_BYTES):
        raise _other(path, f"a footer of at most {min(len(data), _MAX_FOOTER_BYTES)} bytes", f"one of {length}")


def _opened(path: Path, data: Bytes, columns: Mapping[str, AnyColumn]) -> Any:
    source = pa.BufferReader(pa.py_buffer(data))
    limits: dict[str, Any] = dict.fromkeys(
        ("thrift_string_size_limit", "thrift_container_size_limit"), _MAX_FOOTER_BYTES
    )
    metadata = pq.ParquetFile(source, pre_buffer=False, **limits).metadata
    leaves = [metadata.schema.column(number) for number in range(metadata.num_columns)]
    if sorted(leaf.path.partition(".")[0] for leaf in leaves) != sorted(name.partition(".")[0] for name in columns):
        raise _other(path, f"columns {sorted(columns)}", f"{[leaf.path for leaf in leaves]}")
    words = [leaf.path for leaf in leaves if leaf.physical_type == "BYTE_ARRAY"]
    return pq.ParquetFile(source, metadata=metadata, read_dictionary=words, pre_buffer=False, **limits)


def _check_footer(path: Path, file: Any, columns: Mapping[str, AnyColumn], samples: list[int]) -> None:
    found = dict(zip(file.schema_arrow.names, file.schema_arrow.types, strict=True))
    if found.keys() != columns.keys() or file.metadata.num_columns != len(columns):
        raise _other(path, f"columns {sorted(columns)}", f"{sorted(found)}")
    for name, column in columns.items():
        if not _is_of(found[name], column):
            raise _other(path, f"column {name} of {column.dtype}{list(column.shape)}", f"{found[name]}")
    groups = [file.metadata.row_group(number) for number in range(file.metadata.num_row_groups)]
    if [group.num_rows for group in groups] != samples:
        raise _other(path, f"row groups of {samples} samples", f"{[group.num_rows for group in groups]}")
    for number, group in enumerate(groups):
        _check_chunks(file, number)
        for place, name in enumerate(file.schema_arrow.names):
            size = _claimed_bytes(group.column(place), columns[name], samples=group.num_rows)
            if size > MAX_GROUP_BYTES:
                raise _bomb(path, size)


def _check_chunks(file: Any, group: int) -> None:
    """Let pyarrow look at a row group's footer where it can raise: from `column()` a fault ends the process.

    No sample is decoded. Raises what pyarrow raises.
    """
    for _ in file.reader.iter_batches(0, row_groups=[group], use_threads=False):
        break


def _claimed_bytes(chunk: Any, column: AnyColumn, *, samples: int) -> int:
    """What a column of a row group says that it decodes to."""
    item = sample_bytes(column) if column.variable_length else sample_bytes(column) // max(1, math.prod(column.shape))
    fixed = 0 if column.variable_length else samples * sample_bytes(column)
    return max(fixed, int(chunk.num_values) * item, int(chunk.total_uncompressed_size))


def _is_of(kind: Any, column: AnyColumn) -> bool:
    """Whether an Arrow type is how a column is stored."""
    if column.variable_length:
        if pa.types.is_dictionary(kind):
            return column.dtype == "uint8"
        if not (pa.types.is_list(kind) or pa.types.is_large_list(kind)):
            return False
        kind = kind.value_type
    for length in column.shape:
        if not (pa.types.is_fixed_size_list(kind) and kind.list_size == length):
            return False
        kind = kind.value_type
    return bool(kind == pa.from_numpy_dtype(numpy_dtype(column)))


# --- faults ----------------------------------------------------------------------------------------------------------


@contextmanager
def _faults(path: Path) -> Iterator[None]:
    """Turn what pyarrow says of a damaged file into ShardCorrupt."""
    try:
        yield
    except (pa.ArrowException, OSError, ValueError) as exc:
        raise _other(path, "a Parquet file that can be decoded", f"{type(exc).__name__}: {exc}"[:500]) from exc


def _bomb(path: Path, size: int) -> ShardCorrupt:
    return _other(path, f"a row group that decodes to at most {MAX_GROUP_BYTES} bytes a column", f"{size} bytes")


def _other(path: Path, expected: str, actual: str) -> ShardCorrupt:
    return ShardCorrupt(path=str(path), expected=expected, actual=actual)

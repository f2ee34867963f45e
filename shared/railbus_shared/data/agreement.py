"""What a schema and an index must say for anything to be read through them. Pure: it looks at no file.

An index that passes names extents that lie within their files, do not overlap, fit their dtypes and hold exactly the
samples of the schema's columns. So a reader maps them without asking again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Final

from railbus_shared.data.dtypes import ITEM_BYTES, sample_bytes

if TYPE_CHECKING:
    from railbus_shared.data.plain import (
        AnyColumn,
        AnyColumnExtent,
        AnyIndex,
        AnySchema,
        AnyShard,
        AnySidecar,
        AnySplit,
    )

_MAX_AXES: Final = 32
_MAX_SAMPLE_BYTES: Final = 1 << 40
_OFFSET_BYTES: Final = 8
_MIN_NPY_HEADER_BYTES: Final = 10

Problem = tuple[str, str]
"""Of which field of a shard, and what."""


def schema_problems(schema: AnySchema) -> Iterator[str]:
    """What a schema says that no shard can hold."""
    for name, column in schema.columns.items():
        if 0 in column.shape or len(column.shape) > _MAX_AXES:
            yield (
                f"field 'columns.{name}.shape' has value {list(column.shape)}: "
                f"expected at most {_MAX_AXES} lengths, none of them 0"
            )
        if sample_bytes(column) > _MAX_SAMPLE_BYTES:
            yield f"field 'columns.{name}.shape' has value {list(column.shape)}: more than {_MAX_SAMPLE_BYTES} bytes"
        if column.labels and column.num_classes not in {None, len(column.labels)}:
            yield (
                f"field 'columns.{name}.num_classes' has value {column.num_classes}, "
                f"but there are {len(column.labels)} labels"
            )
        if schema.payload == "parquet" and column.variable_length and column.shape:
            yield f"field 'columns.{name}.shape' has value {list(column.shape)}: in Parquet an item has no axes"
    yield from _single_column_problems(schema)


def _single_column_problems(schema: AnySchema) -> Iterator[str]:
    if schema.payload not in {"npy", "raw"}:
        return
    is_raw = schema.payload == "raw"
    if len(schema.columns) != 1 or any(column.variable_length != is_raw for column in schema.columns.values()):
        kind = "variable" if is_raw else "fixed"
        yield (
            f"field 'columns' has {sorted(schema.columns)}: "
            f"payload {schema.payload!r} holds exactly one column, of {kind} length"
        )


def index_problems(schema: AnySchema, file: AnyIndex, schema_sha256: str) -> Iterator[str]:
    """Where schema and index do not hold together, in words."""
    if file.schema_sha256 != schema_sha256:
        yield f"field 'schema_sha256' has value {file.schema_sha256!r}, but schema.json has {schema_sha256!r}"
    if (file.dataset, file.payload) != (schema.name, schema.payload):
        yield f"it is of {file.dataset!r} ({file.payload}), but schema.json of {schema.name!r} ({schema.payload})"
    names = [shard.file for shard in file.shards] + [one.sidecar.file for one in file.shards if one.sidecar is not None]
    if len(set(names)) != len(names):
        yield "field 'shards' names a file twice"
    first = 0
    shards: Sequence[AnyShard] = file.shards
    for number, shard in enumerate(shards):
        if shard.first_sample != first:
            yield f"field 'shards.{number}.first_sample' has value {shard.first_sample}, expected {first}"
        first += shard.samples
        for where, problem in _shard_problems(schema, shard):
            yield f"field 'shards.{number}.{where}' {problem}"
    if first != file.samples:
        yield f"field 'samples' has value {file.samples}, but the shards hold {first}"
    if (total := sum(shard.bytes for shard in file.shards)) != file.bytes:
        yield f"field 'bytes' has value {file.bytes}, but the shards have {total}"
    for name, split in schema.splits.items():
        yield from _split_problems(name, split, file.samples)


def _split_problems(name: str, split: AnySplit, samples: int) -> Iterator[str]:
    end = 0
    for run in split.runs:
        if run.first < end:
            yield f"field 'splits.{name}.ranges' of schema.json has sample {run.first} after sample {end - 1}"
        end = run.first + run.samples
    if end > samples:
        yield f"field 'splits.{name}' of schema.json ends at sample {end}, but the shards hold {samples}"
    if split.first != split.runs[0].first:
        yield f"field 'splits.{name}.first' of schema.json has value {split.first}, but its ranges begin elsewhere"
    if split.samples != (total := sum(run.samples for run in split.runs)):
        yield f"field 'splits.{name}.samples' of schema.json has value {split.samples}, but its ranges hold {total}"


def _shard_problems(schema: AnySchema, shard: AnyShard) -> Iterator[Problem]:
    if shard.bytes == 0:
        yield "bytes", "has value 0: a shard is no empty file"
    if (shard.sidecar is not None) != (schema.payload == "raw"):
        yield (
            "sidecar",
            f"is {'missing' if shard.sidecar is None else 'there'}: only payload 'raw' has one, in each shard",
        )
        return
    if schema.payload == "parquet":
        yield from _parquet_problems(shard)
        return
    if shard.row_groups:
        yield "row_groups", "is there: only a Parquet file has any"
    if shard.columns.keys() != schema.columns.keys():
        yield "columns", f"has {sorted(shard.columns)}, but the schema {sorted(schema.columns)}"
        return
    for name, extent in shard.columns.items():
        for where, problem in _extent_problems(schema.columns[name], extent, shard.samples):
            yield f"columns.{name}.{where}", problem
    yield from _place_problems(schema, shard)


def _parquet_problems(shard: AnyShard) -> Iterator[Problem]:
    if shard.columns:
        yield "columns", f"has {sorted(shard.columns)}, but a Parquet file tells its own layout"
    if (total := sum(group.samples for group in shard.row_groups)) != shard.samples:
        yield "row_groups", f"has {total} samples, but the shard {shard.samples}"


def _extent_problems(column: AnyColumn, extent: AnyColumnExtent, samples: int) -> Iterator[Problem]:
    """Whether a column has the sizes that its samples need, and lies where its dtype may."""
    size = sample_bytes(column)
    if extent.offset % ITEM_BYTES[column.dtype]:
        yield "offset", f"has value {extent.offset}, no multiple of the size of {column.dtype}"
    if not column.variable_length:
        if extent.bytes != size * samples:
            yield "bytes", f"has value {extent.bytes}, expected {size * samples}"
        if extent.offsets is not None:
            yield "offsets", "is there, but the column has fixed length"
        return
    if extent.bytes % size:
        yield "bytes", f"has value {extent.bytes}, no multiple of an item's {size}"
    if extent.offsets is None:
        yield "offsets", "is missing, but the column has variable length"
        return
    if extent.offsets.bytes != (expected := _OFFSET_BYTES * (samples + 1)):
        yield "offsets.bytes", f"has value {extent.offsets.bytes}, expected {expected}"
    if extent.offsets.offset % _OFFSET_BYTES:
        yield "offsets.offset", f"has value {extent.offsets.offset}, no multiple of {_OFFSET_BYTES}"


def _place_problems(schema: AnySchema, shard: AnyShard) -> Iterator[Problem]:
    """Whether every extent lies within its file, and no two overlap."""
    places = []
    for name, extent in shard.columns.items():
        places.append((extent.offset, extent.offset + extent.bytes, f"columns.{name}.offset"))
        if extent.offsets is not None and shard.sidecar is None:
            found = extent.offsets
            places.append((found.offset, found.offset + found.bytes, f"columns.{name}.offsets.offset"))
    before = 0
    for start, end, where in sorted(places):
        if end > shard.bytes:
            yield where, f"has value {start}: {end - start} bytes from there end beyond the file's {shard.bytes}"
        if start < before:
            yield where, f"has value {start}, but the bytes before {before} belong to another column"
        before = max(before, end)
    if schema.payload == "npy" and (before != shard.bytes or places[0][0] < _MIN_NPY_HEADER_BYTES):
        yield places[0][2], f"has value {places[0][0]}: the array has to lie behind a header and end with the file"
    if shard.sidecar is not None:
        yield from _raw_problems(places[0], shard, shard.sidecar)


def _raw_problems(values: tuple[int, int, str], shard: AnyShard, sidecar: AnySidecar) -> Iterator[Problem]:
    start, end, where = values
    if (start, end) != (0, shard.bytes):
        yield where, f"has value {start}: the values have to be the whole file of {shard.bytes} bytes"
    for extent in shard.columns.values():
        if extent.offsets is not None and (extent.offsets.offset, extent.offsets.bytes) != (0, sidecar.bytes):
            yield "sidecar.bytes", f"has value {sidecar.bytes}: the offsets have to be the whole file"

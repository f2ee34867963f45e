"""Which writer makes the shards of a payload, and what a schema must be like for it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from railbus_shared.contracts.artifacts import DatasetSchema, Shard
from railbus_shared.data import array_writers, container
from railbus_shared.data.chunks import max_sample_bytes
from railbus_shared.data.index import schema_problems
from railbus_shared.data.slices import Slices
from railbus_shared.data.spreading import Weights
from railbus_shared.errors import SchemaInvalid


class WriteShard(Protocol):
    """Writes one shard out of the spool; equal samples give equal bytes."""

    def __call__(self, path: Path, schema: DatasetSchema, slices: Slices, /, *, first: int) -> Shard: ...


def writer_of(schema: DatasetSchema) -> WriteShard:
    """The writer for the schema's payload; raises ConfigError if it needs a package that is not installed."""
    match schema.payload:
        case "columns":
            return container.write_shard
        case "npy":
            return array_writers.write_npy
        case "raw":
            return array_writers.write_raw
        case "parquet":
            from railbus_shared.data import parquet_writer  # noqa: PLC0415  (pyarrow is an extra)

            return parquet_writer.write_shard


def library(schema: DatasetSchema) -> str:
    """The library, with its version, that decides about the bytes of shards; empty where none does."""
    if schema.payload != "parquet":
        return ""
    from railbus_shared.data import parquet_writer  # noqa: PLC0415  (pyarrow is an extra)

    return parquet_writer.library()


def check_schema(schema: DatasetSchema) -> None:
    """Raises SchemaInvalid if no shard can hold what the schema says."""
    for problem in (*schema_problems(schema), *_problems(schema)):
        raise SchemaInvalid(problem, hint="change the schema")


def _problems(schema: DatasetSchema) -> Iterator[str]:
    size = Weights.of(schema).fixed
    if size > (most := max_sample_bytes(schema)):
        yield f"field 'columns' has {size} bytes a sample: a sample takes at most {most} bytes of a shard"

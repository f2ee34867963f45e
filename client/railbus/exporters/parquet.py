"""Parquet: fixed shapes are lists of fixed length in each other; classes are told the way Hugging Face tells them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from railbus.exporters.exporter import ExportOptions, is_file, is_text
from railbus.importers.arrow_columns import ENCODING, pyarrow
from railbus.importers.source import Array, Values
from railbus.reading_rows import Rows, as_numbers
from railbus_shared.contracts.artifacts import Column
from railbus_shared.data.ragged import Ragged
from railbus_shared.data.readers import numpy_dtype


def write_parquet(rows: Rows, target: Path, options: ExportOptions) -> None:
    """One file."""
    pa = pyarrow()
    from pyarrow import parquet  # noqa: PLC0415 - an extra

    fields = [
        pa.field(name, _kind(pa, column), metadata={ENCODING: column.encoding} if column.encoding else None)
        for name, column in rows.columns.items()
    ]
    schema = pa.schema(fields, metadata=_metadata(rows.columns))
    with parquet.ParquetWriter(target, schema) as writer:
        for chunk in rows.chunks(report=options.report):
            arrays = [_array(pa, rows.columns[name], values) for name, values in chunk.items()]
            writer.write_table(pa.table(arrays, schema=schema))


def _kind(pa: Any, column: Column) -> Any:
    if is_text(column):
        return pa.large_string() if column.encoding == "utf-8" else pa.large_binary()
    if is_file(column):
        return pa.large_binary()
    dtype = np.dtype(np.float32) if column.dtype == "bfloat16" else numpy_dtype(column)
    kind = pa.from_numpy_dtype(dtype)
    for length in reversed(column.shape):
        kind = pa.list_(kind, length)
    return pa.large_list(kind) if column.variable_length else kind


def _array(pa: Any, column: Column, values: Values) -> Any:
    if not isinstance(values, Ragged):
        return _nested(pa, as_numbers(values, column), column.shape)
    offsets = pa.array(values.offsets)
    if is_text(column) or is_file(column):
        buffers = [None, pa.py_buffer(values.offsets), pa.py_buffer(np.ascontiguousarray(values.values))]
        return pa.Array.from_buffers(_kind(pa, column), len(values), buffers)
    return pa.LargeListArray.from_arrays(offsets, _nested(pa, as_numbers(values.values, column), column.shape))


def _nested(pa: Any, values: Array, shape: tuple[int, ...]) -> Any:
    found = pa.array(np.ascontiguousarray(values).reshape(-1))
    for at in range(len(shape) - 1, -1, -1):
        found = pa.FixedSizeListArray.from_arrays(found, shape[at])
    expected = len(values) if shape else math.prod(values.shape)
    return found.slice(0, expected)


def _metadata(columns: Mapping[str, Column]) -> dict[bytes, bytes] | None:
    """Classes, as the features that Hugging Face reads out of a file; it finds the other columns' by itself."""
    classes = {
        name: {"names": list(column.labels), "_type": "ClassLabel"}
        for name, column in columns.items()
        if column.labels and not column.shape and column.dtype == "int64"
    }
    return {b"huggingface": json.dumps({"info": {"features": classes}}).encode()} if classes else None

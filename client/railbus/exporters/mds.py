"""MosaicML MDS: shards and an `index.json` that their reader takes; see `importers/mds_encoding.py` for the bytes."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Final

import numpy as np

from railbus.exporters.exporter import ExportOptions, is_file, is_text
from railbus.importers.mds_encoding import ARRAY_DTYPES, array_head, fixed_size
from railbus.importers.source import Array, Values, num_samples
from railbus.reading_rows import Rows, as_numbers
from railbus_shared.contracts.artifacts import Column
from railbus_shared.data.ragged import Ragged
from railbus_shared.errors import InvalidField

_MAX_SHARD_BYTES: Final = 2**32 - 1
"""Offsets have 32 bits."""


def write_mds(rows: Rows, target: Path, options: ExportOptions) -> None:
    """A folder of one split."""
    target.mkdir(parents=True)
    names = sorted(rows.columns)
    encodings = [_encoding(rows.columns[name]) for name in names]
    writer = _Writer(target, names, encodings, size_limit=min(options.shard_bytes, _MAX_SHARD_BYTES))
    for chunk in rows.chunks(report=options.report):
        columns = [_encoded(name, rows.columns[name], chunk[name]) for name in names]
        for at in range(num_samples(chunk)):
            writer.add([column[at] for column in columns])
    writer.close()


class _Writer:
    """Gathers samples until a shard is full; holds one shard in memory, which is 64 MB unless asked otherwise."""

    def __init__(self, folder: Path, names: list[str], encodings: list[str], *, size_limit: int) -> None:
        self._folder = folder
        self._sizes = [fixed_size(encoding) for encoding in encodings]
        self._about: dict[str, Any] = {
            "column_encodings": encodings,
            "column_names": names,
            "column_sizes": self._sizes,
            "compression": None,
            "format": "mds",
            "hashes": ["sha256"],
            "size_limit": size_limit,
            "version": 2,
        }
        self._head = json.dumps(self._about, sort_keys=True).encode()
        self._samples: list[bytes] = []
        self._size = len(self._head) + 8
        self._shards: list[dict[str, Any]] = []

    def add(self, parts: list[bytes]) -> None:
        sizes = [len(part) for part, size in zip(parts, self._sizes, strict=True) if size is None]
        sample = np.array(sizes, "<u4").tobytes() + b"".join(parts)
        if self._samples and self._size + len(sample) + 4 > self._about["size_limit"]:
            self._flush()
        if self._size + len(sample) + 4 > _MAX_SHARD_BYTES:
            raise InvalidField(field="samples", value=len(sample), problem="a sample too large for MDS, in bytes")
        self._samples.append(sample)
        self._size += len(sample) + 4

    def _flush(self) -> None:
        ends = np.cumsum([0, *map(len, self._samples)]) + 4 * (len(self._samples) + 2) + len(self._head)
        name = f"shard.{len(self._shards):05d}.mds"
        data = [np.array([len(self._samples)], "<u4").tobytes(), ends.astype("<u4").tobytes(), self._head]
        digest = hashlib.sha256()
        with (self._folder / name).open("wb") as file:
            for part in (*data, *self._samples):
                file.write(part)
                digest.update(part)
            size = file.tell()
        raw = {"basename": name, "bytes": size, "hashes": {"sha256": digest.hexdigest()}}
        self._shards.append({**self._about, "raw_data": raw, "samples": len(self._samples), "zip_data": None})
        self._samples, self._size = [], len(self._head) + 8

    def close(self) -> None:
        self._flush()
        index = {"shards": self._shards, "version": 2}
        (self._folder / "index.json").write_text(json.dumps(index, sort_keys=True))


def _encoding(column: Column) -> str:
    """How MDS calls a column; it knows no truth values and no bfloat16."""
    if is_text(column):
        return "str" if column.encoding == "utf-8" else "json"
    if is_file(column):
        return column.encoding if column.encoding in {"jpeg", "png"} else "bytes"
    dtype = _dtype(column)
    if column.variable_length:
        return f"ndarray:{dtype}"
    return f"ndarray:{dtype}:{','.join(map(str, column.shape))}" if column.shape else dtype


def _dtype(column: Column) -> str:
    return {"bool": "uint8", "bfloat16": "float32"}.get(column.dtype, column.dtype)


def _encoded(name: str, column: Column, values: Values) -> list[bytes]:
    """Samples of a column as their bytes."""
    if isinstance(values, Ragged) and (is_text(column) or is_file(column)):
        return [values[row].tobytes() for row in range(len(values))]
    if _dtype(column) not in ARRAY_DTYPES:
        raise InvalidField(field=f"columns.{name}", value=column.dtype, problem="no type that MDS knows")
    if not isinstance(values, Ragged):
        return [_plain(one, column).tobytes() for one in values]
    parts = [_plain(values[row], column) for row in range(len(values))]
    if any(part.size == 0 for part in parts):
        raise InvalidField(
            field=f"columns.{name}", value=[], problem="MDS has no empty arrays", hint="export to parquet or npz"
        )
    return [array_head(part.shape) + part.tobytes() for part in parts]


def _plain(value: Array, column: Column) -> Array:
    return np.ascontiguousarray(as_numbers(np.asarray(value), column).astype(_dtype(column), copy=False))

"""Small real datasets on disk, for tests of what reads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from railbus_shared.contracts.artifacts import Column, DatasetSchema, Split
from railbus_shared.data.index import DatasetIndex
from railbus_shared.data.readers import ShardReader, numpy_dtype, open_shard
from railbus_shared.data.writer import write_dataset
from railbus_shared.layout import Layout

Arrays = dict[str, npt.NDArray[Any]]


def arrays(samples: int) -> Arrays:
    """Columns in which every sample tells its own number: `x` float32 (2, 3), `id` int64, `flag` bool."""
    ids = np.arange(samples, dtype=np.int64)
    x = (ids[:, None, None] * 10 + np.arange(6).reshape(2, 3)).astype(np.float32)
    return {"x": x, "id": ids, "flag": ids % 3 == 0}


def schema(samples: int, *, name: str = "d", test: int = 0) -> DatasetSchema:
    """Of `arrays`: split `train`, and the last `test` samples as split `test`."""
    splits = {"train": Split(first=0, samples=samples - test)}
    if test:
        splits["test"] = Split(first=samples - test, samples=test)
    columns = {
        "x": Column(dtype="float32", shape=(2, 3)),
        "id": Column(dtype="int64", shape=()),
        "flag": Column(dtype="bool", shape=()),
    }
    return DatasetSchema(name=name, columns=columns, splits=splits)


def write(layout: Layout, samples: int, *, name: str = "d", num_shards: int = 1, test: int = 0) -> DatasetIndex:
    """`arrays` as a dataset in so many shards."""
    held = arrays(samples)
    size = sum(array.nbytes for array in held.values())
    found = write_dataset(layout, schema(samples, name=name, test=test), [held], shard_bytes=-(-size // num_shards))
    assert len(found.file.shards) == num_shards
    return found


def read(layout: Layout, index: DatasetIndex) -> Arrays:
    """All columns of fixed length, their shards joined."""
    shards = [
        read_shard(open_shard(layout.shards(index.schema.name) / shard.file, index, number), index, number)
        for number, shard in enumerate(index.file.shards)
    ]
    return {name: np.concatenate([shard[name] for shard in shards]) for name in shards[0]}


def read_shard(reader: ShardReader, index: DatasetIndex, number: int) -> Arrays:
    """All columns of fixed length of a shard."""
    rows = np.arange(index.file.shards[number].samples, dtype=np.int64)
    found: Arrays = {}
    for name, column in index.schema.columns.items():
        if not column.variable_length:
            found[name] = np.empty((len(rows), *column.shape), numpy_dtype(column))
            reader.take(name, rows, found[name])
    return found


def flip(path: Path, *, at: int = -1) -> None:
    """Damage one byte of a file, in place."""
    data = bytearray(path.read_bytes())
    data[at] ^= 0xFF
    path.write_bytes(data)

"""Small real datasets on disk, for tests of what reads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from railbus_shared import files
from railbus_shared.contracts.artifacts import Column, DatasetSchema, IndexFile, Split
from railbus_shared.contracts.requests import OpenedStream
from railbus_shared.data.index import DatasetIndex
from railbus_shared.data.readers import ShardReader, numpy_dtype, open_shard
from railbus_shared.data.shard_paths import ShardPaths
from railbus_shared.data.writer import write_dataset
from railbus_shared.layout import Layout, shard_name

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


def write_many(layout: Layout, num_shards: int) -> DatasetIndex:
    """A dataset `d` of so many shards, each a sample of one byte; all are links to the same file."""
    described = DatasetSchema(
        name="d",
        columns={"x": Column(dtype="uint8", shape=())},
        splits={"train": Split(first=0, samples=num_shards)},
    )
    one = write_dataset(
        layout, described.changed(splits={"train": Split(first=0, samples=1)}), [{"x": np.zeros(1, np.uint8)}]
    ).file.shards[0]
    folder = layout.shards("d")
    for number in range(1, num_shards):
        (folder / shard_name(number)).hardlink_to(folder / one.file)
    shards = [one.model_copy(update={"file": shard_name(n), "first_sample": n}) for n in range(num_shards)]
    files.write_whole(layout.schema("d"), files.to_json(described.to_map()))
    index = IndexFile(
        dataset="d",
        schema_sha256=files.sha256_file(layout.schema("d")),
        samples=num_shards,
        bytes=num_shards * one.bytes,
        shards=tuple(shards),
    )
    files.write_whole(layout.index("d"), files.to_json(index.to_map()))
    return DatasetIndex.load(layout.dataset("d"))


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


def opened_paths(opened: OpenedStream) -> ShardPaths:
    """Where the shards of an opened stream lie, as a trainer finds them."""
    index = DatasetIndex.read_exactly(Path(opened.schema_path), Path(opened.index_path), sha256=opened.index_sha256)
    return ShardPaths(index.file, Path(opened.shards_path), is_cached=opened.is_cached)


def verified(opened: OpenedStream) -> list[bool]:
    """Which shards of an opened stream may be mapped at once."""
    known = {number for one in opened.verified for number in range(one.first, one.first + one.shards)}
    return [number in known for number in range(opened.num_shards)]


def flip(path: Path, *, at: int = -1) -> None:
    """Damage one byte of a file, in place."""
    data = bytearray(path.read_bytes())
    data[at] ^= 0xFF
    path.write_bytes(data)

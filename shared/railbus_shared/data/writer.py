"""Writing a dataset: streamed, deterministic, whole or not at all.

Chunks of samples are spooled column by column into hidden files, so that memory holds one chunk and disk for a while
twice the data; then the shards are assembled, spread evenly, and hashed while they are written. `schema.json` follows,
and `index.json` is the commit: without it the dataset does not exist, and what a crash left is removed by the next try.
Writers of one dataset wait for each other.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from railbus_shared import files
from railbus_shared.contracts.artifacts import Column, DatasetSchema, IndexFile, Shard
from railbus_shared.data.container import write_shard
from railbus_shared.data.index import DatasetIndex, sample_bytes, schema_problems
from railbus_shared.data.readers import numpy_dtype
from railbus_shared.errors import Conflict, InvalidField, NotSupported, SchemaInvalid
from railbus_shared.layout import Layout, shard_name

logger = logging.getLogger(__name__)

SHARD_BYTES: Final = 512 << 20

Chunk = Mapping[str, npt.NDArray[Any]]


def write_dataset(
    layout: Layout, schema: DatasetSchema, chunks: Iterable[Chunk], *, shard_bytes: int = SHARD_BYTES
) -> DatasetIndex:
    """Write a dataset of payload `columns` and return its index.

    Each chunk maps every column to an array of shape (samples, *shape); how samples are cut into chunks changes
    nothing. A dataset that is there with the same content stays, and shards of it that are damaged are written anew.
    Raises Conflict if it is there with other content, InvalidField for a chunk that does not fit the schema,
    SchemaInvalid, NotSupported, StorageFull.
    """
    _check_schema(schema)
    schema_bytes = files.to_json(schema.to_map())
    with _folder(layout, schema.name) as folder, _spool(folder) as spool:
        _check_existing(layout, schema.name, schema_bytes)
        columns = _Columns(spool, schema)
        for chunk in chunks:
            columns.add(chunk)
        _check_splits(schema, columns.samples)
        staged = spool / "shards"
        staged.mkdir()
        shards = list(_write_shards(columns, staged, shard_bytes=shard_bytes))
        return _commit(layout, schema, schema_bytes, shards=shards, staged=staged)


def _check_schema(schema: DatasetSchema) -> None:
    if schema.payload != "columns":
        raise NotSupported(
            f"field 'payload' has value {schema.payload!r}: this version writes 'columns' only",
            hint="leave the field out",
        )
    for problem in schema_problems(schema):
        raise SchemaInvalid(problem, hint="change the schema")


@contextlib.contextmanager
def _folder(layout: Layout, name: str) -> Iterator[Path]:
    """The dataset's folder, for one writer at a time; rid of what a crash left, and removed if it stays empty."""
    folder = layout.dataset(name)
    lock = layout.state / "imports" / f"{name}.lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    with files.storage_errors(folder), lock.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        folder.mkdir(parents=True, exist_ok=True)
        try:
            files.remove_litter(folder)
            yield folder
        finally:
            if not any(folder.iterdir()):
                folder.rmdir()


@contextlib.contextmanager
def _spool(folder: Path) -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix=".import-", dir=folder))
    try:
        yield path
    finally:
        shutil.rmtree(path)


class _Columns:
    """Columns that grow in one hidden file each."""

    def __init__(self, folder: Path, schema: DatasetSchema) -> None:
        self.paths = {name: folder / f"{name}.column" for name in schema.columns}
        self.schema = schema
        self.samples = 0

    def add(self, chunk: Chunk) -> None:
        if chunk.keys() != self.schema.columns.keys():
            raise InvalidField(
                field="columns",
                value=sorted(chunk),
                problem="not the columns of the schema",
                hint=f"give {', '.join(sorted(self.schema.columns))}",
            )
        arrays = {name: _fitting(name, column, chunk[name]) for name, column in self.schema.columns.items()}
        lengths = {name: len(array) for name, array in arrays.items()}
        if len(set(lengths.values())) != 1:
            raise InvalidField(field="columns", value=lengths, problem="columns of different lengths")
        for name, array in arrays.items():
            with self.paths[name].open("ab") as file:
                file.write(array.data if array.size else b"")
        self.samples += next(iter(lengths.values()))


def _fitting(name: str, column: Column, array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """The array laid out row by row; raises InvalidField if it is not what the schema says."""
    if array.ndim == 0 or array.dtype != numpy_dtype(column) or array.shape[1:] != column.shape:
        raise InvalidField(
            field=f"columns.{name}",
            value=f"{array.dtype}{list(array.shape)}",
            problem=f"the schema says {column.dtype}[samples{''.join(f', {length}' for length in column.shape)}]",
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


def _check_splits(schema: DatasetSchema, samples: int) -> None:
    if samples == 0:
        raise InvalidField(field="samples", value=0, problem="a dataset has at least one sample")
    for name, split in schema.splits.items():
        if split.first + split.samples > samples:
            raise InvalidField(
                field=f"splits.{name}", value=split.first + split.samples, problem=f"there are only {samples} samples"
            )


def shard_sizes(samples: int, *, bytes_per_sample: int, shard_bytes: int) -> list[int]:
    """Samples of each shard: as many shards as full ones would be, rounded, and the samples spread evenly.

    So where there are several, each has 3/4 to 5/4 of `shard_bytes`, up to one sample; a single one up to 3/2 of it.
    """
    total = samples * bytes_per_sample
    count = min(samples, max(1, round(total / shard_bytes)))
    return [samples * (i + 1) // count - samples * i // count for i in range(count)]


def _write_shards(columns: _Columns, folder: Path, *, shard_bytes: int) -> Iterator[Shard]:
    per_sample = sum(sample_bytes(column) for column in columns.schema.columns.values())
    sizes = shard_sizes(columns.samples, bytes_per_sample=per_sample, shard_bytes=shard_bytes)
    first = 0
    for number, samples in enumerate(sizes):
        yield write_shard(folder / shard_name(number), columns.schema, columns.paths, first=first, samples=samples)
        first += samples


def _commit(
    layout: Layout, schema: DatasetSchema, schema_bytes: bytes, *, shards: list[Shard], staged: Path
) -> DatasetIndex:
    """Move shards, schema and index into place, the index last."""
    name = schema.name
    file = IndexFile(
        dataset=name,
        schema_sha256=hashlib.sha256(schema_bytes).hexdigest(),
        payload=schema.payload,
        samples=sum(shard.samples for shard in shards),
        bytes=sum(shard.bytes for shard in shards),
        shards=tuple(shards),
    )
    index_bytes = files.to_json(file.to_map())
    index = DatasetIndex.parse(schema_bytes, index_bytes, folder=layout.dataset(name))
    if layout.index(name).exists():
        _repair(layout, index, staged, schema_bytes=schema_bytes, index_bytes=index_bytes)
        return index
    _clear_uncommitted(layout, name)
    for shard in shards:
        (staged / shard.file).rename(layout.shards(name) / shard.file)
    files.fsync_dir(layout.shards(name))
    files.write_whole(layout.schema(name), schema_bytes)
    files.write_new(layout.index(name), index_bytes)
    return index


def _check_existing(layout: Layout, name: str, schema_bytes: bytes) -> None:
    """Raises Conflict before any work if the dataset that is there has another schema."""
    if layout.index(name).exists():
        schema_sha256 = hashlib.sha256(schema_bytes).hexdigest()
        if schema_sha256.encode() not in layout.index(name).read_bytes():
            raise _conflict(name)


def _repair(layout: Layout, index: DatasetIndex, staged: Path, *, schema_bytes: bytes, index_bytes: bytes) -> None:
    """Put right what is damaged of a dataset that is there with the same content; raises Conflict if it is another."""
    name = index.schema.name
    if layout.index(name).read_bytes() != index_bytes:
        raise _conflict(name)
    layout.shards(name).mkdir(exist_ok=True)
    for shard in index.file.shards:
        path = layout.shards(name) / shard.file
        if not path.is_file() or files.sha256_file(path) != shard.sha256:
            logger.warning("shard restored", extra={"path": str(path)})
            (staged / shard.file).replace(path)
            files.fsync_dir(path.parent)
    if not layout.schema(name).is_file() or layout.schema(name).read_bytes() != schema_bytes:
        files.write_whole(layout.schema(name), schema_bytes)


def _conflict(name: str) -> Conflict:
    return Conflict(
        f"dataset {name!r} exists with other content",
        hint="give the new one another name, or remove the folder of the old one; a dataset does not change",
        details={"field": "dataset", "value": name},
    )


def _clear_uncommitted(layout: Layout, name: str) -> None:
    """Remove shards of an import that never wrote its index."""
    if layout.shards(name).exists():
        shutil.rmtree(layout.shards(name))
    layout.shards(name).mkdir()
    files.fsync_dir(layout.dataset(name))

"""`DatasetIndex`: what a dataset is and where its bytes lie, checked before anything is read through it.

Reading is total: whatever lies in the two files gives an index that holds together, or an error that names the file,
the field, the value and the remedy.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Final, TypeVar

import numpy as np
import numpy.typing as npt
import orjson

from railbus_shared.contracts.artifacts import Column, DatasetSchema, IndexFile, Shard, Split
from railbus_shared.contracts.model import Contract
from railbus_shared.errors import (
    DatasetNotFound,
    IndexInvalid,
    NotFound,
    RailbusError,
    SchemaInvalid,
    ShardCorrupt,
    WireError,
)

C = TypeVar("C", bound=Contract)

ITEM_BYTES: Final = {
    "bool": 1, "uint8": 1, "int8": 1, "uint16": 2, "int16": 2, "float16": 2, "bfloat16": 2,
    "uint32": 4, "int32": 4, "float32": 4, "uint64": 8, "int64": 8, "float64": 8,
}  # fmt: skip
"""Size of one element of each dtype."""

_AGAIN: Final = "import the dataset again, or restore the file from a copy"
_MAX_AXES: Final = 32


def sample_bytes(column: Column) -> int:
    """Bytes of one sample of a column."""
    return ITEM_BYTES[column.dtype] * math.prod(column.shape)


@dataclass(frozen=True)
class DatasetIndex:
    """A dataset's schema and index, which agree with each other."""

    schema: DatasetSchema
    file: IndexFile
    sha256: str
    """Of the bytes of `index.json`: the identity of the dataset's content."""

    @classmethod
    def load(cls, directory: Path) -> DatasetIndex:
        """The index of the dataset in a folder of its name; raises DatasetNotFound, SchemaInvalid, IndexInvalid."""
        index = cls.read(directory / "schema.json", directory / "index.json")
        index.check_name(directory.name)
        return index

    @classmethod
    def read(cls, schema_path: Path, index_path: Path) -> DatasetIndex:
        """The index in two files, wherever they lie; raises DatasetNotFound, SchemaInvalid, IndexInvalid."""
        return cls.parse(
            _bytes_of(schema_path, SchemaInvalid), _bytes_of(index_path, IndexInvalid), folder=index_path.parent
        )

    @classmethod
    def parse(cls, schema_bytes: bytes | None, index_bytes: bytes | None, *, folder: Path) -> DatasetIndex:
        """The index in the bytes of two files, None for one that is missing; `folder` is for messages.

        Raises DatasetNotFound, SchemaInvalid, IndexInvalid.
        """
        schema_path, index_path = folder / "schema.json", folder / "index.json"
        if index_bytes is None:
            raise DatasetNotFound(
                f"dataset has value {folder.name!r}: {index_path} is missing, so there is no such dataset",
                hint="`railbus dataset list` shows what there is, `railbus dataset import` makes one",
                details={"field": "dataset", "value": folder.name},
            )
        if schema_bytes is None:
            raise SchemaInvalid(f"{schema_path} is missing, but index.json is there", hint=_AGAIN)
        schema = _parsed(DatasetSchema, schema_bytes, schema_path, SchemaInvalid)
        for problem in schema_problems(schema):
            raise SchemaInvalid(f"{schema_path}: {problem}", hint=_AGAIN, details={"path": str(schema_path)})
        file = _parsed(IndexFile, index_bytes, index_path, IndexInvalid)
        for problem in _problems(schema, file, hashlib.sha256(schema_bytes).hexdigest()):
            raise IndexInvalid(f"{index_path}: {problem}", hint=_AGAIN, details={"path": str(index_path)})
        return cls(schema, file, hashlib.sha256(index_bytes).hexdigest())

    def check_name(self, folder: str) -> None:
        """Raises SchemaInvalid if the dataset lies in a folder of another name: two would share one identity."""
        if self.schema.name != folder:
            raise SchemaInvalid(
                f"field 'name' of schema.json has value {self.schema.name!r}, but its folder is called {folder!r}",
                hint="rename the folder, or import the data under the other name",
                details={"field": "name", "value": self.schema.name},
            )

    def split(self, name: str) -> Split:
        """Raises NotFound, naming the splits that there are."""
        if name not in self.schema.splits:
            raise NotFound(
                f"split has value {name!r}: dataset {self.schema.name!r} has no such split",
                hint=f"it has {', '.join(sorted(self.schema.splits))}",
                details={"field": "split", "value": name},
            )
        return self.schema.splits[name]

    def locate(self, samples: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Shard numbers and rows within them of samples (N,), int64 both (N,).

        Raises ValueError for a sample that does not exist.
        """
        if samples.size and not 0 <= samples.min() <= samples.max() < self.file.samples:
            raise ValueError(f"samples {samples.min()} to {samples.max()} asked for, of {self.file.samples}")
        numbers = np.searchsorted(self._firsts, samples, side="right").astype(np.int64) - 1
        return numbers, samples - self._firsts[numbers]

    @cached_property
    def _firsts(self) -> npt.NDArray[np.int64]:
        return np.array([shard.first_sample for shard in self.file.shards], dtype=np.int64)

    def check_files(self, shards: Path) -> None:
        """Every shard is there with its size; a look at each, no reading.

        Raises IndexInvalid for a shard that is missing, ShardCorrupt for one of another size.
        """
        for shard in self.file.shards:
            path = shards / shard.file
            try:
                size = path.stat().st_size
            except OSError as exc:
                raise IndexInvalid(
                    f"{path} cannot be looked at, but the index names it: {exc.strerror}",
                    hint=_AGAIN,
                    details={"path": str(path)},
                ) from exc
            if size != shard.bytes:
                raise ShardCorrupt(path=str(path), expected=f"{shard.bytes} bytes", actual=f"{size} bytes")


def unreadable(path: Path, exc: OSError, error: type[RailbusError]) -> RailbusError:
    """What to tell of a JSON file that is there and cannot be read."""
    return error(
        f"{path} cannot be read: {exc.strerror}",
        hint="make it a plain file that this user may read",
        details={"path": str(path)},
    )


def _bytes_of(path: Path, error: type[RailbusError]) -> bytes | None:
    """None if there is no such file."""
    try:
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as exc:
        raise unreadable(path, exc, error) from exc


def _parsed(contract: type[C], data: bytes, path: Path, error: type[RailbusError]) -> C:
    try:
        value = orjson.loads(data)
        if not isinstance(value, dict):
            raise error(f"{path} does not hold a map", hint=_AGAIN)
        return contract.parse(value)
    except orjson.JSONDecodeError as exc:
        raise error(f"{path} is not valid JSON: {exc}", hint=_AGAIN) from exc
    except WireError as exc:
        raise error(f"{path}: {exc.message}", hint=exc.hint or _AGAIN, details=exc.details) from exc


def schema_problems(schema: DatasetSchema) -> Iterator[str]:
    """What a schema says that no shard can hold."""
    for name, column in schema.columns.items():
        if 0 in column.shape or len(column.shape) > _MAX_AXES:
            yield (
                f"field 'columns.{name}.shape' has value {list(column.shape)}: "
                f"expected at most {_MAX_AXES} lengths, none of them 0"
            )
        if column.labels and column.num_classes not in {None, len(column.labels)}:
            yield (
                f"field 'columns.{name}.num_classes' has value {column.num_classes}, "
                f"but there are {len(column.labels)} labels"
            )


def _problems(schema: DatasetSchema, file: IndexFile, schema_sha256: str) -> Iterator[str]:
    """Where schema and index do not hold together, in words."""
    if file.schema_sha256 != schema_sha256:
        yield f"field 'schema_sha256' has value {file.schema_sha256!r}, but schema.json has {schema_sha256!r}"
    if (file.dataset, file.payload) != (schema.name, schema.payload):
        yield f"it is of {file.dataset!r} ({file.payload}), but schema.json of {schema.name!r} ({schema.payload})"
    if len({shard.file for shard in file.shards}) != len(file.shards):
        yield "field 'shards' names a file twice"
    first = 0
    for number, shard in enumerate(file.shards):
        if shard.first_sample != first:
            yield f"field 'shards.{number}.first_sample' has value {shard.first_sample}, expected {first}"
        first += shard.samples
        yield from _shard_problems(schema, shard, number)
    if first != file.samples:
        yield f"field 'samples' has value {file.samples}, but the shards hold {first}"
    if (total := sum(shard.bytes for shard in file.shards)) != file.bytes:
        yield f"field 'bytes' has value {file.bytes}, but the shards have {total}"
    for name, split in schema.splits.items():
        if split.first + split.samples > file.samples:
            yield (
                f"field 'splits.{name}' of schema.json ends at sample {split.first + split.samples}, "
                f"but the shards hold {file.samples}"
            )


def _shard_problems(schema: DatasetSchema, shard: Shard, number: int) -> Iterator[str]:
    if shard.columns.keys() != schema.columns.keys():
        yield f"field 'shards.{number}.columns' has {sorted(shard.columns)}, but the schema {sorted(schema.columns)}"
        return
    for name, extent in shard.columns.items():
        field = f"shards.{number}.columns.{name}"
        column = schema.columns[name]
        expected = sample_bytes(column) * shard.samples
        if extent.bytes != expected:
            yield f"field '{field}.bytes' has value {extent.bytes}, expected {expected}"
        if extent.offset + extent.bytes > shard.bytes:
            yield (
                f"field '{field}.offset' has value {extent.offset}: "
                f"{extent.bytes} bytes from there end beyond the file's {shard.bytes}"
            )
        if extent.offset % ITEM_BYTES[column.dtype]:
            yield f"field '{field}.offset' has value {extent.offset}, no multiple of the size of {column.dtype}"

"""`DatasetIndex`: what a dataset is and where its bytes lie, checked before anything is read through it.

Reading is total: whatever lies in the two files gives an index that holds together, or an error that names the file,
the field, the value and the remedy.
"""

from __future__ import annotations

import hashlib
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeVar, cast

import numpy as np
import numpy.typing as npt
import orjson

from railbus_shared import collecting
from railbus_shared.data.agreement import index_problems, schema_problems
from railbus_shared.data.dtypes import ITEM_BYTES, sample_bytes
from railbus_shared.data.mapping import look_at
from railbus_shared.data.plain import plain_index, plain_schema
from railbus_shared.errors import DatasetNotFound, IndexInvalid, NotFound, RailbusError, SchemaInvalid, WireError

if TYPE_CHECKING:
    from railbus_shared.contracts.artifacts import DatasetSchema, IndexFile
    from railbus_shared.contracts.model import Contract
    from railbus_shared.data.plain import AnyIndex, AnySchema, AnySplit

__all__ = ["ITEM_BYTES", "DatasetIndex", "sample_bytes", "schema_problems", "unreadable"]

C = TypeVar("C", bound="Contract")

_PYDANTIC: Final = "pydantic"
_AGAIN: Final = "import the dataset again, or restore the file from a copy"


@dataclass(frozen=True, eq=False)
class DatasetIndex:
    """A dataset's schema and index, which agree with each other."""

    about: AnySchema
    """`schema`, as far as reading needs it: it may be known without pydantic, see `plain.py`."""
    shard_map: AnyIndex
    """`file`, as far as reading needs it."""
    sha256: str
    """Of the bytes of `index.json`: the identity of the dataset's content."""
    _texts: tuple[bytes, bytes] | None = None
    """Of both files, where their contracts have not been made."""

    @cached_property
    def schema(self) -> DatasetSchema:
        """All that `schema.json` says."""
        from railbus_shared.contracts.artifacts import DatasetSchema  # noqa: PLC0415 - it loads pydantic

        return DatasetSchema.parse(orjson.loads(self._texts[0])) if self._texts else cast("DatasetSchema", self.about)

    @cached_property
    def file(self) -> IndexFile:
        """All that `index.json` says."""
        from railbus_shared.contracts.artifacts import IndexFile  # noqa: PLC0415 - it loads pydantic

        return IndexFile.parse(orjson.loads(self._texts[1])) if self._texts else cast("IndexFile", self.shard_map)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, DatasetIndex):
            return NotImplemented
        return (self.sha256, self.schema, self.file) == (other.sha256, other.schema, other.file)

    __hash__ = None  # type: ignore[assignment] # its columns are a map

    @classmethod
    def load(cls, directory: Path, version: int | None = None) -> DatasetIndex:
        """The index of the dataset in a folder of its name: the newest version, or the one that is asked for.

        Raises DatasetNotFound, NotFound for a version that there is not, SchemaInvalid, IndexInvalid.
        """
        index = cls.read(directory / "schema.json", directory / "index.json")
        if version is not None and version != index.shard_map.version:
            index = cls._older(directory, version)
        index.check_name(directory.name)
        return index

    @classmethod
    def _older(cls, directory: Path, version: int) -> DatasetIndex:
        folder = directory / "versions" / f"{version:06d}"
        if not folder.is_dir():
            raise NotFound(
                f"version has value {version}: dataset {directory.name!r} has no such version",
                hint="leave it out for the newest; the older ones lie in the dataset's folder under versions/",
                details={"field": "version", "value": version},
            )
        index = cls.read(folder / "schema.json", folder / "index.json")
        if index.shard_map.version != version:
            raise IndexInvalid(
                f"{folder / 'index.json'}: field 'version' has value {index.shard_map.version}, expected {version}",
                hint=_AGAIN,
                details={"path": str(folder / "index.json")},
            )
        return index

    @classmethod
    def read(cls, schema_path: Path, index_path: Path) -> DatasetIndex:
        """The index in two files, wherever they lie; raises DatasetNotFound, SchemaInvalid, IndexInvalid."""
        return cls.parse(*read_pair(schema_path, index_path), folder=index_path.parent)

    @classmethod
    def read_exactly(cls, schema_path: Path, index_path: Path, *, sha256: str) -> DatasetIndex:
        """The index that has this hash: in these two files, or where an append has put it since.

        Raises IndexInvalid if it is in neither place, DatasetNotFound, SchemaInvalid.
        """
        found = cls.read(schema_path, index_path)
        if found.sha256 == sha256:
            return found
        for path in sorted(index_path.parent.glob("versions/*/index.json"), reverse=True):
            kept = _bytes_of(path, IndexInvalid)
            if kept is not None and hashlib.sha256(kept).hexdigest() == sha256:
                return cls.read(path.with_name("schema.json"), path)
        raise IndexInvalid(
            f"{index_path} has SHA-256 {found.sha256}, expected {sha256}: it was replaced meanwhile",
            hint="submit the job again to train on what is there now",
            details={"path": str(index_path)},
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
        with collecting.paused():
            return cls._checked(schema_bytes, index_bytes, folder)

    @classmethod
    def _checked(cls, schema_bytes: bytes, index_bytes: bytes, folder: Path) -> DatasetIndex:
        schema_path, index_path = folder / "schema.json", folder / "index.json"
        plain = None if _PYDANTIC in sys.modules else _plainly(schema_bytes, index_bytes)
        if plain is not None:
            return cls(*plain, hashlib.sha256(index_bytes).hexdigest(), (schema_bytes, index_bytes))
        from railbus_shared.contracts.artifacts import DatasetSchema, IndexFile  # noqa: PLC0415 - it loads pydantic

        schema = _parsed(DatasetSchema, schema_bytes, schema_path, SchemaInvalid)
        for problem in schema_problems(schema):
            raise SchemaInvalid(f"{schema_path}: {problem}", hint=_AGAIN, details={"path": str(schema_path)})
        file = _parsed(IndexFile, index_bytes, index_path, IndexInvalid)
        for problem in index_problems(schema, file, hashlib.sha256(schema_bytes).hexdigest()):
            raise IndexInvalid(f"{index_path}: {problem}", hint=_AGAIN, details={"path": str(index_path)})
        return cls(schema, file, hashlib.sha256(index_bytes).hexdigest())

    def check_name(self, folder: str) -> None:
        """Raises SchemaInvalid if the dataset lies in a folder of another name: two would share one identity."""
        if self.about.name != folder:
            raise SchemaInvalid(
                f"field 'name' of schema.json has value {self.about.name!r}, but its folder is called {folder!r}",
                hint="rename the folder, or import the data under the other name",
                details={"field": "name", "value": self.about.name},
            )

    def split(self, name: str) -> AnySplit:
        """Raises NotFound, naming the splits that there are."""
        if name not in self.about.splits:
            raise NotFound(
                f"split has value {name!r}: dataset {self.about.name!r} has no such split",
                hint=f"it has {', '.join(sorted(self.about.splits))}",
                details={"field": "split", "value": name},
            )
        return self.about.splits[name]

    def locate(self, samples: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Shard numbers and rows within them of samples (N,), int64 both (N,).

        Raises ValueError for a sample that does not exist.
        """
        if samples.size and not 0 <= samples.min() <= samples.max() < self.shard_map.samples:
            raise ValueError(f"samples {samples.min()} to {samples.max()} asked for, of {self.shard_map.samples}")
        numbers = np.searchsorted(self._firsts, samples, side="right").astype(np.int64) - 1
        return numbers, samples - self._firsts[numbers]

    @cached_property
    def _firsts(self) -> npt.NDArray[np.int64]:
        return np.array([shard.first_sample for shard in self.shard_map.shards], dtype=np.int64)

    def check_files(self, shards: Path) -> None:
        """Every shard and sidecar is there with its size; a look at each, no reading.

        Raises IndexInvalid for one that is missing or leads out of the dataset's folder, ShardCorrupt for one of
        another size.
        """
        for shard in self.shard_map.shards:
            look_at(shards / shard.file, size_bytes=shard.bytes)
            if shard.sidecar is not None:
                look_at(shards / shard.sidecar.file, size_bytes=shard.sidecar.bytes)


def read_pair(schema_path: Path, index_path: Path) -> tuple[bytes | None, bytes | None]:
    """The bytes of a schema and an index that belong together, None for a file that is missing.

    Raises SchemaInvalid or IndexInvalid for a file that cannot be read.
    """
    index = _bytes_of(index_path, IndexInvalid)
    return schema_of(index, _bytes_of(schema_path, SchemaInvalid), folder=index_path.parent), index


def schema_of(index: bytes | None, schema: bytes | None, *, folder: Path) -> bytes | None:
    """The schema that an index names: `schema`, or one that an append has put into `versions/`.

    An append replaces the schema before the index, and has put both older ones into `versions/` before that. So if the
    index was read first, its schema is found in one place or the other, whatever happens meanwhile.
    """
    if index is None or schema is None or _names(index, schema):
        return schema
    for path in sorted(folder.glob("versions/*/schema.json"), reverse=True):
        if (kept := _bytes_of(path, SchemaInvalid)) is not None and _names(index, kept):
            return kept
    return schema


def _names(index: bytes, schema: bytes) -> bool:
    """Whether the bytes of an index have the hash of a schema's in them; a look that needs no parsing."""
    return hashlib.sha256(schema).hexdigest().encode() in index


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


def _plainly(schema: bytes, index: bytes) -> tuple[AnySchema, AnyIndex] | None:
    """Both files without their contracts, if nothing at all is wrong with them."""
    try:
        about, shard_map = plain_schema(orjson.loads(schema)), plain_index(orjson.loads(index))
    except orjson.JSONDecodeError:
        return None
    if about is None or shard_map is None or any(schema_problems(about)):
        return None
    is_whole = not any(index_problems(about, shard_map, hashlib.sha256(schema).hexdigest()))
    return (about, shard_map) if is_whole else None


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

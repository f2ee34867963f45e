"""MosaicML MDS: a folder with `index.json` and shards, or such folders under `train` and `val`.

The index is checked against the shards: sizes, hashes that it states, offsets. Shards packed with zstd are unpacked to
the scratch folder, to no more than the index says. Pickled columns are refused.
"""

from __future__ import annotations

import hashlib
import json
import mmap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from railbus.importers.array_shapes import ArrayShapes
from railbus.importers.arrow_files import unpack_zstd
from railbus.importers.image_bytes import encoding_of
from railbus.importers.joined import Joined, split_folders
from railbus.importers.mds_encoding import DIGITS, FILES, SCALARS, ArrayEncoding, fixed_size
from railbus.importers.source import (
    CHUNK_BYTES,
    CHUNK_ROWS,
    Array,
    Chunk,
    Options,
    Outline,
    Source,
    Values,
    column_names,
    ragged_bytes,
    unreadable,
)
from railbus_shared.contracts.artifacts import Column
from railbus_shared.errors import InvalidField

_INDEX: Final = "index.json"
_WORD: Final = 4


def is_mds(folder: Path) -> bool:
    """Whether MosaicML's writer made this folder, or those in it that are called like splits."""
    return _has_index(folder) or any(_has_index(one) for one in split_folders(folder).values())


def _has_index(folder: Path) -> bool:
    try:
        return b'"shards"' in (text := (folder / _INDEX).read_bytes()) and b'"mds"' in text
    except OSError:
        return False


def mds_folder(folder: Path, options: Options) -> Source:
    """A dataset in one folder, or in one for each split."""
    if _has_index(folder):
        return Mds(folder, options)
    return Joined({name: Mds(part, options) for name, part in split_folders(folder).items()})


@dataclass(frozen=True)
class _Shard:
    """What the index says of a shard."""

    path: Path
    packed: Path | None
    bytes: int
    samples: int
    hashes: dict[str, str]


class Mds:
    """Samples in the shards of one folder."""

    def __init__(self, folder: Path, options: Options) -> None:
        """Reads everything once. Raises InvalidField naming the shard."""
        self._folder = folder
        self._options = options
        try:
            self._shards, names, encodings = _read_index(folder, options)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as exc:
            raise unreadable(folder.name, f"{_INDEX} is not of a dataset in MDS: {exc!r}") from exc
        self._columns = dict(
            zip(column_names(names).values(), [_MdsColumn(*one) for one in zip(names, encodings, strict=True)],
                strict=True)
        )  # fmt: skip
        samples = total = 0
        for row in self._rows("looking"):
            for name, data in zip(self._columns, row, strict=True):
                try:
                    self._columns[name].see(data, sample=str(samples))
                except ValueError as exc:
                    raise unreadable(folder.name, f"{name!r} of sample {samples} cannot be read: {exc}") from exc
            samples += 1
            total += sum(map(len, row))
        if samples == 0:
            raise unreadable(folder.name, "it holds no samples")
        columns = {name: column.column() for name, column in self._columns.items()}
        self.outline = Outline(columns=columns, samples=samples, sample_bytes=total // samples)

    def chunks(self) -> Iterator[Chunk]:
        rows: list[list[bytes]] = []
        size = 0
        for row in self._rows("reading"):
            rows.append(row)
            size += sum(map(len, row))
            if len(rows) == CHUNK_ROWS or size > CHUNK_BYTES:
                yield self._chunk(rows)
                rows, size = [], 0
        if rows:
            yield self._chunk(rows)

    def _chunk(self, rows: list[list[bytes]]) -> Chunk:
        columns = zip(self._columns.items(), zip(*rows, strict=True), strict=True)
        return {name: column.values(data) for (name, column), data in columns}

    def _rows(self, stage: str) -> Iterator[list[bytes]]:
        """Samples as the bytes of their columns."""
        sizes = [column.size for column in self._columns.values()]
        for number, shard in enumerate(self._shards):
            try:
                yield from _samples_of(_unpacked(shard), sizes)
            except (OSError, ValueError) as exc:
                raise unreadable(shard.path.name, str(exc)) from exc
            self._options.report(stage, number + 1, len(self._shards))


def _read_index(folder: Path, options: Options) -> tuple[list[_Shard], list[str], list[str]]:
    """Shards, column names and encodings; raises what reading unchecked JSON raises."""
    shards: list[_Shard] = []
    columns: list[tuple[list[str], list[str]]] = []
    for said in json.loads((folder / _INDEX).read_bytes())["shards"]:
        if said["format"] != "mds" or (said["compression"] not in {None, ""} and "zstd" not in said["compression"]):
            raise ValueError(f"format {said['format']!r}, compression {said['compression']!r} is not known")
        raw, packed = said["raw_data"], said["zip_data"]
        hashes = (packed or raw)["hashes"]
        path = options.scratch / f"{len(shards)}.mds" if packed else _inside(folder, raw["basename"])
        shards.append(
            _Shard(
                path=path,
                packed=_inside(folder, packed["basename"]) if packed else None,
                bytes=int(raw["bytes"]),
                samples=int(said["samples"]),
                hashes={name: str(value) for name, value in hashes.items() if name in hashlib.algorithms_guaranteed},
            )
        )
        columns.append((list(said["column_names"]), list(said["column_encodings"])))
    if any(one != columns[0] for one in columns):
        raise ValueError("the shards have different columns")
    return shards, *columns[0]


def _inside(folder: Path, name: str) -> Path:
    """A file of a folder; raises ValueError for a name that leads out of it."""
    if not name or Path(name).name != name or (folder / name).is_symlink():
        raise ValueError(f"file {name!r} is none of this folder")
    return folder / name


def _unpacked(shard: _Shard) -> Path:
    """The plain shard, checked against what the index says of it; raises ValueError."""
    source = shard.packed or shard.path
    if shard.packed is None or not shard.path.exists():
        for name, expected in shard.hashes.items():
            with source.open("rb") as file:
                actual = hashlib.file_digest(file, name).hexdigest()
            if actual != expected:
                raise ValueError(f"its {name} is {actual}, but the index says {expected}")
    if shard.packed is not None and not shard.path.exists():
        unpack_zstd(shard.packed, shard.path, limit_bytes=shard.bytes)
    if (size := shard.path.stat().st_size) != shard.bytes:
        raise ValueError(f"it has {size} bytes, but the index says {shard.bytes}")
    return shard.path


def _samples_of(path: Path, sizes: Sequence[int | None]) -> Iterator[list[bytes]]:
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as data:
        if len(data) < _WORD:
            raise ValueError("it is cut")
        count = int.from_bytes(data[:_WORD], "little")
        if (count + 2) * _WORD > len(data):
            raise ValueError(f"it claims {count} samples, more than it can hold")
        offsets = np.frombuffer(data[_WORD : (count + 2) * _WORD], "<u4").astype(np.int64)
        if (np.diff(offsets) < 0).any() or offsets[0] < (count + 2) * _WORD or offsets[-1] > len(data):
            raise ValueError("its offsets fall, or lead out of it")
        for start, stop in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
            yield _parted(data[start:stop], sizes)


def _parted(data: bytes, sizes: Sequence[int | None]) -> list[bytes]:
    """A sample's columns; raises ValueError if they do not make up its bytes."""
    varying = sizes.count(None)
    at = varying * _WORD
    found = iter(np.frombuffer(data, "<u4", count=varying).tolist())
    parts = []
    for size in sizes:
        end = at + (next(found) if size is None else size)
        parts.append(data[at:end])
        at = end
    if at != len(data):
        raise ValueError(f"a sample's columns have {at} bytes, but the sample {len(data)}")
    return parts


class _MdsColumn:
    """A column, and how its bytes become values."""

    def __init__(self, name: str, encoding: str) -> None:
        """Raises InvalidField for an encoding that is not read."""
        self._name = name
        self._encoding = encoding
        self._kind = encoding.partition(":")[0]
        self._file_encoding = FILES.get(self._kind)
        self._is_first = True
        self._shapes = ArrayShapes(name, where="the dataset")
        try:
            self.size = fixed_size(encoding)
            self._array = ArrayEncoding.parse(encoding) if self._kind == "ndarray" else None
        except ValueError as exc:
            raise self._refused() from exc
        if self._file_encoding is None and self._kind not in {"ndarray", *SCALARS, *DIGITS}:
            raise self._refused()

    def _refused(self) -> InvalidField:
        return InvalidField(
            field=f"columns.{self._name}",
            value=self._encoding,
            problem="an encoding of MDS that is not read",
            hint=f"known are ndarray, {', '.join([*SCALARS, *DIGITS, *FILES])}",
        )

    def see(self, data: bytes, *, sample: str) -> None:
        """Raises InvalidField for what is not like the values before it."""
        if self._file_encoding is None:
            self._shapes.see(self._value(data), sample=sample)
        elif self._file_encoding in {"utf-8", "json"}:
            data.decode()
        elif self._kind == "bytes":
            found = encoding_of(data)
            self._file_encoding = found if self._is_first or found == self._file_encoding else ""
        self._is_first = False

    def column(self) -> Column:
        if self._file_encoding is None:
            return self._shapes.column()
        return Column(dtype="uint8", shape=(), variable_length=True, encoding=self._file_encoding)

    def values(self, data: Sequence[bytes]) -> Values:
        if self._file_encoding is None:
            return self._shapes.values([self._value(one) for one in data])
        return ragged_bytes(list(data))

    def _value(self, data: bytes) -> Array:
        """Raises ValueError for bytes that are no such value."""
        if self._array is not None:
            return self._array.decode(data)
        if self._kind in DIGITS:
            return np.array(data.decode(), DIGITS[self._kind])
        return np.frombuffer(data, SCALARS[self._kind])[0:1].reshape(())

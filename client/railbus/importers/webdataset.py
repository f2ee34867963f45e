"""WebDataset: tar archives in which files of one base name are a sample, `0001.jpg` and `0001.cls` for instance.

Each extension is a column. Numbers in `.cls` are classes, `.npy` are arrays, texts and JSON stay texts, everything else
stays the bytes that it is. Pickles are refused. `key` is the base name, unless the names only count the samples.
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Final

import numpy as np

from railbus.importers.array_shapes import ArrayShapes
from railbus.importers.image_bytes import encoding_of
from railbus.importers.joined import SPLIT_NAMES, Joined
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
from railbus.importers.tar_members import members
from railbus_shared.contracts.artifacts import Column
from railbus_shared.errors import InvalidField

SUFFIXES: Final = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
KEY: Final = "key"
_NUMBERS: Final = frozenset({"cls", "cls2", "index", "inx", "id"})
_TEXTS: Final = {"txt": "utf-8", "text": "utf-8", "transcript": "utf-8", "json": "json", "jsn": "json"}
_REFUSED: Final = frozenset({"pyd", "pickle", "pkl", "pth", "pt", "ten", "tb", "mp", "msg", "npz"})
_MAX_SAMPLE_FILES: Final = 256
Fields = Mapping[str, bytes]


def is_archive(path: Path) -> bool:
    """Whether a file is called like a tar archive."""
    return path.name.lower().endswith(SUFFIXES)


def archive_folder(folder: Path, options: Options) -> Source:
    """The archives of a folder; `train-000001.tar` belongs to the split `train`."""
    paths = sorted(path for path in folder.iterdir() if is_archive(path))
    parts = {name: [path for path in paths if path.name.startswith((f"{name}-", f"{name}."))] for name in SPLIT_NAMES}
    parts = {name: found for name, found in parts.items() if found}
    if "train" not in parts or sum(map(len, parts.values())) != len(paths):
        return WebDataset(paths, options)
    return Joined({name: WebDataset(found, options) for name, found in parts.items()})


class WebDataset:
    """Samples in one or several archives."""

    def __init__(self, paths: list[Path], options: Options) -> None:
        """Reads everything once. Raises InvalidField naming archive and sample."""
        self._paths = paths
        self._options = options
        self._fields: dict[str, _Field] = {}
        samples = total = 0
        self._left_out = 0
        counts_only = True
        for path, key, fields in self._samples("looking"):
            self._see(path, key, fields)
            counts_only = counts_only and key.isdecimal() and int(key) == samples
            samples += 1
            total += sum(map(len, fields.values()))
        if samples == 0:
            raise unreadable(paths[0].name, "it holds no samples")
        if not counts_only:
            self._fields[KEY] = _Field(KEY, paths[0].name)
            self._fields[KEY].encoding = "utf-8"
        self._names = _short_names(self._fields)
        columns = {name: self._fields[key].column() for key, name in self._names.items()}
        notes = (f"left out {self._left_out} files without a base name or an extension",) if self._left_out else ()
        self.outline = Outline(columns=columns, samples=samples, sample_bytes=total // samples, notes=notes)

    def _see(self, path: Path, key: str, fields: Fields) -> None:
        if not self._fields:
            self._fields = {name: _Field(name, path.name) for name in sorted(fields)}
        if self._fields.keys() != fields.keys():
            raise InvalidField(
                field="columns",
                value=sorted(fields),
                problem=f"sample {key!r} of {path.name!r} has these, but the first has {sorted(self._fields)}",
                hint="give every sample the same extensions",
            )
        for name, field in self._fields.items():
            field.see(fields[name], sample=key)

    def chunks(self) -> Iterator[Chunk]:
        rows: list[Fields] = []
        size = 0
        for _, key, fields in self._samples("reading"):
            rows.append({**fields, KEY: key.encode()} if KEY in self._fields else fields)
            size += sum(map(len, fields.values()))
            if len(rows) == CHUNK_ROWS or size > CHUNK_BYTES:
                yield self._chunk(rows)
                rows, size = [], 0
        if rows:
            yield self._chunk(rows)

    def _chunk(self, rows: list[Fields]) -> Chunk:
        return {name: self._fields[key].values([row[key] for row in rows]) for key, name in self._names.items()}

    def _samples(self, stage: str) -> Iterator[tuple[Path, str, Fields]]:
        """Samples with their archive and key."""
        for path in self._paths:
            before, fields = "", dict[str, bytes]()
            for member in members(path, self._options, stage=stage):
                key, extension = _parted(member.name)
                if not key or not extension:  # such a file belongs to no sample
                    self._left_out += 1
                    continue
                if fields and key != before:
                    yield path, before, fields
                    fields = {}
                before = key
                if extension in fields or len(fields) >= _MAX_SAMPLE_FILES:
                    raise unreadable(path.name, f"sample {key!r} has more than one {extension!r}, or too many files")
                fields[extension] = member.data
            if fields:
                yield path, before, fields


def _parted(name: str) -> tuple[str, str]:
    """Key and extension: what stands before and after the first dot of the file's name."""
    path = PurePosixPath(name)
    stem, _, extension = path.name.partition(".")
    return str(path.with_name(stem)) if stem else "", extension.lower()


def _short_names(extensions: Iterable[str]) -> dict[str, str]:
    """`image.jpg` is called `image`, unless another would be called so too."""
    shorts = {one: one.rpartition(".")[0] or one for one in extensions}
    counts = Counter(shorts.values())
    names = column_names(short if counts[short] == 1 else one for one, short in shorts.items())
    return dict(zip(shorts, names.values(), strict=True))


class _Field:
    """One extension of all samples."""

    def __init__(self, name: str, file: str) -> None:
        self._name = name
        self._file = file
        self._kind = name.rpartition(".")[2]
        self.encoding = _TEXTS.get(self._kind, "")
        self._is_first = True
        self._is_array = self._kind in _NUMBERS or self._kind == "npy"
        self._shapes = ArrayShapes(name, where=file)
        if self._kind in _REFUSED:
            raise InvalidField(
                field=f"columns.{name}",
                value=self._kind,
                problem=f"members of {file!r} are of a kind that is not read",
                hint="pickles could run code; save arrays as .npy",
            )

    def see(self, data: bytes, *, sample: str) -> None:
        if self._is_array:
            self._shapes.see(self._array(data, sample=sample), sample=sample)
        elif self.encoding in {"utf-8", "json"}:
            self._check_text(data, sample=sample)
        else:
            found = encoding_of(data)
            self.encoding = found if self._is_first or found == self.encoding else ""
        self._is_first = False

    def _check_text(self, data: bytes, *, sample: str) -> None:
        try:
            data.decode()
        except UnicodeDecodeError as exc:
            raise unreadable(self._file, f"{self._name!r} of sample {sample!r} is not UTF-8: {exc}") from exc

    def _array(self, data: bytes, *, sample: str) -> Array:
        try:
            if self._kind == "npy":
                found: Array = np.load(io.BytesIO(data), allow_pickle=False)
                return found.astype(found.dtype.newbyteorder("="), copy=False)
            return np.array(int(data), np.int64)
        except (ValueError, EOFError, OSError, OverflowError, SyntaxError) as exc:
            raise unreadable(self._file, f"{self._name!r} of sample {sample!r} cannot be read: {exc}") from exc

    def column(self) -> Column:
        if self._is_array:
            return self._shapes.column()
        return Column(dtype="uint8", shape=(), variable_length=True, encoding=self.encoding)

    def values(self, data: list[bytes]) -> Values:
        if self._is_array:
            return self._shapes.values([self._array(one, sample="") for one in data])
        return ragged_bytes(data)

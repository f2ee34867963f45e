"""`.npy` and `.npz`: arrays that are mapped where they lie, never loaded whole, never unpickled.

The members of an `.npz` are stored plainly by `numpy.savez` and are then mapped inside the archive; compressed ones are
unpacked first. An array `x` with a neighbour `x.offsets` is a column of variable length.
"""

from __future__ import annotations

import shutil
import tokenize
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Final, Literal, cast

import numpy as np

from railbus.importers.source import (
    Array,
    Budget,
    Chunk,
    Options,
    Outline,
    column_names,
    gathered,
    is_class,
    rows_per_chunk,
    unreadable,
)
from railbus_shared.contracts.artifacts import Column, Dtype
from railbus_shared.data.index import ITEM_BYTES
from railbus_shared.data.order import Positions
from railbus_shared.data.ragged import Ragged
from railbus_shared.errors import InvalidField

OFFSETS: Final = ".offsets"
_COPY_BYTES: Final = 1 << 20
_LOCAL_HEADER_BYTES: Final = 30
_FAULTS: Final = (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error, tokenize.TokenError, SyntaxError,
                  NotImplementedError, RuntimeError)  # fmt: skip
"""What NumPy and zipfile raise for files that are not what they should be; RuntimeError is an encrypted member."""


class Arrays:
    """Every array a column, its first axis the samples."""

    def __init__(self, arrays: dict[str, Array], *, name: str) -> None:
        """Raises InvalidField for arrays that cannot be columns of one table."""
        names = column_names(key for key in arrays if not _is_offsets(key, arrays))
        self._columns: dict[str, Array | Ragged] = {}
        for key, column in names.items():
            offsets = arrays.get(key + OFFSETS)
            self._columns[column] = arrays[key] if offsets is None else _varying(key, arrays[key], offsets)
        lengths = {key: _length(values) for key, values in self._columns.items()}
        if not lengths or len(set(lengths.values())) != 1 or 0 in lengths.values():
            raise InvalidField(
                field="source", value=lengths, problem=f"the columns of {name!r} must have one length, and not 0"
            )
        samples = next(iter(lengths.values()))
        size = sum(array.nbytes for array in arrays.values()) // samples
        columns = {key: _column(key, values) for key, values in self._columns.items()}
        self.outline = Outline(columns=columns, samples=samples, sample_bytes=size)

    def chunks(self) -> Iterator[Chunk]:
        step = rows_per_chunk(self.outline.sample_bytes)
        for start in range(0, self.outline.samples, step):
            yield self.take(np.arange(start, min(start + step, self.outline.samples), dtype=np.int64))

    def take(self, rows: Positions) -> Chunk:
        return {name: _taken(values, rows) for name, values in self._columns.items()}


def npy_file(path: Path) -> Arrays:
    """The one array of an `.npy` file, as a column named after the file."""
    return Arrays({path.stem: _mapped_npy(path)}, name=path.name)


def npy_folder(folder: Path) -> Arrays:
    """A folder of `.npy` files, each a column."""
    return Arrays({path.stem: _mapped_npy(path) for path in sorted(folder.glob("*.npy"))}, name=folder.name)


def npz_file(path: Path, options: Options) -> Arrays:
    """The arrays of an `.npz` file."""
    budget = Budget(path.name, packed_bytes=path.stat().st_size, max_bytes=options.max_bytes)
    try:
        with zipfile.ZipFile(path) as archive:
            arrays = {
                member.filename.removesuffix(".npy"): _member(path, archive, member, budget=budget, options=options)
                for member in archive.infolist()
            }
    except _FAULTS as exc:
        raise unreadable(path.name, str(exc), hint="save plain arrays with numpy.savez") from exc
    return Arrays(arrays, name=path.name)


def _member(
    path: Path, archive: zipfile.ZipFile, member: zipfile.ZipInfo, *, budget: Budget, options: Options
) -> Array:
    if not member.filename.endswith(".npy"):
        raise ValueError(f"it holds {member.filename!r}, which is no array")
    if member.compress_type != zipfile.ZIP_STORED:
        unpacked = options.scratch / f"{member.header_offset}.npy"
        with archive.open(member) as packed, unpacked.open("wb") as file:
            while data := packed.read(_COPY_BYTES):
                budget.spend(len(data))
                file.write(data)
        return _mapped_npy(unpacked)
    with archive.open(member) as stored:  # its end checks the CRC
        shutil.copyfileobj(stored, _Nowhere(), _COPY_BYTES)
    with path.open("rb") as file:
        file.seek(member.header_offset)
        local = file.read(_LOCAL_HEADER_BYTES)
        lengths = int.from_bytes(local[26:28], "little") + int.from_bytes(local[28:30], "little")
        file.seek(member.header_offset + _LOCAL_HEADER_BYTES + lengths)
        return _mapped_array(path, file, end=file.tell() + member.file_size)


class _Nowhere:
    """Takes what is written and forgets it."""

    def write(self, data: bytes) -> int:
        return len(data)


def _mapped_npy(path: Path) -> Array:
    try:
        with path.open("rb") as file:
            return _mapped_array(path, file, end=path.stat().st_size)
    except _FAULTS as exc:
        raise unreadable(path.name, str(exc), hint="save a plain array with numpy.save") from exc


def _mapped_array(path: Path, file: IO[bytes], *, end: int) -> Array:
    """The array whose `.npy` header begins here; raises ValueError for one that is not whole, or holds objects."""
    version = np.lib.format.read_magic(file)
    if version not in {(1, 0), (2, 0)}:
        raise ValueError(f"version {version} of the .npy format is not known")
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, is_fortran, dtype = read(file)
    if dtype.hasobject:
        raise ValueError("it holds Python objects, which are never unpickled")
    count = int(np.prod(shape, dtype=object)) if shape else 1
    if file.tell() + count * dtype.itemsize > end:
        raise ValueError(f"it is cut: {end - file.tell()} bytes of {count * dtype.itemsize}")
    if count == 0 or dtype.itemsize == 0:
        return np.zeros(shape, dtype)
    order: Literal["F", "C"] = "F" if is_fortran else "C"
    mapped: Array = np.memmap(path, dtype, mode="r", offset=file.tell(), shape=shape, order=order)
    return mapped


def _is_offsets(key: str, arrays: dict[str, Array]) -> bool:
    return key.endswith(OFFSETS) and key.removesuffix(OFFSETS) in arrays


def _varying(key: str, values: Array, offsets: Array) -> Ragged:
    fits = offsets.ndim == 1 and len(offsets) > 0 and offsets.dtype.kind in "iu" and values.ndim > 0
    ends = offsets.astype(np.int64) if fits else np.zeros(1, np.int64)
    if not fits or ends[0] != 0 or ends[-1] != len(values) or (np.diff(ends) < 0).any():
        raise InvalidField(
            field=f"columns.{key}{OFFSETS}",
            value=f"{offsets.dtype}{list(offsets.shape)}",
            problem=f"not the offsets of {key!r}: whole numbers that begin with 0, never fall, and end at its length",
        )
    return Ragged(values, ends)


def _length(values: Array | Ragged) -> int:
    return len(values) if isinstance(values, Ragged) or values.ndim else 0


def _taken(values: Array | Ragged, rows: Positions) -> Array | Ragged:
    if isinstance(values, Ragged):
        found = gathered(values, rows)
        return Ragged(_native(found.values), found.offsets)
    return _native(values[rows])


def _native(array: Array) -> Array:
    """In this machine's byte order."""
    return array.astype(array.dtype.newbyteorder("="), copy=False)


def _column(name: str, values: Array | Ragged) -> Column:
    """The column for an array; whole numbers from 0 up that are named like classes are taken for classes."""
    array = values.values if isinstance(values, Ragged) else values
    dtype = array.dtype.name
    if dtype not in ITEM_BYTES:
        raise InvalidField(
            field=f"columns.{name}", value=dtype, problem="not a type of number", hint=f"use {', '.join(ITEM_BYTES)}"
        )
    if isinstance(values, Ragged):
        return Column(dtype=cast("Dtype", dtype), shape=array.shape[1:], variable_length=True)
    classes = is_class(name) and array.ndim == 1 and array.dtype.kind in "iu" and int(array.min()) >= 0
    num_classes = int(array.max()) + 1 if classes else None
    return Column(dtype=cast("Dtype", dtype), shape=array.shape[1:], num_classes=num_classes)

"""WebDataset: tar archives in which each sample is files of one base name, a counting number."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Self, cast

import numpy as np

from railbus.exporters.exporter import FILE_ENCODINGS, ExportOptions, is_file, is_text
from railbus.importers.source import Array, num_samples
from railbus.reading_rows import Rows, as_numbers
from railbus_shared.contracts.artifacts import Column

_BLOCK: Final = 512


def write_webdataset(rows: Rows, target: Path, options: ExportOptions) -> None:
    """A folder of archives named after the split."""
    target.mkdir(exist_ok=True)
    extensions = {name: extension(name, column) for name, column in rows.columns.items()}
    done = 0
    with _Archives(target, rows.split or "all", shard_bytes=options.shard_bytes) as archives:
        for chunk in rows.chunks(report=options.report):
            for at in range(num_samples(chunk)):
                archives.add(
                    {
                        f"{done:09d}.{extensions[name]}": data_of(values[at], rows.columns[name])
                        for name, values in chunk.items()
                    }
                )
                done += 1


class _Archives:
    """Archives of about one size, begun one after the other."""

    def __init__(self, folder: Path, prefix: str, *, shard_bytes: int) -> None:
        self._folder = folder
        self._prefix = prefix
        self._shard_bytes = shard_bytes
        self._number = 0
        self._size = 0
        self._tar = self._begun()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._tar.close()

    def _begun(self) -> tarfile.TarFile:
        path = self._folder / f"{self._prefix}-{self._number:06d}.tar"
        return tarfile.TarFile(path, "w", format=tarfile.USTAR_FORMAT)

    def add(self, files: Mapping[str, bytes]) -> None:
        """The files of a sample, which stay together."""
        if self._size >= self._shard_bytes:
            self._tar.close()
            self._number += 1
            self._size = 0
            self._tar = self._begun()
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size, info.mode = len(data), 0o444
            self._tar.addfile(info, io.BytesIO(data))
            self._size += _BLOCK + -(-len(data) // _BLOCK) * _BLOCK
        cast("Any", self._tar).members = []  # it would remember every member


def extension(name: str, column: Column) -> str:
    """What follows the base name: the column, and what kind of file it is."""
    if is_text(column):
        kind = "txt" if column.encoding == "utf-8" else "json"
    elif is_file(column):
        kind = FILE_ENCODINGS[column.encoding]
    elif column.num_classes and not column.shape and not column.variable_length:
        kind = "cls"
    else:
        kind = "npy"
    return kind if name == kind else f"{name}.{kind}"


def data_of(value: Array, column: Column) -> bytes:
    """The bytes of a sample's file."""
    if is_text(column) or is_file(column):
        return value.tobytes()
    if column.num_classes and not column.shape and not column.variable_length:
        return str(int(value)).encode()
    file = io.BytesIO()
    np.save(file, np.ascontiguousarray(as_numbers(np.asarray(value), column)).reshape(np.shape(value)))
    return file.getvalue()

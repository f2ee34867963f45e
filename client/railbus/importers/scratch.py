"""Room on disk for what an import must keep until it is done: unpacked files, tokens, rows that are to be mixed.

It lies in the root's own folder, so that it is on the disk that the dataset needs anyway. What a killed import left is
removed by the next one: a folder that nobody holds a lock on is litter.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from railbus.importers.source import Array, Chunk, Report, Source, gathered, num_samples
from railbus_shared import files
from railbus_shared.data.order import Positions
from railbus_shared.data.ragged import Ragged
from railbus_shared.layout import Layout


@contextlib.contextmanager
def scratch_folder(layout: Layout) -> Iterator[Path]:
    """An empty folder that vanishes; raises StorageFull if what is written into it does not fit."""
    home = layout.state / "imports" / "scratch"
    with files.storage_errors(home):
        home.mkdir(parents=True, exist_ok=True)
        _remove_litter(home)
        path = Path(tempfile.mkdtemp(dir=home))
        held = _locked(path)
        try:
            yield path
        finally:
            shutil.rmtree(path)
            if held is not None:
                os.close(held)


def _remove_litter(home: Path) -> None:
    for path in home.iterdir():
        held = _locked(path)
        if held is not None:
            shutil.rmtree(path, ignore_errors=True)  # another import may be at it too
            os.close(held)


def _locked(path: Path) -> int | None:
    """A descriptor that holds the lock of a folder; None if another process has it, or has removed the folder."""
    try:
        folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(folder)
        return None
    return folder


class Spooled:
    """A source whose samples were written to disk column by column, so that they can be had in any order."""

    def __init__(self, source: Source, folder: Path, *, report: Report) -> None:
        self.outline = source.outline
        self._columns = {
            name: _Ragged(folder / name) if column.variable_length else _Fixed(folder / name)
            for name, column in self.outline.columns.items()
        }
        done = 0
        for chunk in source.chunks():
            for name, column in self._columns.items():
                column.add(chunk[name])
            done += num_samples(chunk)
            report("reading", done, self.outline.samples)

    def chunks(self) -> Iterator[Chunk]:
        yield self.take(np.arange(self.outline.samples, dtype=np.int64))

    def take(self, rows: Positions) -> Chunk:
        return {name: column.take(rows) for name, column in self._columns.items()}


class _Fixed:
    def __init__(self, path: Path) -> None:
        self._path = path
        self._like: Array | None = None
        self._mapped: Array | None = None

    def add(self, values: Array | Ragged) -> None:
        assert not isinstance(values, Ragged)  # noqa: S101 - the outline said so
        self._like = values[:0]
        _append(self._path, values)

    def take(self, rows: Positions) -> Array:
        if self._mapped is None:
            assert self._like is not None  # noqa: S101 - a source has samples
            self._mapped = _map(self._path, self._like)
        return self._mapped[rows]


class _Ragged:
    def __init__(self, path: Path) -> None:
        self._path = path
        self._like: Array | None = None
        self._lengths: list[Array] = []
        self._mapped: Ragged | None = None

    def add(self, values: Array | Ragged) -> None:
        assert isinstance(values, Ragged)  # noqa: S101 - the outline said so
        self._like = values.values[:0]
        self._lengths.append(np.diff(values.offsets))
        _append(self._path, values.values[values.offsets[0] : values.offsets[-1]])

    def take(self, rows: Positions) -> Ragged:
        if self._mapped is None:
            assert self._like is not None  # noqa: S101 - a source has samples
            ends = np.cumsum(np.concatenate(self._lengths))
            self._mapped = Ragged(_map(self._path, self._like), np.concatenate([np.zeros(1, np.int64), ends]))
        return gathered(self._mapped, rows)


def _append(path: Path, values: Array) -> None:
    with path.open("ab") as file:
        file.write(np.ascontiguousarray(values).data if values.size else b"")


def _map(path: Path, like: Array) -> Array:
    """The whole file as rows that look like `like`."""
    if path.stat().st_size == 0:
        return like
    mapped: Array = np.memmap(path, like.dtype, mode="r")
    return mapped.reshape(-1, *like.shape[1:])

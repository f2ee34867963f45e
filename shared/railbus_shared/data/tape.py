"""A tape: bytes on disk on their way through, in files that are removed as soon as they have been read."""

from __future__ import annotations

import mmap
from collections.abc import Generator
from pathlib import Path
from typing import BinaryIO, Final

BLOCK_BYTES: Final = 1 << 20
_FILE_BYTES: Final = 64 << 20


class Tape:
    """Bytes that are appended at one end, read anywhere, and dropped from the other; files of 64 MiB."""

    def __init__(self, folder: Path, name: str) -> None:
        self._folder = folder
        self._name = name
        self._file: BinaryIO | None = None
        self._dropped = 0
        self.size = 0

    def append(self, data: memoryview) -> None:
        while data:
            if self._file is None:
                self._file = self._path(self.size // _FILE_BYTES).open("ab", buffering=0)
            written = self._file.write(data[: _FILE_BYTES - self.size % _FILE_BYTES])
            self.size += written
            data = data[written:]
            if self.size % _FILE_BYTES == 0:
                self.close()

    def read(self, start: int, stop: int) -> Generator[memoryview]:
        """Blocks of a megabyte at most, each good until the next is asked for; other threads may append meanwhile."""
        buffer = memoryview(mmap.mmap(-1, BLOCK_BYTES))  # on a page: elsewhere, copies take several times as long
        while start < stop:
            number, at = divmod(start, _FILE_BYTES)
            with self._path(number).open("rb", buffering=0) as file:
                file.seek(at)
                end = min(stop, (number + 1) * _FILE_BYTES)
                while start < end:
                    if not (size := file.readinto(buffer[: end - start])):
                        raise EOFError(f"{self._path(number)} is {end - start} bytes short")
                    start += size
                    yield buffer[:size]

    def drop(self, end: int) -> None:
        """Remove what lies before a place, as far as files end there."""
        for number in range(self._dropped, end // _FILE_BYTES):
            self._path(number).unlink()
        self._dropped = max(self._dropped, end // _FILE_BYTES)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _path(self, number: int) -> Path:
        return self._folder / f"{number:06d}.{self._name}"

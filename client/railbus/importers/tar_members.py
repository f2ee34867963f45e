"""Files in a tar archive, one after the other, as they come: nothing is extracted and no path is ever made of a name.

Links, devices and names that lead out of the archive are refused, as are members of absurd size. A packed archive has a
budget. One that is cut is told: a whole archive ends with a block of zeros.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import tarfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any, Final, cast

from railbus.importers.source import Budget, Options, unreadable

MAX_MEMBER_BYTES: Final = 1 << 30
_PIECE_BYTES: Final = 1 << 20
_OPENERS: Final[dict[bytes, Callable[[Path], IO[bytes]]]] = {
    b"\x1f\x8b": lambda path: cast("IO[bytes]", gzip.GzipFile(path)),
    b"BZ": lambda path: cast("IO[bytes]", bz2.BZ2File(path)),
    b"\xfd7": lambda path: cast("IO[bytes]", lzma.LZMAFile(path)),  # noqa: SIM115 - its caller closes it
}


@dataclass(frozen=True)
class Member:
    """A file of an archive."""

    name: str
    data: bytes


def members(path: Path, options: Options, *, stage: str) -> Iterator[Member]:
    """The plain files of an archive in their order, read one at a time; raises InvalidField."""
    size = path.stat().st_size
    budget = Budget(path.name, packed_bytes=size, max_bytes=options.max_bytes)
    with path.open("rb") as plain:
        magic = plain.read(2)
    opener = _OPENERS.get(magic)
    try:
        with path.open("rb") if opener is None else opener(path) as file:
            stream = _Forward(file, budget)
            with tarfile.TarFile(fileobj=cast("IO[bytes]", stream)) as archive:
                while (info := archive.next()) is not None:
                    cast("Any", archive).members = []  # it would remember every member
                    if (member := _member(path, archive, info)) is not None:
                        yield member
                    options.report(stage, stream.position if opener is None else 0, size if opener is None else None)
                stream.check_end()
    except (tarfile.TarError, OSError, EOFError, zlib.error, lzma.LZMAError, ValueError) as exc:
        raise unreadable(path.name, f"it is no whole tar archive: {exc}") from exc


def _member(path: Path, archive: tarfile.TarFile, info: tarfile.TarInfo) -> Member | None:
    if info.isdir():
        return None
    name = PurePosixPath(info.name)
    if name.is_absolute() or ".." in name.parts or "\0" in info.name:
        raise unreadable(path.name, f"member {info.name!r} leads out of the archive")
    if not info.isreg():
        raise unreadable(path.name, f"member {info.name!r} is a link or a device")
    if info.size > MAX_MEMBER_BYTES:
        raise unreadable(path.name, f"member {info.name!r} claims {info.size} bytes, more than {MAX_MEMBER_BYTES}")
    file = archive.extractfile(info)
    data = file.read() if file is not None else b""
    if len(data) != info.size:
        raise unreadable(path.name, f"member {info.name!r} is cut: {len(data)} of {info.size} bytes")
    return Member(info.name, data)


class _Forward:
    """A file that is read forward only, which is all that a packed one can do; what is skipped is read."""

    def __init__(self, file: IO[bytes], budget: Budget) -> None:
        self._file = file
        self._budget = budget
        self.position = 0
        self._last = b""
        self._is_back = False

    def tell(self) -> int:
        return self.position - self._is_back

    def seek(self, position: int) -> int:
        """To the byte before, as tarfile does to see whether it is there, or to any place after."""
        if self._last and position == self.position - 1:
            self._is_back = True
            return position
        self._is_back = False
        while self.position < position and self.read(min(position - self.position, _PIECE_BYTES)):
            pass
        if self.position > position:
            raise ValueError(f"a member begins before the end of another, at byte {position}")
        return self.position

    def read(self, size: int = -1) -> bytes:
        if self._is_back and size > 0:
            self._is_back = False
            return self._last[-1:] + (self.read(size - 1) if size > 1 else b"")
        data = self._file.read(size)
        self.position += len(data)
        self._budget.spend(len(data))
        self._last = data
        return data

    def check_end(self) -> None:
        """Raises EOFError if the archive did not end as one does; reads on, so that a checksum is checked."""
        if self._last.strip(b"\0") or not self._last:
            raise EOFError("it ends without a block of zeros")
        while self.read(_PIECE_BYTES):
            pass

"""Appending to several files so that all of it is on disk, or none of it counts."""

from __future__ import annotations

import collections
import contextlib
import logging
import os
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from railbus_shared import files
from railbus_telemetry import closing

logger = logging.getLogger(__name__)

MAX_OPEN: Final = 8
_MAX_PIECES: Final = os.sysconf("SC_IOV_MAX")


class PlainFiles:
    """The plain files that grow, few of them open at a time; the least recently used is closed first.

    Attributes:
        suspects: files in an unknown state, because taking back a failed append failed too; they must be mended
            (`closing.mend_plain`) before they are used again.
    """

    def __init__(self) -> None:
        self.suspects: set[Path] = set()
        self._fds: OrderedDict[Path, int] = OrderedDict()

    def append(self, data: Mapping[Path, Sequence[bytes]]) -> None:
        """Append to each file and flush it; on any error cut all of them back to their former length.

        Raises StorageFull where a file found no space.
        """
        former: dict[Path, int] = {}
        try:
            for path, some in data.items():
                with files.storage_errors(path):
                    fd = self._fd(path)
                    former[path] = os.fstat(fd).st_size
                    _write(fd, some)
                    os.fdatasync(fd)
        except BaseException:
            for path, size_bytes in former.items():
                self._take_back(path, size_bytes)
            raise

    def close(self, path: Path) -> None:
        """Close one file, if it is open; what was appended is on disk already."""
        fd = self._fds.pop(path, None)
        if fd is not None:
            os.close(fd)

    def rename(self, path: Path, name: Path) -> None:
        """Give a file another name, over what has it; one that is open goes on to be appended to."""
        path.replace(name)
        self.close(name)
        fd = self._fds.pop(path, None)
        if fd is not None:
            self._fds[name] = fd

    def close_all(self) -> None:
        for path in list(self._fds):
            self.close(path)

    @property
    def num_open(self) -> int:
        return len(self._fds)

    def _fd(self, path: Path) -> int:
        fd = self._fds.get(path)
        if fd is not None and not _has_path(fd, path):
            logger.error("log was removed or moved away; a new one is begun", extra={"file": str(path)})
            self.close(path)
            fd = None
        if fd is None:
            fd = self._fds[path] = _opened(path)
        self._fds.move_to_end(path)
        while len(self._fds) > MAX_OPEN:
            self.close(next(iter(self._fds)))
        return fd

    def _take_back(self, path: Path, size_bytes: int) -> None:
        try:
            if size_bytes:
                closing.truncate(path, size_bytes)
            else:
                self.close(path)
                closing.remove(path)
        except OSError:
            logger.exception("cannot take back a failed append", extra={"file": str(path), "size_bytes": size_bytes})
            self.close(path)
            self.suspects.add(path)


def _has_path(fd: int, path: Path) -> bool:
    """Whether an open file still has its name: lines must not go where nobody looks for them."""
    try:
        return os.path.samestat(os.fstat(fd), path.stat())
    except FileNotFoundError:
        return False


def _write(fd: int, pieces: Sequence[bytes]) -> None:
    """All of it, in few calls: after each one this thread waits for the interpreter, which is at the next lines."""
    for start in range(0, len(pieces), _MAX_PIECES):
        left = collections.deque([memoryview(piece) for piece in pieces[start : start + _MAX_PIECES]])
        while left:
            written = os.writev(fd, list(left))
            while left and written >= len(left[0]):
                written -= len(left.popleft())
            if written:
                left[0] = left[0][written:]


def _opened(path: Path) -> int:
    """A descriptor that appends; a file or folder that is new has a durable name."""
    flags = os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC
    with contextlib.suppress(FileNotFoundError):
        return os.open(path, flags)
    if not path.parent.exists():
        path.parent.mkdir(parents=True)
        for folder in list(path.parents)[1:4]:
            files.fsync_dir(folder)
    fd = os.open(path, flags | os.O_CREAT, 0o644)
    files.fsync_dir(path.parent)
    return fd

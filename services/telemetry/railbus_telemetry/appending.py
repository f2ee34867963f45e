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

logger = logging.getLogger(__name__)

MAX_OPEN: Final = 8
_MAX_PIECES: Final = os.sysconf("SC_IOV_MAX")
_FOLDERS: Final = 5  # day, month, year, `logs`, and the root


class PlainFiles:
    """The plain files that grow, few of them open at a time; the least recently used is closed first.

    What a failed append has left of itself is cut off at once, or, where the disk fails at that too, before anything
    else is done (`settle`).
    """

    def __init__(self) -> None:
        self._fds: OrderedDict[Path, int] = OrderedDict()
        self._good_bytes: dict[Path, int] = {}
        """Lengths to which files have yet to be cut."""

    def append(self, data: Mapping[Path, Sequence[bytes]]) -> None:
        """Append to each file and flush it; on any error cut all of them back to their former length.

        Raises StorageFull where a file found no space.
        """
        self.settle()
        former: dict[Path, int] = {}
        try:
            for path, some in data.items():
                with files.storage_errors(path):
                    fd = self._fd(path)
                    former[path] = os.fstat(fd).st_size
                    if not former[path]:
                        make_name_durable(path)
                    _write(fd, some)
                    os.fdatasync(fd)
        except BaseException:
            for path, size_bytes in former.items():
                self._take_back(path, size_bytes)
            raise

    def settle(self) -> None:
        """Cut off what failed appends have left, if anything; raises OSError where the disk still fails."""
        for path, size_bytes in list(self._good_bytes.items()):
            cut(path, size_bytes)
            del self._good_bytes[path]

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
        self.close(path)
        try:
            cut(path, size_bytes)
        except OSError:
            logger.exception("cannot take back a failed append", extra={"file": str(path), "size_bytes": size_bytes})
            self._good_bytes[path] = size_bytes


def cut(path: Path, size_bytes: int) -> None:
    """Let a file end there, durably; one that would be empty goes, and one that is gone may be so."""
    with contextlib.suppress(FileNotFoundError):
        if not size_bytes:
            path.unlink()
            files.fsync_dir(path.parent)
            return
        fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
        try:
            if os.fstat(fd).st_size > size_bytes:
                os.ftruncate(fd, size_bytes)
            os.fsync(fd)
        finally:
            os.close(fd)


def make_name_durable(path: Path) -> None:
    """Before the first line of a file counts, so that whatever has lines is found."""
    for folder in path.parents[:_FOLDERS]:
        files.fsync_dir(folder)


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
    """A descriptor that appends; the file and its folders are made where there are none."""
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
    with contextlib.suppress(FileNotFoundError):
        return os.open(path, flags, 0o644)
    path.parent.mkdir(parents=True, exist_ok=True)
    return os.open(path, flags, 0o644)

"""A disk that fails at a chosen call, and what is left of it when power is lost at any.

`watched` lets every call that changes a tree, or makes it durable, pass by a `Watch` first. The calls are those of the
system: how often the code under test makes them is its own affair, and the tests count.
"""

from __future__ import annotations

import errno
import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

CHANGING = ("open", "mkdir", "writev", "ftruncate", "replace", "rename", "link", "unlink", "rmdir")
SYNCING = ("fdatasync", "fsync")
Target = int | str | Path


class Watch:
    """Does nothing; tests override what they need."""

    def __init__(self) -> None:
        self._is_looking = True

    @contextmanager
    def looking_away(self) -> Iterator[None]:
        """For what the test itself does."""
        self._is_looking = False
        try:
            yield
        finally:
            self._is_looking = True

    def watches(self, path: Path, root: Path) -> bool:
        return self._is_looking and path.is_relative_to(root)

    def before(self, call: str, target: Path, /) -> None:
        """May raise what the call is to raise."""

    def after(self, call: str, target: Path, /, *rest: Any) -> None:
        """The call has succeeded."""


@contextmanager
def watched(root: Path, watch: Watch, patch: pytest.MonkeyPatch) -> Iterator[None]:
    """Calls on what lies below the root pass by the watch."""

    def passing(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def passed(target: Target, *rest: Any, **named: Any) -> Any:
            path = _path_of(target)
            if path is None or not watch.watches(path, root):
                return call(target, *rest, **named)
            watch.before(name, path)
            result = call(target, *rest, **named)
            watch.after(name, path, *rest)
            return result

        return passed

    with patch.context() as patched:
        for name in CHANGING + SYNCING:
            patched.setattr(os, name, passing(name, getattr(os, name)))
        patched.setattr(io, "open", passing("open", io.open))
        yield


def _path_of(target: Target) -> Path | None:
    """Where an open file lies, or lay; None of what is no path."""
    if isinstance(target, int):
        return Path(f"/proc/self/fd/{target}").readlink()
    return Path(target) if isinstance(target, (str, Path)) else None


class FailsAt(Watch):
    """The so-manieth call fails, and as many after it as are said."""

    def __init__(self, number: int, error: int = errno.EIO, *, times: int = 1) -> None:
        super().__init__()
        self._number = number
        self._error = error
        self._times = times
        self.calls = 0

    def before(self, call: str, target: Path, /) -> None:
        self.calls += 1
        if self._number <= self.calls < self._number + self._times:
            raise OSError(self._error, f"{call}: {os.strerror(self._error)}", str(target))


class Durable(Watch):
    """What would be left of a tree if power were lost: files as they were flushed, names as their folders were.

    What was done to a folder and not flushed may have come to the disk all the same: all of it, or the last of it
    alone.
    """

    def __init__(self, root: Path, instant: Callable[[], None]) -> None:
        super().__init__()
        self._root = root
        self._instant = instant
        self._names: dict[Path, dict[str, int | None]] = {}
        """Of each folder that was flushed: its files by inode, its folders by None."""
        self._contents: dict[int, bytes] = {}
        self._held: list[int] = []
        """Descriptors, so that no inode is used twice."""
        self._last: tuple[Path, Path | None] | None = None
        """The last change of a name, if its folder is not flushed yet: from, and to."""

    def close(self) -> None:
        for fd in self._held:
            os.close(fd)

    def before(self, _call: str, _target: Path, /) -> None:
        with self.looking_away():
            self._instant()

    def after(self, call: str, target: Path, /, *rest: Any) -> None:
        if call in SYNCING:
            with self.looking_away():
                self._flush(target)
        elif call in ("replace", "rename", "unlink"):
            self._last = target, Path(rest[0]) if call != "unlink" else None

    def left(self, folder: Path) -> Iterator[Path]:
        """Trees that may be found afterwards."""
        trees = {"flushed": self._names, "all": _listed(self._root), "last": self._with_the_last()}
        for name, names in trees.items():
            self._write(names, self._root, folder / name)
            yield folder / name

    def _flush(self, path: Path) -> None:
        if path.is_dir():
            self._names[path] = _entries(path)
            if self._last is not None and path == self._last[0].parent:
                self._last = None
        else:
            fd = os.open(path, os.O_RDONLY)
            self._held.append(fd)
            self._contents[os.fstat(fd).st_ino] = os.pread(fd, os.fstat(fd).st_size, 0)

    def _with_the_last(self) -> dict[Path, dict[str, int | None]]:
        names = {folder: dict(entries) for folder, entries in self._names.items()}
        if self._last is not None:
            path, to = self._last
            gone = names.get(path.parent, {}).pop(path.name, None)
            if to is not None and gone is not None:
                names[to.parent][to.name] = gone
            elif to is not None and to.exists():
                names.setdefault(to.parent, {})[to.name] = to.stat().st_ino
        return names

    def _write(self, names: dict[Path, dict[str, int | None]], source: Path, target: Path) -> None:
        target.mkdir(parents=True)
        for name, inode in names.get(source, {}).items():
            if inode is None:
                self._write(names, source / name, target / name)
            else:
                (target / name).write_bytes(self._contents.get(inode, b""))


def _entries(folder: Path) -> dict[str, int | None]:
    return {one.name: None if one.is_dir() else one.inode() for one in os.scandir(folder)}


def _listed(folder: Path) -> dict[Path, dict[str, int | None]]:
    found = {folder: _entries(folder)}
    for path in folder.iterdir():
        if path.is_dir():
            found |= _listed(path)
    return found

"""Where a trainer works: in the folder that its job names, or in a fresh one that is removed after it.

A folder of a job's own choice must lie in one of `RAILBUS_RUNNER_WORKDIRS`, links followed. A fresh one lies under the
root's state; it is gone once the attempt has ended, with all that is in it. It is never the runner's own.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from railbus_shared.errors import InvalidField

logger = logging.getLogger(__name__)

_NAMED_FILES: Final = 10


@dataclass(frozen=True)
class Left:
    """What an attempt left in its fresh folder, and lost with it."""

    num_files: int
    names: tuple[str, ...]
    """Of the first few."""


class Workdirs:
    """The folders that trainers of this runner may work in."""

    def __init__(self, state: Path, *, allowed: Iterable[Path]) -> None:
        """`state` is a folder of this runner's alone."""
        self._state = state.resolve()
        self._allowed = tuple(path.resolve() for path in allowed)

    def make(self, attempt: str, *, wanted: str | None) -> Path:
        """The folder for an attempt. Raises InvalidField where the one that is wanted is none or is not allowed."""
        if wanted is not None:
            return self._checked(wanted)
        fresh = self._state / attempt
        _remove(fresh)
        fresh.mkdir(parents=True, mode=0o700)
        return fresh

    def remove(self, attempt: str) -> Left:
        """Remove the fresh folder of an attempt that has ended; one that never was is no error."""
        fresh = self._state / attempt
        files = _remove(fresh)
        return Left(len(files), tuple(files[:_NAMED_FILES]))

    def sweep(self, running: Iterable[str] = ()) -> None:
        """Remove the fresh folders of all attempts but these."""
        kept = set(running)
        for path in self._state.glob("*"):
            if path.name not in kept:
                _remove(path)

    def _checked(self, wanted: str) -> Path:
        folder = Path(wanted).resolve()
        if not any(folder.is_relative_to(allowed) for allowed in self._allowed):
            shown = ", ".join(map(str, self._allowed)) or "none"
            raise InvalidField(
                field="workdir",
                value=wanted,
                problem=f"this runner allows no such folder, but those in: {shown}",
                hint="leave it out for a fresh folder, or add one that holds it to RAILBUS_RUNNER_WORKDIRS",
            )
        if not folder.is_dir():
            raise InvalidField(
                field="workdir", value=wanted, problem="there is no such folder on the host", hint="make it first"
            )
        return folder


def _remove(fresh: Path) -> list[str]:
    """Remove a folder with all that is in it, and say which files were; links are not followed."""
    if fresh.is_symlink():  # its trainer has put it there
        fresh.unlink(missing_ok=True)
        return []
    files = sorted(str(path.relative_to(fresh)) for path in _opened(fresh))
    shutil.rmtree(fresh, ignore_errors=True)
    return files


def _opened(fresh: Path) -> Iterator[Path]:
    """All files; folders that the trainer has shut are opened on the way."""
    _open(fresh)
    for parent, folders, names in os.walk(fresh):
        for path in (Path(parent, name) for name in folders):
            if path.is_symlink():
                yield path
            else:
                _open(path)
        yield from (Path(parent, name) for name in names)


def _open(folder: Path) -> None:
    with contextlib.suppress(OSError):  # it is gone, or another user's
        folder.chmod(0o700)

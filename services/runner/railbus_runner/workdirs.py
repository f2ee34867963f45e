"""Where a trainer works: in the folder that its job names, or in a fresh one that is removed after it.

A folder of a job's own choice must lie in one of `RAILBUS_RUNNER_WORKDIRS`, links followed. A fresh one lies under the
root's state; it is gone once the attempt has ended, with all that is in it. It is never the runner's own.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterable
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
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir(parents=True, mode=0o700)
        return fresh

    def remove(self, attempt: str) -> Left:
        """Remove the fresh folder of an attempt that has ended; one that never was is no error."""
        fresh = self._state / attempt
        files = sorted(str(path.relative_to(fresh)) for path in fresh.rglob("*") if path.is_symlink() or path.is_file())
        shutil.rmtree(fresh, ignore_errors=True)
        return Left(len(files), tuple(files[:_NAMED_FILES]))

    def sweep(self, running: Iterable[str] = ()) -> None:
        """Remove the fresh folders of all attempts but these."""
        kept = set(running)
        for path in self._state.glob("*"):
            if path.name not in kept:
                shutil.rmtree(path, ignore_errors=True)

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

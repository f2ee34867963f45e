"""Stretches of time in which a checkpoint finds no room on its disk, and when it is worth while to try again."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

LOOK_S: Final = 1.0
"""Between two looks at the disk."""
_MAX_LOOK_S: Final = 60.0
_SLACK_BYTES: Final = 1 << 20
"""For the meta, the schema, and what the file system needs for them."""


def free_bytes(folder: Path) -> int:
    """What may be written under a folder, which need not exist yet, by others than root."""
    there = next(path for path in (folder, *folder.parents) if path.exists())
    found = os.statvfs(there)
    return found.f_bavail * found.f_frsize


class Room:
    """Of the disk that an attempt's checkpoints lie on.

    Attributes:
        needed_bytes: of the next checkpoint, as far as it is known.
    """

    def __init__(
        self,
        folder: Path,
        *,
        free: Callable[[Path], int] = free_bytes,
        clock_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self.needed_bytes: int | None = None
        self._folder = folder
        self._free = free
        self._clock_s = clock_s
        self._since_s: float | None = None
        self._look_s = LOOK_S
        self._next_look_s = 0.0

    @property
    def free_bytes(self) -> int:
        return self._free(self._folder)

    @property
    def is_full(self) -> bool:
        """Whether the last try found no room."""
        return self._since_s is not None

    def failed(self, needed_bytes: int | None) -> bool:
        """A try found no room; True if a stretch begins with that.

        Where there seemed to be room, as with a quota or where the size is not known, the next look comes later.
        """
        self.needed_bytes = needed_bytes or self.needed_bytes
        now_s = self._clock_s()
        begins, self._since_s = self._since_s is None, now_s if self._since_s is None else self._since_s
        self._look_s = LOOK_S if begins else min(2 * self._look_s, _MAX_LOOK_S)
        self._next_look_s = now_s + self._look_s
        return begins

    def written(self, size_bytes: int) -> float | None:
        """One was written, of this size; gives the seconds that the stretch lasted, or None if there was none."""
        since_s, self._since_s, self.needed_bytes = self._since_s, None, size_bytes
        return None if since_s is None else self._clock_s() - since_s

    def has_room(self) -> bool:
        """Whether a try may succeed now; looks at the disk now and then only."""
        now_s = self._clock_s()
        if now_s < self._next_look_s:
            return False
        self._next_look_s = now_s + self._look_s
        return self.needed_bytes is None or self.free_bytes >= self.needed_bytes + _SLACK_BYTES

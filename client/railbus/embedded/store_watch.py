"""Notices that nats-server refuses to write although the disk, which was full, has room again.

Once a write has failed for want of space, JetStream refuses every further write of that stream until the server is
started anew; nothing that it had acknowledged is lost by that. There is no way to ask the server for this state, but
it logs each refusal. A refusal that is logged while there has been room for a whole look means that it is stuck.
"""

from __future__ import annotations

import os
import shutil
from typing import Final

from railbus.embedded.server_config import ServerFiles

LOOK_S: Final = 2.0
ROOM_BYTES: Final = 32 << 20
"""Less than this is no room: what is freed is soon taken, and the server would only be started in vain."""
_REFUSED: Final = b"no space left on device"
_MOST_BYTES: Final = 1 << 20


class StoreWatch:
    """Of one server; `now_s` is any clock that only goes forward."""

    def __init__(self, where: ServerFiles) -> None:
        self._where = where
        self._look_at_s = 0.0
        self._seen_bytes = 0
        self._had_room = False

    def is_stuck(self, now_s: float) -> bool:
        """Looks every two seconds; between the looks the answer is no."""
        if now_s < self._look_at_s:
            return False
        self._look_at_s = now_s + LOOK_S
        had_room, self._had_room = self._had_room, shutil.disk_usage(self._where.folder).free >= ROOM_BYTES
        return self._is_refusing() and had_room and self._had_room

    def _is_refusing(self) -> bool:
        """Whether the log says so since the last look."""
        try:
            with self._where.log.open("rb") as log:
                size = log.seek(0, os.SEEK_END)
                first, self._seen_bytes = min(self._seen_bytes, size), size
                log.seek(max(first, size - _MOST_BYTES))
                return _REFUSED in log.read()
        except FileNotFoundError:
            return False

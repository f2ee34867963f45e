"""On which root the log of a store is written: on one at a time, wherever telemetry is started.

Telemetry services on different roots take from the same durable consumer, so each would write a part of the log, and
none of them would know. So whoever writes keeps a key in the store that names its root, and writes it again at a third
of a lease's life. While that goes on, another root is refused. Once it does not, the log goes on in the other root, for
the host that had it may be lost; and that is told.

No two clocks are compared: a key that does not change for a lease's life, as its reader counts it, is nobody's.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from railbus_shared import files
from railbus_shared.bus.bucket import Bucket, Entry, Write
from railbus_shared.errors import BadSetting, RevisionConflict, TransientError
from railbus_shared.subjects import LOG_KEY
from railbus_shared.waiting import is_set_within

logger = logging.getLogger(__name__)

_LOOKS: Final = 6
"""At a key of another root, within a lease's life; it is written three times in that."""
_AGAIN_S: Final = 1.0


@dataclass(frozen=True)
class LogRoot:
    """A root that holds a log, and where it is."""

    id: str
    """Random; it goes with the folder, whatever its path is on another host."""
    path: str
    host: str

    @classmethod
    def here(cls, path: Path, *, state: Path, host: str) -> LogRoot:
        """That of this process; its id is made with it. The caller holds the root's lock."""
        file = state / "log-root"
        if not file.exists():
            files.write_whole(file, f"{secrets.token_hex(8)}\n".encode())
        return cls(file.read_text().strip(), str(path.absolute()), host)

    @classmethod
    def parse(cls, value: Mapping[str, object]) -> LogRoot:
        return cls(*(str(value.get(name, "?")) for name in ("id", "path", "host")))

    def to_map(self) -> dict[str, object]:
        return {"id": self.id, "path": self.path, "host": self.host}


class LogClaim:
    """The key of one writer."""

    def __init__(self, bucket: Bucket, root: LogRoot, *, ttl_s: float) -> None:
        self._bucket = bucket
        self._root = root
        self._ttl_s = ttl_s
        self._revision = 0

    async def take(self, stopping: asyncio.Event) -> LogRoot | None:
        """Take the key; returns the other root that had it before, if one had, or None, also once told to stop.

        Raises BadSetting if that one is written now.
        """
        while not stopping.is_set():
            try:
                before = await self._before(stopping)
                if not stopping.is_set():
                    self._revision = await self._bucket.write(
                        Write(LOG_KEY, self._root.to_map(), before.revision if before else 0)
                    )
                    return self._other(before)
            except TransientError as exc:  # NATS is away, or somebody was quicker
                logger.info("log not claimed yet", extra={"problem": str(exc)})
                await is_set_within(stopping, _AGAIN_S)
        return None

    async def keep(self) -> None:
        """Write the key again and again; raises BadSetting once another root has it."""
        while True:
            await asyncio.sleep(self._ttl_s / 3)
            with contextlib.suppress(TransientError):  # without NATS nobody writes, neither here nor elsewhere
                await self._renew()

    async def _renew(self) -> None:
        try:
            self._revision = await self._bucket.write(Write(LOG_KEY, self._root.to_map(), self._revision))
        except RevisionConflict:
            found = await self._bucket.get_with_deleted(LOG_KEY)
            if (other := self._other(found)) is not None:
                raise self._refused(other) from None
            self._revision = found.revision if found else 0  # an acknowledgement was lost, or the store is another one

    async def _before(self, stopping: asyncio.Event) -> Entry | None:
        """What the key was last, if it is free to be taken; raises BadSetting."""
        found = await self._bucket.get_with_deleted(LOG_KEY)
        other = self._other(found)
        if found is None or other is None:
            return found
        logger.warning("the log was written on another root", extra={"path": other.path, "its_host": other.host})
        for _ in range(_LOOKS):
            if await is_set_within(stopping, self._ttl_s / _LOOKS):
                return None
            now = await self._bucket.get_with_deleted(LOG_KEY)
            if now is None or now.revision != found.revision:
                raise self._refused(self._other(now) or other)
        return found

    def _other(self, entry: Entry | None) -> LogRoot | None:
        """The root that an entry names, if it is not this one."""
        if entry is None or entry.value is None or entry.value.get("id") == self._root.id:
            return None
        return LogRoot.parse(entry.value)

    def _refused(self, other: LogRoot) -> BadSetting:
        return BadSetting(
            f"setting RAILBUS_ROOT has value {self._root.path!r}, but the log of this NATS is written on another root: "
            f"{other.path!r} of host {other.host!r}",
            hint="run telemetry on one host only, or give all of them one root that they share; see docs/operations.md",
        )

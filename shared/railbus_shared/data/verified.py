"""What tells that a file which was verified once is still the same, and a memory of such files.

A file counts as verified for as long as its size, modification time and inode stay what they were when it was hashed.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Final, NamedTuple

import orjson

from railbus_shared import files

logger = logging.getLogger(__name__)

_MAX_ENTRIES: Final = 100_000
_CLOCK_TICK_S: Final = 0.02
"""File systems stamp with a clock that ticks every 1 to 10 ms."""


class Fingerprint(NamedTuple):
    """What tells that a file has not been touched, without reading it."""

    size: int
    mtime_ns: int
    inode: int

    @classmethod
    def of(cls, path: Path) -> Fingerprint:
        return cls._from(path.stat())

    @classmethod
    def of_open(cls, fd: int) -> Fingerprint:
        return cls._from(os.fstat(fd))

    @classmethod
    def _from(cls, status: os.stat_result) -> Fingerprint:
        return cls(status.st_size, status.st_mtime_ns, status.st_ino)

    @classmethod
    def settled(cls, path: Path) -> Fingerprint:
        """The fingerprint of a file whose next change will show in it.

        A change within the tick of the clock that stamped the last one would leave the time as it is, so that is
        waited for. Source: "racily clean" entries, git's Documentation/technical/racy-git.txt.
        """
        age_s = time.time() - path.stat().st_mtime
        if age_s < _CLOCK_TICK_S:
            time.sleep(_CLOCK_TICK_S)
        return cls.of(path)


class Verified(NamedTuple):
    """A file as it was when it was hashed."""

    fingerprint: Fingerprint
    sha256: str


def read_verified(memory: Path) -> dict[str, Verified]:
    """What is remembered, by path, the oldest first; a damaged memory is forgotten, which costs a hashing."""
    try:
        found = orjson.loads(memory.read_bytes())
        return {
            str(path): Verified(Fingerprint(int(size), int(mtime_ns), int(inode)), str(sha256))
            for path, (size, mtime_ns, inode, sha256) in found.items()
        }
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, AttributeError) as exc:
        logger.warning("memory of verified shards is damaged", extra={"path": str(memory), "problem": repr(exc)})
        return {}


def write_verified(memory: Path, known: Mapping[str, Verified]) -> None:
    """Remember the newest of these; raises OSError, StorageFull."""
    content = {path: [*one.fingerprint, one.sha256] for path, one in list(known.items())[-_MAX_ENTRIES:]}
    memory.parent.mkdir(parents=True, exist_ok=True)
    files.write_whole(memory, orjson.dumps(content))

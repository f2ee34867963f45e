"""The hidden file beside the logs that remembers what the closed files hold, so that a start need not read them.

It is saved before a plain file goes. It may be lost: then the newest days are read instead. It is never half believed:
its content stands under its own hash.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Final

import orjson

from railbus_shared import files
from railbus_telemetry import mending
from railbus_telemetry.seen import Seen

logger = logging.getLogger(__name__)

SIDECAR_NAME: Final = ".seen.json"
_MAX_DAYS: Final = 64


@dataclass
class Sidecar:
    """What is remembered."""

    seen: Seen = field(default_factory=Seen)
    closed_bytes: dict[str, int] = field(default_factory=dict)
    """Size of the closed file of each day, `YYYY-MM-DD`, that is known to be whole."""

    def knows_closed(self, day: date, closed_bytes: int) -> bool:
        """Whether a closed file is as this or a former writer left it: whole, and its keys are among those seen."""
        return self.closed_bytes.get(day.isoformat()) == closed_bytes

    def check_closed(self, day: date, closed: Path) -> None:
        """See that a day's closed file is whole, if there is one and it is not known; raises StorageFull, OSError."""
        if closed.exists() and not self.knows_closed(day, closed.stat().st_size):
            self.closed_bytes[day.isoformat()] = mending.mend_closed(closed)

    def content(self, *, incarnation: str) -> dict[str, object]:
        """What to save of it as it is now."""
        newest = sorted(self.closed_bytes)[-_MAX_DAYS:]
        return {
            "incarnation": incarnation,
            "closed_bytes": {day: self.closed_bytes[day] for day in newest},
            "seen": self.seen.to_map(),
        }

    @staticmethod
    def save(path: Path, content: Mapping[str, object]) -> None:
        """Write a content in one step; raises StorageFull."""
        digest = hashlib.sha256(orjson.dumps(content)).hexdigest()
        files.write_whole(path, orjson.dumps({"v": 1, "sha256": digest, "content": content}))

    @classmethod
    def load(cls, path: Path) -> Sidecar | None:
        """What was saved; None, and a warning, if it is missing or damaged."""
        try:
            return cls._parsed(path.read_bytes())
        except FileNotFoundError:
            return None
        except ValueError as exc:
            logger.warning("sidecar of the logs is damaged", extra={"file": str(path), "problem": str(exc)})
            return None

    @classmethod
    def _parsed(cls, data: bytes) -> Sidecar:
        """Raises ValueError."""
        match orjson.loads(data):
            case {
                "v": 1,
                "sha256": str(digest),
                "content": {"closed_bytes": dict(sizes), "seen": dict(seen)} as content,
            }:
                if hashlib.sha256(orjson.dumps(content)).hexdigest() == digest:
                    return cls(Seen.from_map(seen), sizes)
                raise ValueError("its hash does not match")
        raise ValueError("it is none of ours")

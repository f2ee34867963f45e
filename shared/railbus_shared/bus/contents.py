"""What a stream holds: on which subjects, and since when."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from railbus_shared import clock
from railbus_shared.bus.connection import Bus
from railbus_shared.errors import BusUnavailable


@dataclass(frozen=True)
class Contents:
    """Of a stream at one moment."""

    subjects: frozenset[str]
    """Those asked for on which there are messages."""
    first_ns: int | None
    """When its oldest message was stored; None for an empty stream."""


async def contents(bus: Bus, stream: str, pattern: str) -> Contents:
    """What a stream holds on the subjects that match a pattern; messages are not read.

    Raises RequestTimeout, BusUnavailable.
    """
    found: set[str] = set()
    while True:
        answer: dict[str, Any] = await bus.api(
            f"STREAM.INFO.{stream}", {"subjects_filter": pattern, "offset": len(found)}
        )
        if "error" in answer:
            raise BusUnavailable(f"stream {stream!r} cannot be looked at: {answer['error']}")
        state = answer["state"]
        page = state.get("subjects") or {}
        found |= page.keys()
        if not page or len(found) >= int(answer.get("total", 0)):
            first_ns = clock.parse_rfc3339(state["first_ts"]) if state["messages"] else None
            return Contents(frozenset(found), first_ns)

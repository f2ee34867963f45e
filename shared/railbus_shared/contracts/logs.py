"""What telemetry is asked about the log files, and what it answers."""

from __future__ import annotations

from datetime import date
from typing import Annotated

from pydantic import AfterValidator, Field, WithJsonSchema

from railbus_shared.contracts.model import Contract, Id, Items, Time

PLACE_PATTERN = r"^[0-9]{4}-[0-9]{2}-[0-9]{2}/[0-9]{1,18}\+?/[0-9]{1,18}$"


def _existing(place: str) -> str:
    date.fromisoformat(place[:10])
    return place


LogPlace = Annotated[
    str,
    Field(pattern=PLACE_PATTERN),
    AfterValidator(_existing),
    WithJsonSchema({"type": "string", "pattern": PLACE_PATTERN, "examples": ["2026-11-23/40960/1234"]}),
]
"""Where an event stands in the log: day, member of its file (with a `+` the one behind it), byte in that.

It stands there for good.
"""


class QueryEvents(Contract):
    """Asks telemetry for events from the files, oldest first."""

    job: Id | None = None
    types: Items[str] = ()
    """Only types that begin with one of these."""
    since: Time | None = None
    until: Time | None = None
    """Only events before this time."""
    limit: int = Field(default=200, ge=1, le=1000)
    """The newest that match, at most so many."""
    before: LogPlace | None = None
    """Only events that stand before this place: `older` of a former answer."""


class EventLines(Contract):
    """Answer to QueryEvents: events as they stand in the files."""

    events: Items[dict[str, object]]
    truncated: bool = False
    """Whether older events match as well."""
    older: LogPlace | None = None
    """Where to ask on for those, as `before`."""

"""Events: immutable facts, alone or in a batch of one job and one kind."""

from __future__ import annotations

from collections.abc import Mapping, Sized
from typing import Final, Literal, NamedTuple

import orjson
from pydantic import Field, ValidationInfo, field_validator

from railbus_shared.contracts.model import Contract, Count, Id, Items, JsonMap, Time

Severity = Literal["debug", "info", "warning", "error"]

BATCHED_TYPES: Final = frozenset({"train.metrics", "log.line", "job.output"})
"""Types that go in batches and may thin out under pressure; all others are facts, and go alone."""

MAX_REPEATED_BYTES: Final = 4 << 20
"""Of one batch: some half a megabyte could otherwise become two gigabytes of lines."""


class EventKey(NamedTuple):
    """What an event is known by; telemetry writes each key once."""

    producer: str
    number: int


class Event(Contract):
    """One immutable fact. (producer, number) is its key; its id is both, and is the `Nats-Msg-Id`."""

    v: Literal[1] = 1
    id: str = Field(max_length=128)
    type: str = Field(pattern=r"^[a-z][a-z0-9_]*(\.[a-z][a-z0-9_]*)+$", max_length=64)
    """`<area>.<what>` in the past tense, for instance `job.placed`."""
    time: Time
    producer: Id
    """One start of one process; `job-queued-` and `job-ended-<incarnation>` for what more than one may have to tell."""
    number: int = Field(ge=1)
    """Counted by the producer as its events leave for the bus, without gaps; of those two, the job's `sequence`."""
    severity: Severity = "info"
    source: str = Field(max_length=64)
    """The kind of process: device_manager, dataloader, runner, trainer, telemetry, cli, or a user's own word."""
    host: Id
    job: Id | None = None
    attempt: int | None = None
    lease_epoch: int | None = None
    step: Count | None = None
    trace: str | None = Field(default=None, max_length=128)
    """W3C `traceparent`."""
    data: JsonMap = Field(default_factory=dict)


class EventBatch(Contract):
    """Several events of one job and one kind; `common` holds what all of them share, each event the rest."""

    v: Literal[1] = 1
    common: JsonMap
    """Written anew for each event: no more than 4 MiB altogether."""
    events: Items[JsonMap] = Field(min_length=1, max_length=4096)

    @field_validator("events")
    @classmethod
    def _is_no_bomb(cls, events: tuple[JsonMap, ...], info: ValidationInfo) -> tuple[JsonMap, ...]:
        size_bytes = repeated_bytes(info.data.get("common", {}), events)
        if size_bytes > MAX_REPEATED_BYTES:
            raise ValueError(f"what is in common would be written {len(events)} times, which takes {size_bytes} bytes")
        return events


def repeated_bytes(common: Mapping[str, object], events: Sized) -> int:
    """What the common part of a batch takes once each event has it."""
    return len(orjson.dumps(common)) * len(events)

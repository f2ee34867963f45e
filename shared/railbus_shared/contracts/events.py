"""Events: immutable facts, alone or in a batch of one job and one kind."""

from __future__ import annotations

from typing import Final, Literal, NamedTuple

from pydantic import Field

from railbus_shared.contracts.model import Contract, Count, Id, Items, JsonMap, Time

Severity = Literal["debug", "info", "warning", "error"]

BATCHED_TYPES: Final = frozenset({"train.metrics", "log.line", "job.output"})
"""Types that go in batches and may thin out under pressure; all others are facts, and go alone."""


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
    events: Items[JsonMap] = Field(min_length=1, max_length=4096)

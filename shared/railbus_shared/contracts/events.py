"""Events: immutable facts, alone or in a batch of one job and one kind."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sized
from typing import Annotated, Final, Literal, NamedTuple, Self

import orjson
from pydantic import Field, JsonValue, ValidationInfo, field_validator, model_validator

from railbus_shared import clock
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


def teller(producer: str, person: object) -> str:
    """Under which name an event's number counts: of a service, or of a person (`subjects.told_by`), each by themselves.

    No person can use up the numbers of a service, nor of another person. No id has a slash.
    """
    return f"{person}/{producer}" if person else producer


def person_of(name: str) -> str:
    """The person in the name of a teller; empty for a service."""
    return name.rpartition("/")[0]


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
        _check_repeated(info.data.get("common", {}), events)
        return events


def repeated_bytes(common: Mapping[str, object], events: Sized, *, names: Iterable[str] = ()) -> int:
    """What the common part of a batch, and the names of its columns, take once each event has them."""
    return (len(orjson.dumps(common)) + len(orjson.dumps([*names]))) * len(events)


def _check_repeated(common: Mapping[str, object], events: Sized, *, names: Iterable[str] = ()) -> None:
    size_bytes = repeated_bytes(common, events, names=names)
    if size_bytes > MAX_REPEATED_BYTES:
        raise ValueError(f"what is said once would be written {len(events)} times, which takes {size_bytes} bytes")


MAX_TOGETHER: Final = 4096
"""Events in one batch."""
END_NS: Final = 2**63
"""Nanoseconds since 1970 that no time in `EventColumns` reaches; in the year 2262."""
_Number = Annotated[int, Field(ge=1, le=2**64 - 1)]


class EventTimes(Contract):
    """The times of several events: of the first, and how long after the one before each of the others was."""

    first: Time
    gaps_ns: Items[int] = Field(default=(), max_length=MAX_TOGETHER - 1)
    """Nanoseconds; negative where a clock was set back."""


class EventColumns(Contract):
    """A batch, version 2: events of one producer with the same fields, field by field; of version 1 for all others.

    The id of each event is `<producer>-<number>`. Every column has as many values as there are times.
    """

    v: Literal[2] = 2
    common: JsonMap
    """Fields that all events share, `producer` among them."""
    time: EventTimes
    number: _Number | Items[_Number]
    """Of the first event, where the others follow without gaps; else of each."""
    step: Items[Count] | None = None
    data: dict[str, Items[JsonValue]] = Field(default_factory=dict)
    """What the events' data hold, name by name. Names and `common`, written anew for each event, take 4 MiB at most."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        count = len(self.time.gaps_ns) + 1
        _check_repeated(self.common, range(count), names=self.data)
        if type(self.common.get("producer")) is not str:
            raise ValueError("common names no producer")
        columns = [*self.data.values(), *(column for column in (self.step, self.number) if isinstance(column, tuple))]
        if any(len(column) != count for column in columns):
            raise ValueError(f"a column has not as many values as there are times, {count}")
        if isinstance(self.number, int) and self.number + count > 2**64:
            raise ValueError("the numbers need more than 64 bits")
        at_ns = clock.parse_rfc3339(self.time.first)
        for gap_ns in (0, *self.time.gaps_ns):
            at_ns += gap_ns
            if not 0 <= at_ns < END_NS:
                raise ValueError("a time is before 1970 or after 2261")
        return self

"""Submissions: from a job event in the stream to a job record, once, or to a refusal that says why.

Both forms of submission take the same way through the stream of jobs. The request form names an inbox in a header of
its event and waits there for the outcome; whichever device_manager handles the event answers.
"""

from __future__ import annotations

import contextlib
import difflib
import re
import secrets
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Final

from railbus_device_manager.reasons import ITS_SUBMITTER
from railbus_shared import clock, names, tracing, wire
from railbus_shared.bus.connection import Bus, Outgoing
from railbus_shared.bus.consume import Delivery
from railbus_shared.contracts.jobs import JobRecord, JobSpec
from railbus_shared.effects import tell_queued
from railbus_shared.errors import (
    BadMessage,
    InvalidField,
    JobNotFound,
    RailbusError,
    RejectedError,
    UnknownEntrypoint,
    WireError,
    error_from_wire,
)
from railbus_shared.records import HeldRecord, JobRecords
from railbus_shared.telemetry import LearningTelemetry

OUTCOME_HEADER: Final = "Railbus-Outcome"
RETRY_HEADER: Final = "Railbus-Retry-Of"
_OUTCOME_S: Final = 10.0
OWN_ID: Final = re.compile(r"j-[0-9a-f]{6}-\d+\Z")

Refusals = Callable[[Sequence[JobSpec]], Awaitable[list[RailbusError | None]]]
"""What each job is to be refused for, if for anything."""


def own_id(incarnation: str, sequence: int) -> str:
    """The id of a job that was submitted without one; a publisher can compute it from the stream's acknowledgement."""
    return f"j-{incarnation[:6]}-{sequence}"


def new_record(spec: JobSpec, *, sequence: int, incarnation: str, now: str, retry_of: str | None = None) -> JobRecord:
    """The first record of a job."""
    job = spec.id or own_id(incarnation, sequence)
    return JobRecord(
        id=job,
        spec=spec,
        spec_sha256=spec.digest,
        sequence=sequence,
        incarnation=incarnation,
        priority=spec.priority,
        held_by=(spec.owner or ITS_SUBMITTER) if spec.held else None,
        retry_of=retry_of,
        trace=tracing.of_job(job, incarnation=incarnation, submitter=spec.trace),
        submitted_at=now,
        changed_at=now,
    )


def check_entrypoint(name: str, offered: Iterable[str]) -> None:
    """Raises UnknownEntrypoint with the nearest name, unless some runner offers it."""
    known = sorted(offered)
    if name in known:
        return
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"runners offer: {', '.join(known[:20]) or 'none'}"
    raise UnknownEntrypoint(
        f"field 'entrypoint' has value {name!r}: no runner offers it",
        hint=hint,
        details={"field": "entrypoint", "value": name},
    )


class Submissions:
    """Takes job events from the stream, and puts those into it that come as requests."""

    def __init__(
        self,
        bus: Bus,
        records: JobRecords,
        telemetry: LearningTelemetry,
        *,
        refusals: Refusals,
        accepted: Callable[[HeldRecord], None],
    ) -> None:
        self._bus = bus
        self._records = records
        self._telemetry = telemetry
        self._refusals = refusals
        self._accepted = accepted

    async def submit(self, spec: JobSpec, *, retry_of: str | None = None) -> JobRecord:
        """Publish a job event and wait for its outcome; raises what the submission was refused for."""
        async with self._bus.inbox() as (inbox, next_message):
            retry = {} if retry_of is None else {RETRY_HEADER: retry_of}
            event = Outgoing(
                self._bus.subjects.submit,
                wire.encode(spec.to_map()),
                msg_id=secrets.token_hex(12),
                headers={OUTCOME_HEADER: inbox, **retry},
            )
            await self._bus.publish(event)
            outcome = wire.decode(await next_message(_OUTCOME_S))
        if "code" in outcome:
            raise error_from_wire(outcome)
        return JobRecord.parse(outcome)

    async def take(self, deliveries: list[Delivery]) -> list[Exception | None]:
        """Handle events of the stream, in their order; idempotent, for they may come again.

        What a flood costs is shared: one question about each dataset, and one atomic batch of records.
        """
        read = [self._read(delivery) for delivery in deliveries]
        refused = iter(await self._refusals([one.spec for one in read if isinstance(one, JobRecord)]))
        checked = [
            await self._standing(one, next(refused), delivery) if isinstance(one, JobRecord) else one
            for one, delivery in zip(read, deliveries, strict=True)
        ]
        created = iter(await self._records.create_all([one for one in checked if isinstance(one, JobRecord)]))
        outcomes = [next(created) if isinstance(one, JobRecord) else one for one in checked]
        for delivery, outcome in zip(deliveries, outcomes, strict=True):
            await self._conclude(delivery, outcome)
        return [outcome if isinstance(outcome, RailbusError) else None for outcome in outcomes]

    async def _standing(
        self, fresh: JobRecord, refusal: RailbusError | None, delivery: Delivery
    ) -> JobRecord | RailbusError:
        """The record that is to be there, or why none is; what was accepted once is not refused when it comes again."""
        comes_again = delivery.delivered > 1 or fresh.spec.id is not None
        if isinstance(refusal, RejectedError) and comes_again:
            with contextlib.suppress(JobNotFound):
                if (await self._records.get(fresh.id)).record.spec_sha256 == fresh.spec_sha256:
                    return fresh
        return refusal or fresh

    def _read(self, delivery: Delivery) -> JobRecord | RailbusError:
        """The record that an event asks for."""
        try:
            if delivery.is_malformed:
                raise BadMessage("the headers of the job event cannot be read", hint="send none, or valid ones")
            spec = _traced(JobSpec.parse(wire.decode(delivery.data)), delivery)
            if spec.id is not None and OWN_ID.match(spec.id):
                raise InvalidField(
                    field="id", value=spec.id, problem="ids of this form are given by railbus", hint="choose another id"
                )
        except WireError as exc:
            return exc
        return new_record(
            spec,
            sequence=delivery.sequence,
            incarnation=self._bus.incarnation,
            now=clock.now(),
            retry_of=_retry_of(delivery),
        )

    async def _conclude(self, delivery: Delivery, outcome: HeldRecord | RailbusError) -> None:
        """Tell everyone what became of an event; nothing yet of one that is to be tried again."""
        if isinstance(outcome, HeldRecord):
            record = outcome.record
            if (record.sequence, record.incarnation) == (delivery.sequence, self._bus.incarnation):
                tell_queued(self._telemetry, outcome)  # whoever had this event before may not have come to tell it
            self._accepted(outcome)
            await self._tell(delivery, record.to_map)
        elif isinstance(outcome, WireError | RejectedError):
            self._reject(delivery, outcome)
            await self._tell(delivery, outcome.to_wire)

    def _reject(self, delivery: Delivery, error: RailbusError) -> None:
        self._telemetry.event(
            "job.rejected",
            job=own_id(self._bus.incarnation, delivery.sequence),
            severity="warning",
            error=error.to_wire(),
            bytes=len(delivery.data),
        )

    async def _tell(self, delivery: Delivery, outcome: Callable[[], dict[str, object]]) -> None:
        """Whoever publishes may set the header; it counts where device_managers listen, who alone have a use for it."""
        inbox = delivery.headers.get(OUTCOME_HEADER, "")
        if self._bus.client.is_own_inbox(inbox):
            await self._bus.send(inbox, wire.encode(outcome()))


def _traced(spec: JobSpec, delivery: Delivery) -> JobSpec:
    """With the trace context of the event's header, for a publisher who has put it there."""
    context = tracing.parsed(delivery.headers.get(tracing.HEADER))
    return spec if spec.trace is not None or context is None else spec.changed(trace=str(context))


def _retry_of(delivery: Delivery) -> str | None:
    """The job that this one repeats; what cannot be an id is nobody's."""
    said = delivery.headers.get(RETRY_HEADER, "")
    return said if re.fullmatch(names.ID_PATTERN, said) else None

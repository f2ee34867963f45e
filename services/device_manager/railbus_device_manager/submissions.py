"""Submissions: from a job event in the stream to a job record, once, or to a refusal that says why.

Both forms of submission take the same way through the stream of jobs. The request form names an inbox in a header of
its event and waits there for the outcome; whichever device_manager handles the event answers.
"""

from __future__ import annotations

import difflib
import re
import secrets
from collections.abc import Awaitable, Callable, Iterable
from typing import Final

from railbus_shared import clock, names, wire
from railbus_shared.bus.connection import Bus, Outgoing
from railbus_shared.bus.consume import Delivery
from railbus_shared.contracts.jobs import JobRecord, JobSpec
from railbus_shared.errors import (
    BadMessage,
    InvalidField,
    NotSupported,
    RailbusError,
    RejectedError,
    TransientError,
    UnknownEntrypoint,
    WireError,
    error_from_wire,
)
from railbus_shared.records import HeldRecord, JobRecords
from railbus_shared.subjects import is_inbox
from railbus_shared.telemetry import LearningTelemetry

OUTCOME_HEADER: Final = "Railbus-Outcome"
RETRY_HEADER: Final = "Railbus-Retry-Of"
_OUTCOME_S: Final = 10.0
OWN_ID: Final = re.compile(r"j-[0-9a-f]{6}-\d+\Z")

_NOT_YET: Final = ("stall_s", "on_stall", "workdir")
"""Fields of a spec that this version reads and does not act on."""

OfferedEntrypoints = Callable[[], Awaitable[frozenset[str] | None]]
"""Entrypoints that some runner offers; None if no runner is known."""


def own_id(incarnation: str, sequence: int) -> str:
    """The id of a job that was submitted without one; a publisher can compute it from the stream's acknowledgement."""
    return f"j-{incarnation[:6]}-{sequence}"


def new_record(spec: JobSpec, *, sequence: int, incarnation: str, now: str, retry_of: str | None = None) -> JobRecord:
    """The first record of a job."""
    return JobRecord(
        id=spec.id or own_id(incarnation, sequence),
        spec=spec,
        spec_sha256=spec.digest,
        sequence=sequence,
        incarnation=incarnation,
        priority=spec.priority,
        retry_of=retry_of,
        submitted_at=now,
        changed_at=now,
    )


def check_supported(spec: JobSpec) -> None:
    """Raises NotSupported for a wish that nobody would act on, rather than forget it in silence."""
    plain = {name: info.default for name, info in type(spec).model_fields.items()}
    said = [name for name in _NOT_YET if getattr(spec, name) != plain[name]]
    if said:
        raise NotSupported(f"field {said[0]!r} is not supported yet", hint="leave it out", details={"field": said[0]})


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
        offered: OfferedEntrypoints,
        check_fits: Callable[[JobSpec], None],
        accepted: Callable[[HeldRecord], None],
    ) -> None:
        self._bus = bus
        self._records = records
        self._telemetry = telemetry
        self._offered = offered
        self._check_fits = check_fits
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

    async def take(self, delivery: Delivery) -> None:
        """Handle one event of the stream; idempotent, for it may come again."""
        try:
            held = await self._accept(delivery)
        except (WireError, RejectedError) as exc:
            self._reject(delivery, exc)
            await self._tell(delivery, exc.to_wire())
            raise
        self._accepted(held)
        await self._tell(delivery, held.record.to_map())

    async def _accept(self, delivery: Delivery) -> HeldRecord:
        if delivery.is_malformed:
            raise BadMessage("the headers of the job event cannot be read", hint="send none, or valid ones")
        spec = JobSpec.parse(wire.decode(delivery.data))
        if spec.id is not None and OWN_ID.match(spec.id):
            raise InvalidField(
                field="id", value=spec.id, problem="ids of this form are given by railbus", hint="choose another id"
            )
        fresh = new_record(
            spec,
            sequence=delivery.sequence,
            incarnation=self._bus.incarnation,
            now=clock.now(),
            retry_of=_retry_of(delivery),
        )
        await self.check(spec)
        held = await self._records.create(fresh)
        if held.record == fresh:
            self._telemetry.event(
                "job.queued",
                job=fresh.id,
                model=spec.model,
                dataset=spec.dataset,
                entrypoint=spec.entrypoint,
                revision=held.revision,
            )
        return held

    async def check(self, spec: JobSpec) -> None:
        """Refuse at once what no runner, no device and no dataloader could ever do."""
        check_supported(spec)
        offered = await self._offered()
        if offered is not None:
            check_entrypoint(spec.entrypoint, offered)
        self._check_fits(spec)
        try:
            await self._bus.request(self._bus.subjects.request("data", "describe"), {"dataset": spec.dataset})
        except TransientError:
            return  # no dataloader answers now; the job waits, and its runner will look again

    def _reject(self, delivery: Delivery, error: RailbusError) -> None:
        self._telemetry.event(
            "job.rejected",
            job=own_id(self._bus.incarnation, delivery.sequence),
            severity="warning",
            error=error.to_wire(),
            bytes=len(delivery.data),
        )

    async def _tell(self, delivery: Delivery, outcome: dict[str, object]) -> None:
        inbox = delivery.headers.get(OUTCOME_HEADER, "")
        if is_inbox(inbox):
            await self._bus.send(inbox, wire.encode(outcome))


def _retry_of(delivery: Delivery) -> str | None:
    """The job that this one repeats; what cannot be an id is nobody's."""
    said = delivery.headers.get(RETRY_HEADER, "")
    return said if re.fullmatch(names.ID_PATTERN, said) else None

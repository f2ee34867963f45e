"""Telling the events that a decision about a job asks for.

What must be told even if its teller is killed has a key that everyone can compute, so that others may tell it as well:
it is written down once. The number is the job's `sequence`, since jobs begin and end about in that order.
"""

from __future__ import annotations

from collections.abc import Mapping

from railbus_shared import tracing
from railbus_shared.conclusion import end_told
from railbus_shared.contracts.events import EventKey
from railbus_shared.contracts.jobs import JobRecord
from railbus_shared.records import Applied, HeldRecord
from railbus_shared.telemetry import About, LearningTelemetry


def tell(
    telemetry: LearningTelemetry,
    applied: Applied,
    more: Mapping[str, object] | None = None,
    *,
    step: int | None = None,
) -> None:
    """Record the events, with what else is known of them; once the record is written.

    Each carries the record's revision: the order in which all jobs changed, whatever clocks say.
    """
    before, after = applied.decision.before, applied.record
    attempt = max(before.attempt, after.attempt) or None  # one that did not count is named too
    about = About(after.id, attempt, after.lease_epoch or None, step, _trace_of(after))
    key = end_key(after) if after.is_final else None
    for told in applied.decision.told:
        data = {**told.data, **(more or {}), "revision": applied.revision}
        telemetry.record(told.what, data, about=about, severity=told.severity, key=key)


def tell_end(telemetry: LearningTelemetry, held: HeldRecord) -> None:
    """Tell the end that a final record states, in place of whoever wrote it."""
    record, told = held.record, end_told(held.record)
    about = About(record.id, record.attempt or None, record.lease_epoch or None, trace=_trace_of(record))
    data = {**told.data, "revision": held.revision}
    telemetry.record(told.what, data, about=about, severity=told.severity, key=end_key(record))


def tell_queued(telemetry: LearningTelemetry, held: HeldRecord) -> None:
    """Tell that a job was accepted; again, if that may not have been told. Then its record may have moved on."""
    record, spec = held.record, held.record.spec
    data: dict[str, object] = {"model": spec.model, "dataset": spec.dataset, "entrypoint": spec.entrypoint}
    if (submitter := tracing.parsed(spec.trace)) is not None:
        data["parent_span"] = submitter.span_id
    if record.changed_at == record.submitted_at:
        data["revision"] = held.revision
    key = EventKey(_producer("job-queued", record), record.sequence)
    telemetry.record("job.queued", data, about=About(record.id, trace=record.trace), key=key)


def _trace_of(record: JobRecord) -> str | None:
    return tracing.of_attempt(record.trace, record.lease_epoch)


def end_key(record: JobRecord) -> EventKey:
    """Of the one event that tells the end of a job."""
    return EventKey(_producer("job-ended", record), record.sequence)


def _producer(what: str, record: JobRecord) -> str:
    return f"{what}-{record.incarnation}"[:64]

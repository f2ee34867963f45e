"""What a job record says already: a message that was doubled, or one whose acknowledgement was lost. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

from railbus_shared.conclusion import advised, said
from railbus_shared.contracts.jobs import EndCause, ErrorBody, JobRecord
from railbus_shared.happenings import (
    CancelAsked,
    Ended,
    Happening,
    Held,
    Lost,
    Paused,
    Placed,
    PreemptAsked,
    PrioritySet,
    Released,
    Saved,
    Started,
    StartRefused,
    Stopping,
)
from railbus_shared.retrying import ALWAYS_FINAL


def is_told_already(record: JobRecord, happening: Happening) -> bool:
    """Whether the record is as it would be after the happening, or past it."""
    return _TOLD[type(happening)](record, happening)


def _placed(record: JobRecord, event: Placed) -> bool:
    named = (record.lease_epoch, record.host, record.devices)
    return record.state == "placed" and named == (event.lease_epoch, event.host, event.devices)


def _started(record: JobRecord, event: Started) -> bool:
    return record.state == "running" and _is_of(record, event)


def _stopping(record: JobRecord, event: Stopping) -> bool:
    return record.state == "checkpointing" and _is_of(record, event)


def _saved(record: JobRecord, event: Saved) -> bool:
    return record.state in {"running", "checkpointing"} and _is_of(record, event) and record.checkpoint == event.ref


def _paused(record: JobRecord, event: Paused) -> bool:
    return record.state == "running" and _is_of(record, event) and record.reason == event.reason


def _is_of(record: JobRecord, event: Started | Stopping | Saved | Paused) -> bool:
    return (record.lease_epoch, record.host) == (event.lease_epoch, event.host)


def _start_refused(record: JobRecord, event: StartRefused) -> bool:
    return _has_ended(record, event.lease_epoch, "start_refused", event.error, None)


def _ended(record: JobRecord, event: Ended) -> bool:
    return _has_ended(record, event.lease_epoch, event.cause, event.error, event.exit_code)


def _lost(record: JobRecord, event: Lost) -> bool:
    return _has_ended(record, event.lease_epoch, event.cause, event.error, None)


def _has_ended(
    record: JobRecord, lease_epoch: int, cause: EndCause, error: ErrorBody | None, exit_code: int | None
) -> bool:
    if record.is_active or record.lease_epoch != lease_epoch:
        return False
    word = said(record, cause)
    is_same_error = word in ALWAYS_FINAL or record.error == advised(cause, error)
    return (record.end_cause, record.exit_code) == (word, exit_code) and is_same_error


def _preempt_asked(record: JobRecord, event: PreemptAsked) -> bool:
    """An attempt that ends anyway makes room."""
    is_ending = record.cancel_requested or record.preempted_by is not None or record.state == "checkpointing"
    return record.is_active and record.lease_epoch == event.lease_epoch and is_ending


def _cancel_asked(record: JobRecord, _: CancelAsked) -> bool:
    return record.is_final or record.cancel_requested


def _held(record: JobRecord, _: Held) -> bool:
    return record.state == "queued" and record.held_by is not None


def _released(record: JobRecord, _: Released) -> bool:
    return not record.is_final and record.held_by is None


def _priority_set(record: JobRecord, event: PrioritySet) -> bool:
    return not record.is_final and record.priority == event.priority


_TOLD: Final[Mapping[type[Happening], Callable[[JobRecord, Any], bool]]] = {
    Placed: _placed,
    Started: _started,
    StartRefused: _start_refused,
    Saved: _saved,
    Paused: _paused,
    Stopping: _stopping,
    Ended: _ended,
    Lost: _lost,
    CancelAsked: _cancel_asked,
    PreemptAsked: _preempt_asked,
    Held: _held,
    Released: _released,
    PrioritySet: _priority_set,
}

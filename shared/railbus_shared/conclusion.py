"""What an ended attempt means for its job: pure, by end cause."""

from __future__ import annotations

from typing import Final

from railbus_shared.contracts.jobs import EndCause, ErrorBody, JobRecord
from railbus_shared.records import moved

_RETRIED: Final = frozenset[EndCause](
    {"signal", "runner_lost", "lease_lost", "start_refused", "host_lost", "storage_full"}
)
"""Losses that another attempt may not meet."""
_NOT_COUNTED: Final = frozenset[EndCause]({"preempted", "host_lost"})
"""Ends after which the start does not count as an attempt."""


def concluded(record: JobRecord, cause: EndCause, error: ErrorBody | None) -> JobRecord:
    """The record after an attempt ended: final, or queued again.

    A user's error, bad input, memory and the time limit end the job: they would come again. A loss is retried until
    `max_attempts` starts have counted.
    """
    if record.cancel_requested or cause == "cancelled":
        return moved(record, "cancelled", end_cause="cancelled", reason="cancelled as asked", error=None)
    if cause == "ok":
        return moved(record, "succeeded", end_cause=cause, reason="", error=None)
    attempt = record.attempt - 1 if cause in _NOT_COUNTED else record.attempt
    text = error.message if error is not None else cause
    if cause in _NOT_COUNTED or (cause in _RETRIED and attempt < record.spec.max_attempts):
        return moved(
            record,
            "queued",
            attempt=attempt,
            host=None,
            devices=(),
            end_cause=cause,
            error=error,
            reason=f"to be placed again: {text}",
        )
    reason = text if cause not in _RETRIED else f"{text} (attempt {attempt} of {record.spec.max_attempts})"
    return moved(record, "failed", end_cause=cause, error=error, reason=reason)

"""What the end of an attempt makes of its job: a final state, or another turn in the queue. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from railbus_shared import retrying
from railbus_shared.contracts.jobs import EndCause, ErrorBody, JobRecord, JobState
from railbus_shared.happenings import Tell
from railbus_shared.layout import checkpoint_stem

_AGAIN: Final = "to be placed again: "
_SMALLER: Final = "or ask for a device with more memory (devices.min_memory_bytes)"
_ADVICE: Final[Mapping[EndCause, str]] = {
    "device_oom": f"use a smaller batch, {_SMALLER}",
    "host_oom": f"use a smaller batch or fewer workers, {_SMALLER}",
}


def concluded(
    record: JobRecord, cause: EndCause, error: ErrorBody | None, now: str, *, exit_code: int | None = None
) -> JobRecord:
    """The record after its attempt, or its wait, is over. Whoever was promised a cancellation gets it."""
    error = advised(cause, error)
    if said(record, cause) == "cancelled":
        by = record.cancelled_by
        reason = f"cancelled by {by}" if by is not None else "cancelled as asked"
        after = _final(record, "cancelled", now, end_cause="cancelled", error=None, reason=reason)
    elif cause == "ok":
        after = _final(record, "succeeded", now, end_cause=cause, error=None, reason="")
    elif (again := retrying.again(record, cause)) is not None:
        after = _queued_again(record, again, cause, error, now)
    else:
        after = _final(record, "failed", now, end_cause=cause, error=error, reason=_why_failed(record, cause, error))
    return after.changed(exit_code=exit_code)


def said(record: JobRecord, cause: EndCause) -> EndCause:
    """The cause that will stand in the record."""
    return "cancelled" if record.cancel_requested else cause


def advised(cause: EndCause, error: ErrorBody | None) -> ErrorBody | None:
    """The error with advice, where it would come again without a change and names no remedy itself."""
    if error is None or error.hint or cause not in _ADVICE:
        return error
    return error.changed(hint=_ADVICE[cause])


def end_told(after: JobRecord) -> Tell:
    """The event of an end, from the record that is `concluded`."""
    data: dict[str, object] = {"cause": after.end_cause}
    if after.exit_code is not None:
        data["exit_code"] = after.exit_code
    if after.error is not None:
        data["error"] = after.error.to_map()
    if after.checkpoint is not None:
        data["checkpoint"] = checkpoint_stem(after.checkpoint.number)
    if after.state == "cancelled" and after.cancelled_by is not None:
        data["by"] = after.cancelled_by
    if after.state == "queued":
        again = {"why": after.reason.removeprefix(_AGAIN), "backoff_s": after.backoff_s}
        return Tell("job.requeued", {**data, **again}, "warning")
    return Tell(f"job.{after.state}", data, "error" if after.state == "failed" else "info")


def _final(record: JobRecord, state: JobState, now: str, **fields: object) -> JobRecord:
    over: dict[str, object] = {"preempted_by": None, "held_by": None, "backoff_s": 0.0}
    return record.changed(state=state, changed_at=now, ended_at=now, **over, **fields)


def _queued_again(
    record: JobRecord, again: retrying.Again, cause: EndCause, error: ErrorBody | None, now: str
) -> JobRecord:
    why = f"preempted by {record.preempted_by}" if cause == "preempted" and record.preempted_by else _text(cause, error)
    return record.changed(
        state="queued",
        attempt=again.attempt,
        retries=again.retries,
        backoff_s=again.backoff_s,
        host=None,
        devices=(),
        preempted_by=None,
        end_cause=cause,
        error=error,
        reason=_AGAIN + why,
        changed_at=now,
    )


def _why_failed(record: JobRecord, cause: EndCause, error: ErrorBody | None) -> str:
    text = _text(cause, error)
    if not retrying.is_retried(record, cause):
        return text
    if cause in retrying.NOT_COUNTED:
        return f"{text} ({record.retries + 1} losses in a row without a checkpoint)"
    return f"{text} (attempt {record.attempt} of {record.spec.max_attempts})"


def _text(cause: EndCause, error: ErrorBody | None) -> str:
    return error.message if error is not None else cause.replace("_", " ")

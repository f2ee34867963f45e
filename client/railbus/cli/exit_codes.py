"""What the exit status of `railbus` means: which one an error ends with, and which one a job that was waited for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from railbus_shared import errors

if TYPE_CHECKING:
    from collections.abc import Mapping

    from railbus_shared.contracts.jobs import JobRecord

OK: Final = 0
FAILURE: Final = 1
USAGE: Final = 2
NOT_FOUND: Final = 3
NOT_PERMITTED: Final = 4
UNREACHABLE: Final = 5
INVALID_INPUT: Final = 6
TIMEOUT: Final = 7
JOB_CANCELLED: Final = 123
JOB_TIME_LIMIT: Final = 124
OUR_TROUBLE: Final = 125
INTERRUPTED: Final = 130

MEANINGS: Final[Mapping[int, str]] = {
    OK: "it worked; for a job that was waited for: it succeeded",
    FAILURE: "it failed, or whoever read the output has gone",
    USAGE: "wrong usage, or a setting that must change",
    NOT_FOUND: "the job, dataset, model or checkpoint does not exist",
    NOT_PERMITTED: "not permitted: NATS refused the key",
    UNREACHABLE: "NATS cannot be reached, or nobody serves the request",
    INVALID_INPUT: "invalid input, or a file that is not what it should be",
    TIMEOUT: "no answer in time; whether it was carried out is unknown",
    JOB_CANCELLED: "the job that was waited for was cancelled",
    JOB_TIME_LIMIT: "the job that was waited for reached its time limit",
    OUR_TROUBLE: "a bug of railbus; while a job is waited for, any trouble that is not the job's own",
    INTERRUPTED: "interrupted by Ctrl-C; a job that was waited for goes on",
}

OF_A_JOB: Final = """\
`submit --wait`, `submit --follow` and `logs -f JOB` exit with the code of the job:
0 where it succeeded, else the code that its trainer exited with, or 128 + N where
signal N ended it, or 123 or 124. All other trouble is 125 then: the job was not
accepted, could not be started, lost its host too often, or its end was not seen.
For a sweep it is the code of the first of its jobs that did not succeed.

`railbus lease ... -- COMMAND` exits with the code of the command, or 128 + N where
signal N ended it; 126 or 127 where it cannot be started, 125 without a lease."""

_FAILED: Final = 1
"""Of a job that failed without an exit code that tells so."""
_OURS: Final = frozenset(
    {"preempted", "lease_lost", "runner_lost", "host_lost", "storage_full", "start_refused", "setup_failed"}
    | {"device_fault"}
)
"""Causes of an end of which the job's code is not to blame."""

# The first that fits counts, so what is narrow stands before what is wide.
_OF_ERROR: Final[tuple[tuple[type[errors.RailbusError], int], ...]] = (
    (errors.NotAuthorized, NOT_PERMITTED),
    (errors.UnsafeReply, NOT_PERMITTED),
    (errors.ConfigError, USAGE),
    (errors.NotFound, NOT_FOUND),
    (errors.RequestTimeout, TIMEOUT),
    (errors.BusUnavailable, UNREACHABLE),
    (errors.NoResponder, UNREACHABLE),
    (errors.WireError, INVALID_INPUT),
    (errors.UnknownEntrypoint, INVALID_INPUT),
    (errors.SchemaInvalid, INVALID_INPUT),
    (errors.IndexInvalid, INVALID_INPUT),
    (errors.ShardCorrupt, INVALID_INPUT),
    (errors.CheckpointCorrupt, INVALID_INPUT),
    (errors.BadParams, INVALID_INPUT),
)


def of_error(error: errors.RailbusError) -> int:
    """The exit status of a command that ends with `error`."""
    return next((code for kind, code in _OF_ERROR if isinstance(error, kind)), FAILURE)


def of_record(record: JobRecord) -> int:
    """The exit status of a command that waited for a job; the record is that of one that has ended."""
    if record.state == "succeeded":
        return OK
    if record.state == "cancelled":
        return JOB_CANCELLED
    if record.end_cause == "time_limit":
        return JOB_TIME_LIMIT
    if record.end_cause in _OURS:
        return OUR_TROUBLE
    code = record.exit_code or _FAILED
    return 128 - code if code < 0 else code

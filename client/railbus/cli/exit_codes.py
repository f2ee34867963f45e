"""What the exit status of `railbus` means, and which status an error ends with."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from railbus_shared import errors

if TYPE_CHECKING:
    from collections.abc import Mapping

OK: Final = 0
FAILURE: Final = 1
USAGE: Final = 2
NOT_FOUND: Final = 3
NOT_PERMITTED: Final = 4
UNREACHABLE: Final = 5
INVALID_INPUT: Final = 6
TIMEOUT: Final = 7
JOB_FAILED: Final = 8
JOB_CANCELLED: Final = 9
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
    JOB_FAILED: "the job that was waited for has failed",
    JOB_CANCELLED: "the job that was waited for was cancelled",
    OUR_TROUBLE: "a bug of railbus; please report it",
    INTERRUPTED: "interrupted by Ctrl-C; a job that was followed goes on",
}

_OF_STATE: Final[Mapping[str, int]] = {"succeeded": OK, "failed": JOB_FAILED, "cancelled": JOB_CANCELLED}

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


def of_state(state: str) -> int:
    """The exit status of a command that waited for a job; `state` is a final one."""
    return _OF_STATE[state]

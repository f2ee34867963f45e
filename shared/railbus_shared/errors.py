"""Every error that railbus raises on purpose, each with a stable code that goes on the wire.

    RailbusError
     |- ConfigError          the operator must change a setting          exit 2    message: negative ack with delay
     |- WireError            the bytes are not a valid message           status 4xx  message: terminate
     |- TransientError       worth trying again                          status 503  message: negative ack with delay
     |- RejectedError        a valid request that is refused             status 4xx  message: acknowledge
     |- TaskError            the user's training code failed             status 422  message: acknowledge
     `- Internal             a bug in a service, told to its caller      status 500

The code is the class name in UPPER_SNAKE (`ShardCorrupt` is `SHARD_CORRUPT`). The message says what is wrong with which
field and value; the hint says what to do about it. Anything that is not a `RailbusError` is a bug.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import ClassVar

Detail = str | int | float | bool | None


def code_of(class_name: str) -> str:
    """The wire code of an error class: its CamelCase name in UPPER_SNAKE."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", class_name).upper()


class RailbusError(Exception):
    """Root of the tree; raised itself only for a code that this version does not know.

    Attributes:
        message: one sentence that names the field, the value and the problem.
        hint: one sentence that says what to do; may be empty.
        details: the facts of the case by name, for programs.
    """

    code: ClassVar[str] = "RAILBUS_ERROR"
    status: ClassVar[int] = 500

    def __init_subclass__(cls) -> None:
        cls.code = code_of(cls.__name__)
        _BY_CODE[cls.code] = cls

    def __init__(self, message: str, *, hint: str = "", details: Mapping[str, Detail] | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.details: dict[str, Detail] = dict(details or {})

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message

    def to_wire(self) -> dict[str, object]:
        """The body of an error reply, and the `error` of a record or event."""
        wire: dict[str, object] = {"code": self.code, "message": self.message, "hint": self.hint}
        if self.details:
            wire["details"] = self.details
        return wire


_BY_CODE: dict[str, type[RailbusError]] = {}


def error_from_wire(body: Mapping[str, object]) -> RailbusError:
    """The error that a peer sent; an unknown code becomes a plain `RailbusError` that keeps it in its details."""
    code = str(body.get("code", "RAILBUS_ERROR"))
    cls = _BY_CODE.get(code, RailbusError)
    error = cls.__new__(cls)
    details = body.get("details")
    known: dict[str, Detail] = dict(details) if isinstance(details, Mapping) else {}
    if cls is RailbusError:
        known.setdefault("remote_code", code)
    RailbusError.__init__(error, str(body.get("message", "no message")), hint=str(body.get("hint", "")), details=known)
    return error


def known_codes() -> dict[str, type[RailbusError]]:
    """All codes of this version, for the docs and for tests."""
    return dict(_BY_CODE)


class Internal(RailbusError):
    """What a caller is told of a bug in a service; the traceback stands in the service's log."""


# --- the branches ----------------------------------------------------------------------------------------------------


class ConfigError(RailbusError):
    """The operator must change a setting; a process that meets one at its start exits with 2."""

    status = 500


class WireError(RailbusError):
    """Bytes that are not a valid message; seen by whoever sent them."""

    status = 400


class TransientError(RailbusError):
    """Worth trying again as it is."""

    status = 503


class RejectedError(RailbusError):
    """A valid request that is refused; trying again without a change will not help."""

    status = 409


class TaskError(RailbusError):
    """The user's training code failed; seen by the job's owner, never retried."""

    status = 422


# --- configuration ---------------------------------------------------------------------------------------------------


class BadSetting(ConfigError):
    """A setting has a value that cannot be used."""


class NotAuthorized(ConfigError):
    """NATS refused the credentials or the permission; fix the key file or the server's users."""


class InsecureUrl(ConfigError):
    """A NATS URL that leaves this host without TLS."""


class PortInUse(ConfigError):
    """The HTTP or NATS port of a service is taken by another process."""


class AlreadyRunning(ConfigError):
    """Another `railbus up` holds this root."""


class StoreMissing(ConfigError):
    """A stream or bucket that a local marker says existed is gone from the NATS store."""


class IncarnationMismatch(ConfigError):
    """The NATS store is not the one this root belongs to (wiped, restored or another server)."""


class ServerNotFound(ConfigError):
    """No nats-server binary was found for the embedded bus."""


# --- wire ------------------------------------------------------------------------------------------------------------


class BadMessage(WireError):
    """The bytes are neither msgpack nor JSON of a map, or break a structural limit."""


class MessageTooLarge(WireError):
    """The payload is over the size limit of the bus."""

    status = 413

    def __init__(self, *, size_bytes: int, limit_bytes: int, subject: str = "") -> None:
        where = f" for {subject!r}" if subject else ""
        super().__init__(
            f"payload{where} has {size_bytes} bytes, more than the limit of {limit_bytes}",
            hint="send bulk data as files and pass their path and hash",
            details={"size_bytes": size_bytes, "limit_bytes": limit_bytes},
        )


class InvalidField(WireError):
    """A field of a message is unknown, missing, of the wrong type or out of range."""

    status = 422

    def __init__(self, *, field: str, value: object, problem: str, hint: str = "") -> None:
        shown = shorten(value)
        super().__init__(
            f"field {field!r} has value {shown}: {problem}",
            hint=hint,
            details={"field": field, "value": shown},
        )


class InvalidName(WireError):
    """An id or a name that may not become part of a path or a subject."""

    status = 422

    def __init__(self, *, kind: str, value: object, rule: str) -> None:
        shown = shorten(value)
        super().__init__(
            f"{kind} has value {shown}: not a valid name", hint=f"use {rule}", details={"field": kind, "value": shown}
        )


class UnsafeReply(WireError):
    """A request asked for its answer on a subject that is not an inbox; refused without an answer."""

    status = 403


# --- transient -------------------------------------------------------------------------------------------------------


class BusUnavailable(TransientError):
    """NATS cannot be reached or does not answer."""


class NoResponder(TransientError):
    """Nobody serves the subject at present."""


class RequestTimeout(TransientError):
    """No answer came in time; whether the request was carried out is unknown."""

    status = 504


class QueueFull(TransientError):
    """A stream is at its limit and refuses new messages."""

    status = 429


class RevisionConflict(TransientError):
    """A compare-and-set lost: the key has changed since it was read."""

    status = 409


class StorageFull(TransientError):
    """A write found no space; older state stays as it was."""

    status = 507


class ServicesNotReady(TransientError):
    """What `railbus up` starts is not ready in time, or has ended; the message names which, and its log."""


class TransferBroken(TransientError):
    """A file that another host sends stopped coming, or came otherwise than asked for; it is asked for again."""


class TooManyTransfers(TransientError):
    """A dataloader sends as many files as it may, and as many wait; another host is asked, or this one later."""

    status = 429


class NoSource(TransientError):
    """No other host and no origin has the file at present; the details of each stand in the dataloader's log."""


class RunnerLost(TransientError):
    """The runner of an attempt ended or lost its lease; the job is placed again."""


class DeviceBroken(TransientError):
    """A GPU failed under an attempt: it is cordoned, and the job is placed on another."""


class TrainerLost(TransientError):
    """The trainer was killed by something other than railbus; the attempt may be retried."""


# --- refused ---------------------------------------------------------------------------------------------------------


class Conflict(RejectedError):
    """The id is taken by a job with another spec."""


class NotFound(RejectedError):
    """The thing that was asked for does not exist."""

    status = 404


class JobNotFound(NotFound):
    """No job has this id."""


class DatasetNotFound(NotFound):
    """No dataset of this name lies under the root."""


class ModelNotFound(NotFound):
    """No model of this name lies under the root."""


class CheckpointNotFound(NotFound):
    """The checkpoint that was asked for does not exist."""


class UnknownEntrypoint(RejectedError):
    """The runner knows no such entrypoint, or its settings do not allow it."""

    status = 422


class NoFreeDevice(RejectedError):
    """The devices that were asked for are taken, unhealthy or do not exist."""


class NeverFits(RejectedError):
    """No host that is known has the devices that a job asks for, be they free or not; the details name the most."""


class LeaseLost(RejectedError):
    """The lease has expired or belongs to someone else."""


class StaleLeaseEpoch(RejectedError):
    """A write carried an older lease epoch than the job's record; the writer must stop."""


class NotSupported(RejectedError):
    """A valid wish that this version cannot fulfil."""

    status = 501


class SchemaInvalid(RejectedError):
    """A `schema.json` that does not conform to `docs/agi_json_schema/`."""

    status = 422


class IndexInvalid(RejectedError):
    """An `index.json` that does not conform, or that disagrees with its shards."""

    status = 422


class ShardCorrupt(RejectedError):
    """A shard's bytes do not have the hash or size that the index states."""

    status = 422

    def __init__(self, *, path: str, expected: str, actual: str) -> None:
        super().__init__(
            f"shard {path!r} does not match its index: expected {expected}, found {actual}",
            hint="import the dataset again, or restore the shard from another copy",
            details={"path": path, "expected": expected, "actual": actual},
        )


class CacheTooSmall(RejectedError):
    """A shard cannot be brought to this host: the cache has no room for it that anybody will ever free."""

    status = 413

    def __init__(self, *, needed_bytes: int, held_bytes: int, budget_bytes: int, why: str) -> None:
        super().__init__(
            f"a shard of {needed_bytes} bytes does not fit into the cache of {budget_bytes} bytes, {why}",
            hint="raise RAILBUS_DATALOADER_CACHE_BYTES, or read with shuffle='window', which holds few shards",
            details={"needed_bytes": needed_bytes, "held_bytes": held_bytes, "budget_bytes": budget_bytes},
        )


class CheckpointCorrupt(RejectedError):
    """A checkpoint's bytes do not have the hash or size that its meta states."""

    status = 422

    def __init__(self, *, path: str, expected: str, actual: str) -> None:
        super().__init__(
            f"checkpoint {path!r} does not match its meta: expected {expected}, found {actual}",
            hint="an older valid checkpoint of the job is used instead, where there is one",
            details={"path": path, "expected": expected, "actual": actual},
        )


class EntrypointFailed(TaskError):
    """The entrypoint raised; the message is the last line of the traceback, the details hold it all."""


class BadParams(TaskError):
    """The entrypoint does not accept the job's `params`."""


class OutOfMemory(TaskError):
    """The trainer ran out of host or device memory."""


class TimeLimitExceeded(TaskError):
    """The job ran longer than its `time_limit_s`, or made no progress for its `stall_s`."""


def shorten(value: object, *, limit: int = 80) -> str:
    """A value as it may stand in an error message: its repr, cut so that noise cannot fill a log."""
    shown = repr(value)
    return shown if len(shown) <= limit else f"{shown[: limit - 1]}…"

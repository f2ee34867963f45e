"""Structured logging: JSON lines on stderr, with the job and the message that a line belongs to.

A log call has a constant event string and `extra` fields: `logger.info("lease granted", extra={"device": device})`.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Final

import orjson

from railbus_shared import clock

job_id: Final[ContextVar[str | None]] = ContextVar("job_id", default=None)
msg_id: Final[ContextVar[str | None]] = ContextVar("msg_id", default=None)

_STANDARD: Final = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


@contextmanager
def log_context(*, job: str | None = None, msg: str | None = None) -> Iterator[None]:
    """Lines logged inside carry the ids."""
    job_token, msg_token = job_id.set(job or job_id.get()), msg_id.set(msg or msg_id.get())
    try:
        yield
    finally:
        job_id.reset(job_token)
        msg_id.reset(msg_token)


def extra_fields(record: logging.LogRecord) -> dict[str, object]:
    """The `extra` of a record, with the ids of its context."""
    fields = {key: value for key, value in vars(record).items() if key not in _STANDARD and not key.startswith("_")}
    for name, variable in (("job_id", job_id), ("msg_id", msg_id)):
        if variable.get() is not None:
            fields.setdefault(name, variable.get())
    return fields


def told(record: logging.LogRecord, fields: Mapping[str, object]) -> dict[str, object]:
    """The data of its `log.line`; raises what its author's `%` and `__str__` do."""
    data: dict[str, object] = {"logger": record.name, "message": record.getMessage(), "fields": fields}
    traceback = _traceback(record)
    return data if traceback is None else {**data, "traceback": traceback}


def _traceback(record: logging.LogRecord) -> str | None:
    """None as well where `exc_info` is asked for and nothing was raised."""
    if not record.exc_info or record.exc_info[0] is None:
        return None
    return logging.Formatter().formatException(record.exc_info)


class JsonFormatter(logging.Formatter):
    """One JSON object a line."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self._source = source

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "time": clock.rfc3339(int(record.created * 1e6) * 1000),
            "level": record.levelname.lower(),
            "source": self._source,
            "logger": record.name,
            "event": record.getMessage(),
            **extra_fields(record),
        }
        traceback = _traceback(record)
        if traceback is not None:
            line["traceback"] = traceback
        try:
            return orjson.dumps(line, default=str).decode()
        except TypeError:  # keys, numbers or characters that orjson refuses; the line must not be lost for them
            return json.dumps({key: str(value) for key, value in line.items()})


def configure(source: str, *, level: str = "info") -> None:
    """Send the root logger's lines to stderr as JSON."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter(source))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    logging.getLogger("nats").setLevel(logging.ERROR)
    logging.getLogger("asyncio").setLevel(logging.WARNING)

"""Trace context as W3C spells it (`traceparent`), from whoever submits a job to the last event of its trainer.

A job's context is made of its submitter's, or of the job alone: its trace id and the ids of its spans are hashes, so
that every service computes the same ones, and spans that are derived from the log twice are the same spans.
Source: https://www.w3.org/TR/trace-context/.
"""

from __future__ import annotations

import hashlib
import re
from contextvars import ContextVar
from typing import Final, NamedTuple

HEADER: Final = "traceparent"
"""Of a message on the bus."""
VARIABLE: Final = "TRACEPARENT"
"""Of the environment, for a submitter and for user code."""
_FORM: Final = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?\Z")

current: Final[ContextVar[str | None]] = ContextVar("trace", default=None)
"""The context of what is done at the moment: sent with requests, and told with events that name no other."""


class TraceContext(NamedTuple):
    """A span, and the trace that it is part of; in hex."""

    trace_id: str
    span_id: str
    flags: str = "01"

    def __str__(self) -> str:
        return f"00-{self.trace_id}-{self.span_id}-{self.flags}"

    def child(self, *key: object) -> TraceContext:
        """The span below this one that the key names."""
        return self._replace(span_id=_hex(self.trace_id, self.span_id, *key)[:16])


def parsed(text: str | None) -> TraceContext | None:
    """A `traceparent`; None for what is none, as the standard has it: a broken one is as good as none."""
    match = _FORM.match(text or "")
    if match is None:
        return None
    version, trace_id, span_id, flags, rest = match.groups()
    is_known = version == "00" and not rest
    is_of_future = version not in {"00", "ff"}
    if not (is_known or is_of_future) or not trace_id.strip("0") or not span_id.strip("0"):
        return None
    return TraceContext(trace_id, span_id, flags)


def of_job(job: str, *, incarnation: str, submitter: str | None = None) -> str:
    """The context of a job's own span."""
    parent = parsed(submitter)
    key = ("job", incarnation, job)
    if parent is not None:
        return str(parent.child(*key))
    return str(TraceContext(_hex("trace", *key)[:32], _hex("span", *key)[:16]))


def of_attempt(job_trace: str | None, lease_epoch: int) -> str | None:
    """The context of an attempt's span, of whichever process tells of it."""
    job = parsed(job_trace)
    return str(job.child("attempt", lease_epoch)) if job is not None and lease_epoch else job_trace


def _hex(*parts: object) -> str:
    return hashlib.sha256("\0".join(map(str, parts)).encode()).hexdigest()

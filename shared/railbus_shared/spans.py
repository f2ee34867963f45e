"""From the events of one job to the spans of its trace: what took how long, and what came of it.

    job                          from its submission to its end
    ├── wait                     until devices were leased, again after every attempt that is tried again
    ├── start                    until the runner took it
    └── attempt                  one for each lease epoch, however it ended: by itself, killed, preempted, lost
        ├── setup                until the first step has ended
        ├── train                from there to the end
        ├── checkpoint.written   and .resumed, .loaded: as long as each took
        ├── dataset.fetched      a shard that came from elsewhere
        └── job.lease_awaited    the trainer stood still for its lease

Ids are computed (`tracing`), so that whoever derives a trace again gets the same spans. Every other fact is an event of
the span it belongs to. Pure: no clock, no files.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final, Literal

from railbus_shared import clock, tracing
from railbus_shared.contracts.events import BATCHED_TYPES, teller
from railbus_shared.tracing import TraceContext

Attributes = dict[str, str | int | float | bool]
Event = Mapping[str, object]

ENDS: Final = frozenset({"job.succeeded", "job.failed", "job.cancelled"})
_OVER: Final = ENDS | {"job.requeued"}
_HARMLESS: Final = frozenset({"ok", "preempted", "cancelled"})
_MAX_EVENTS: Final = 128
_MAX_S: Final = 1e9  # thirty years; whoever tells an event may say any number
AREAS: Final = ("job.", "attempt.", "checkpoint.", "dataset.", "app.", "events.")
"""Beginnings of the types of events that spans are made of."""


@dataclass(frozen=True)
class Moment:
    """Something that happened within a span."""

    name: str
    time_ns: int
    attributes: Attributes


@dataclass
class Span:
    """One piece of a job's life."""

    name: str
    context: TraceContext
    parent_id: str
    """Empty for the root of a trace."""
    source: str
    host: str
    start_ns: int
    end_ns: int = 0
    attributes: Attributes = field(default_factory=dict)
    moments: list[Moment] = field(default_factory=list)
    status: Literal["unset", "ok", "error"] = "unset"
    message: str = ""

    def close(self, at_ns: int) -> None:
        self.end_ns = max(at_ns, self.start_ns)


def is_wanted(kind: str) -> bool:
    """Whether an event of this type is needed for spans."""
    return kind.startswith(AREAS) and kind not in BATCHED_TYPES


def spans_of(events: Iterable[Event]) -> list[Span]:
    """The spans of one job by its events in any order; the root first. None if there is nothing to tell.

    What has not ended yet ends with the last event, and says `railbus.unfinished`.
    """
    found = {_key(event): event for event in events if is_wanted(str(event["type"]))}
    ordered = sorted(found.values(), key=lambda event: clock.parse_rfc3339(str(event["time"])))
    if not ordered:
        return []
    told = _Telling(ordered[0])
    for event in ordered:
        told.heed(event)
    return told.finished()


def _key(event: Event) -> tuple[str, object]:
    return teller(str(event.get("producer")), event.get("person")), event.get("number")


class _Telling:
    """The spans of one job while its events are gone through."""

    def __init__(self, first: Event) -> None:
        job = str(first.get("job") or "")
        self._root = Span("job", _job_context(first, job), "", *_place(first), attributes={"railbus.job.id": job})
        self._spans = [self._root]
        self._open: dict[str, Span] = {}
        self._attempts: dict[int, Span] = {}
        self._last_ns = self._root.start_ns

    def heed(self, event: Event) -> None:
        kind = str(event["type"])
        at_ns = self._last_ns = clock.parse_rfc3339(str(event["time"]))
        match kind:
            case "job.queued":
                self._queued(event)
            case "job.placed":
                self._close("wait", at_ns)
                self._begin("start", event, self._root)
            case "job.started":
                self._started(event)
            case "job.first_step":
                self._close("setup", at_ns)
                self._begin("train", event, self._attempt(event) or self._root)
            case _ if kind in _OVER:
                self._over(event, kind)
            case _ if "seconds" in _data(event):
                self._lasted(event, kind)
            case _:
                self._happened(event, kind)

    def finished(self) -> list[Span]:
        for span in self._spans:
            if not span.end_ns:
                span.attributes["railbus.unfinished"] = True
                span.close(self._last_ns)
        return self._spans

    def _queued(self, event: Event) -> None:
        data = _data(event)
        self._root.parent_id = str(data.get("parent_span") or "")
        self._root.attributes |= {f"railbus.{name}": str(data[name]) for name in _ASKED if name in data}
        self._begin("wait", event, self._root)

    def _started(self, event: Event) -> None:
        at_ns = clock.parse_rfc3339(str(event["time"]))
        self._close("wait", at_ns)
        self._close("start", at_ns)
        attempt = self._attempt(event)
        if attempt is not None:
            devices = _data(event).get("devices")
            if isinstance(devices, list):
                attempt.attributes["railbus.devices"] = ",".join(map(str, devices))
            self._begin("setup", event, attempt)

    def _over(self, event: Event, kind: str) -> None:
        """An attempt or the job has ended; so has everything that was open below."""
        at_ns = clock.parse_rfc3339(str(event["time"]))
        epoch = event.get("lease_epoch")
        ended = self._attempts.get(epoch) if isinstance(epoch, int) else None
        for name in ("wait", "start", "setup", "train"):
            self._close(name, at_ns)
        if ended is not None and not ended.end_ns:
            _judge(ended, _data(event))
            ended.close(at_ns)
        if kind in ENDS:
            _judge(self._root, _data(event))
            self._root.attributes["railbus.state"] = kind.partition(".")[2]
            self._root.close(at_ns)
        else:
            self._begin("wait", event, self._root)

    def _lasted(self, event: Event, kind: str) -> None:
        """Something is told once it is over, with how long it took."""
        at_ns, seconds = clock.parse_rfc3339(str(event["time"])), _data(event)["seconds"]
        took_s = max(0, min(seconds, _MAX_S)) if isinstance(seconds, int | float) else 0
        span = self._begin(
            kind, event, self._attempt(event) or self._root, since_ns=at_ns - int(took_s * clock.NS_PER_S)
        )
        self._open.pop(kind)
        span.attributes |= _scalars(event)
        span.close(at_ns)

    def _happened(self, event: Event, kind: str) -> None:
        span = self._attempt(event) or self._root
        if len(span.moments) < _MAX_EVENTS:
            at_ns = clock.parse_rfc3339(str(event["time"]))
            span.moments.append(Moment(kind, at_ns, _scalars(event) | {"railbus.source": str(event["source"])}))

    def _attempt(self, event: Event) -> Span | None:
        """The attempt that an event tells of, which may be the first word of it; None if of none that has begun."""
        epoch = event.get("lease_epoch")
        if not isinstance(epoch, int) or not isinstance(event.get("attempt"), int):
            return self._attempts.get(epoch) if isinstance(epoch, int) else None
        if epoch not in self._attempts:
            if str(event["type"]) in {"job.cancel_requested", "job.preempting"}:
                return None
            context = self._root.context.child("attempt", epoch)
            span = Span("attempt", context, self._root.context.span_id, *_place(event))
            span.attributes |= {"railbus.attempt": int(str(event["attempt"])), "railbus.lease_epoch": epoch}
            self._attempts[epoch] = span
            self._spans.append(span)
        return self._attempts[epoch]

    def _begin(self, name: str, event: Event, parent: Span, *, since_ns: int | None = None) -> Span:
        source, host, at_ns = _place(event)
        self._close(name, at_ns)
        context = parent.context.child(name, event["producer"], event["number"])
        start_ns = at_ns if since_ns is None else max(since_ns, min(parent.start_ns, at_ns))
        span = self._open[name] = Span(name, context, parent.context.span_id, source, host, start_ns)
        if event.get("step") is not None:
            span.attributes["railbus.step"] = int(str(event["step"]))
        self._spans.append(span)
        return span

    def _close(self, name: str, at_ns: int) -> None:
        span = self._open.pop(name, None)
        if span is not None:
            span.close(at_ns)


_ASKED: Final = ("model", "dataset", "entrypoint")


def _judge(span: Span, data: Mapping[str, object]) -> None:
    """Why a span ended, by the names that OpenTelemetry has for it where it has one."""
    cause, error, code = str(data.get("cause") or ""), data.get("error"), data.get("exit_code")
    if cause:
        span.attributes["railbus.end_cause"] = cause
    if isinstance(code, int):
        span.attributes["process.exit.code"] = code
    if cause in _HARMLESS:
        span.status = "ok" if cause == "ok" else "unset"
        return
    span.status = "error"
    said = error if isinstance(error, dict) else {}
    span.attributes["error.type"] = str(said.get("code") or cause or "unknown")
    span.message = str(said.get("message") or cause)


def _job_context(event: Event, job: str) -> TraceContext:
    """The job's span: its events name it, or the attempt's, whose trace it shares; else it is computed."""
    alone = TraceContext(*tracing.of_job(job, incarnation=str(event.get("incarnation", ""))).split("-")[1:])
    named = tracing.parsed(str(event.get("trace")))
    if named is None or event["type"] == "job.queued":
        return named or alone
    return alone if alone.trace_id == named.trace_id else named.child("job", job)


def _place(event: Event) -> tuple[str, str, int]:
    return str(event["source"]), str(event["host"]), clock.parse_rfc3339(str(event["time"]))


def _data(event: Event) -> Mapping[str, object]:
    data = event.get("data")
    return data if isinstance(data, dict) else {}


def _scalars(event: Event) -> Attributes:
    plain = {name: value for name, value in _data(event).items() if isinstance(value, str | int | float | bool)}
    return {f"railbus.{name}": value if not isinstance(value, str) else value[:1000] for name, value in plain.items()}

"""Spans and events as OpenTelemetry has them: the JSON that any OTLP/HTTP endpoint takes, made by hand.

JSON is one of the two encodings that the protocol demands of every receiver; ids are hex, 64-bit numbers are strings.
Source: https://opentelemetry.io/docs/specs/otlp/, and the data model of logs beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Final, TypeVar, cast

from pydantic import JsonValue

from railbus_shared import clock, tracing
from railbus_shared.contracts.events import teller
from railbus_shared.contracts.model import JsonMap
from railbus_shared.spans import Event, Moment, Span

T = TypeVar("T")

SEVERITIES: Final[Mapping[str, int]] = {"debug": 5, "info": 9, "warning": 13, "error": 17}
_TEXTS: Final[Mapping[str, str]] = {"debug": "DEBUG", "info": "INFO", "warning": "WARN", "error": "ERROR"}
_STATUS: Final[Mapping[str, int]] = {"unset": 0, "ok": 1, "error": 2}
_INTERNAL, _CONSUMER = 1, 5
_SCOPE: Final[JsonMap] = {"name": "railbus"}
_ABOUT: Final[Mapping[str, str]] = {
    "job": "railbus.job.id",
    "attempt": "railbus.attempt",
    "lease_epoch": "railbus.lease_epoch",
    "step": "railbus.step",
    "producer": "railbus.producer",
    "number": "railbus.number",
    "person": "railbus.person",
}


def traces(spans: Iterable[Span]) -> JsonMap:
    """An `ExportTraceServiceRequest`."""
    found: list[JsonValue] = []
    for place, some in _grouped(spans, lambda span: (span.source, span.host)).items():
        scope: JsonMap = {"scope": _SCOPE, "spans": [_span(one) for one in some]}
        found.append({"resource": _resource(*place), "scopeSpans": [scope]})
    return {"resourceSpans": found}


def logs(events: Iterable[Event]) -> JsonMap:
    """An `ExportLogsServiceRequest`."""
    found: list[JsonValue] = []
    for place, some in _grouped(events, lambda event: (str(event["source"]), str(event["host"]))).items():
        scope: JsonMap = {"scope": _SCOPE, "logRecords": [log_record(one) for one in some]}
        found.append({"resource": _resource(*place), "scopeLogs": [scope]})
    return {"resourceLogs": found}


def log_record(event: Event) -> JsonMap:
    """One event as a log record; its source and host are the resource's."""
    severity = str(event.get("severity", "info"))
    time = str(clock.parse_rfc3339(str(event["time"])))
    about = {name: event[field] for field, name in _ABOUT.items() if event.get(field) is not None}
    about["log.record.uid"] = teller(str(event["id"]), event.get("person"))
    record: JsonMap = {
        "timeUnixNano": time,
        "observedTimeUnixNano": time,
        "severityNumber": SEVERITIES[severity],
        "severityText": _TEXTS[severity],
        "eventName": str(event["type"]),
        "body": value_of(event.get("data") or {}),
        "attributes": _attributes(about),
    }
    context = tracing.parsed(cast("str | None", event.get("trace")))
    if context is not None:
        record |= {"traceId": context.trace_id, "spanId": context.span_id, "flags": int(context.flags, 16)}
    return record


def value_of(value: object) -> JsonMap:  # noqa: PLR0911 - one for each kind of value
    """An `AnyValue`."""
    match value:
        case bool():
            return {"boolValue": value}
        case int() if -(2**63) <= value < 2**63:
            return {"intValue": str(value)}
        case float():
            return {"doubleValue": value}
        case Mapping():
            return {"kvlistValue": {"values": _attributes(value)}}
        case list() | tuple():
            return {"arrayValue": {"values": [value_of(item) for item in value]}}
        case None:
            return {}
        case _:
            return {"stringValue": str(value)}


def _attributes(values: Mapping[str, object]) -> list[JsonValue]:
    return [{"key": str(name), "value": value_of(value)} for name, value in values.items()]


def _span(span: Span) -> JsonMap:
    status: JsonMap = {"code": _STATUS[span.status]}
    if span.message:
        status["message"] = span.message
    found: JsonMap = {
        "traceId": span.context.trace_id,
        "spanId": span.context.span_id,
        "flags": int(span.context.flags, 16),
        "name": span.name,
        "kind": _CONSUMER if span.name == "job" else _INTERNAL,
        "startTimeUnixNano": str(span.start_ns),
        "endTimeUnixNano": str(span.end_ns),
        "attributes": _attributes(span.attributes),
        "events": [_moment(one) for one in span.moments],
        "status": status,
    }
    return found | ({"parentSpanId": span.parent_id} if span.parent_id else {})


def _moment(moment: Moment) -> JsonMap:
    attributes = _attributes(moment.attributes)
    return {"name": moment.name, "timeUnixNano": str(moment.time_ns), "attributes": attributes}


def _resource(source: str, host: str) -> JsonMap:
    named = {"service.name": f"railbus-{source}", "service.namespace": "railbus", "host.name": host}
    return {"attributes": _attributes(named)}


def _grouped(items: Iterable[T], place: Callable[[T], tuple[str, str]]) -> dict[tuple[str, str], list[T]]:
    found: dict[tuple[str, str], list[T]] = {}
    for item in items:
        found.setdefault(place(item), []).append(item)
    return found

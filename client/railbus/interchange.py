"""Events and spans in the forms of other programs: CloudEvents, and the trace files that Perfetto and Chrome open."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import NoneType, UnionType
from typing import Final, get_args

from pydantic import JsonValue

from railbus_shared import clock
from railbus_shared.contracts.events import Severity
from railbus_shared.contracts.model import JsonMap
from railbus_shared.spans import Event, Span

_EXTENSIONS: Final[Mapping[str, str]] = {
    "trace": "traceparent",
    "severity": "severity",
    "attempt": "attempt",
    "lease_epoch": "leaseepoch",
    "step": "step",
    "number": "sequence",
    "producer": "producer",
    "person": "person",
}


def is_event(event: Event) -> bool:
    """Whether it has all that these forms need; on the bus there may be anything, which telemetry then refuses."""
    try:
        clock.parse_rfc3339(str(event.get("time")))
    except ValueError:
        return False
    return event.get("severity", "info") in get_args(Severity) and all(
        isinstance(event.get(name, default), kind) for name, kind, default in _FIELDS
    )


_FIELDS: Final[tuple[tuple[str, type | UnionType, object], ...]] = (
    *((name, str, None) for name in ("id", "type", "time", "producer", "source", "host")),
    *((name, str | NoneType, None) for name in ("job", "trace", "person")),
    *((name, int | NoneType, None) for name in ("attempt", "lease_epoch", "step")),
    ("number", int, None),
    ("data", dict, {}),
)
"""Each with what stands for it where it is left out."""


def cloud_event(event: Event) -> JsonMap:
    """An event in the structured JSON form of CloudEvents 1.0: `source` and `id` are its key.

    What CloudEvents has no attribute for is an extension, whose name may have no underscore.
    Source: https://github.com/cloudevents/spec/blob/v1.0.2/cloudevents/spec.md.
    """
    found: JsonMap = {
        "specversion": "1.0",
        "id": str(event["id"]),
        "source": f"/railbus/{_of_person(event)}{event['host']}/{event['source']}",
        "type": f"dev.railbus.{event['type']}",
        "time": str(event["time"]),
        "datacontenttype": "application/json",
    }
    if event.get("job") is not None:
        found["subject"] = str(event["job"])
    for name, extension in _EXTENSIONS.items():
        value = event.get(name)
        if value is not None:  # integers are of 32 bits there
            found[extension] = (
                value if isinstance(value, int) and abs(value) < 2**31 and name != "number" else str(value)
            )
    data = event.get("data")
    found["data"] = dict(data) if isinstance(data, dict) else {}
    return found


def _of_person(event: Event) -> str:
    """Who told it stands in the key, so that nobody's event can be taken for a repetition of somebody else's."""
    return f"people/{event['person']}/" if event.get("person") else ""


def chrome_trace(spans: Iterable[Span]) -> JsonMap:
    """Spans in Chrome's trace event format: one process for each host and service, tracks for what overlaps.

    Source: the Trace Event Format document of Chromium; ui.perfetto.dev opens it.
    """
    told: list[JsonValue] = []
    lanes: dict[tuple[str, str], list[int]] = {}
    for span in sorted(spans, key=lambda span: span.start_ns):
        place = (span.host, span.source)
        if place not in lanes:
            named: JsonMap = {"name": f"{span.source} on {span.host}"}
            told.append({"ph": "M", "name": "process_name", "pid": len(lanes) + 1, "tid": 0, "args": named})
        ends = lanes.setdefault(place, [])
        lane = next((number for number, end_ns in enumerate(ends) if end_ns <= span.start_ns), len(ends))
        ends[lane : lane + 1] = [span.end_ns]
        where: JsonMap = {"cat": "railbus", "pid": list(lanes).index(place) + 1, "tid": lane + 1}
        args: JsonMap = {**span.attributes, "status": span.status, "message": span.message}
        length: JsonMap = {"ts": span.start_ns / 1000, "dur": (span.end_ns - span.start_ns) / 1000}
        told.append({"ph": "X", "name": span.name, **where, **length, "args": args})
        for moment in span.moments:
            at: JsonMap = {"ts": moment.time_ns / 1000, "s": "t", "args": dict(moment.attributes)}
            told.append({"ph": "i", "name": moment.name, **where, **at})
    return {"traceEvents": told, "displayTimeUnit": "ms"}

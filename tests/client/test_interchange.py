"""Events and traces in the forms of other programs, from the files of a root by the command itself."""

from __future__ import annotations

import itertools
import json
import re
from datetime import date
from pathlib import Path
from typing import Any

import orjson
import pytest

from commands import railbus_here
from railbus_shared import clock, tracing
from railbus_shared.layout import Layout

ENV = {"RAILBUS_CONNECT_TIMEOUT_S": "0.1"}
BEGAN_NS = clock.parse_rfc3339("2026-11-26T10:00:00Z")
INCARNATION = "abcdef012345"
TRACE = tracing.of_job("j-1", incarnation=INCARNATION)
LIFE = (
    "job.queued",
    "job.placed",
    "job.started",
    "job.first_step",
    "train.metrics",
    "checkpoint.written",
    "job.failed",
)


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    layout = Layout(tmp_path / "learning")
    day = layout.day(date(2026, 11, 26))
    day.mkdir(parents=True)
    lines = [
        {"v": 1, "id": f"p-{number}", "type": kind, "time": clock.rfc3339(BEGAN_NS + number * 10**9), "producer": "p",
         "number": number, "severity": "error" if kind == "job.failed" else "info", "source": "runner", "host": "h",
         "job": "j-1", "attempt": 1, "lease_epoch": 2**40, "step": 7, "trace": TRACE, "incarnation": INCARNATION,
         "data": {"seconds": 0.5, "cause": "signal"}, "seq": number}
        for number, kind in enumerate(LIFE, start=1)
    ]  # fmt: skip
    (day / "trainer.log.jsonl").write_bytes(b"".join(orjson.dumps(line) + b"\n" for line in lines))
    return layout


def said(layout: Layout, *words: str) -> list[dict[str, Any]]:
    done = railbus_here(*words, cwd=layout.root.parent, env=ENV)
    assert done.status == 0, done.err
    return [json.loads(line) for line in done.out.splitlines()]


@pytest.mark.parametrize("form", ["cloudevents", "otlp"])
def test_what_is_no_event_has_no_other_form_and_ends_nothing(layout: Layout, form: str) -> None:
    """Anybody may send it; it can be followed until telemetry has refused it."""
    event: dict[str, Any] = {"v": 1, "id": "p-9", "type": "app.x", "time": "2026-11-26T10:00:00Z", "producer": "p",
                             "number": 9, "source": "s", "host": "h"}  # fmt: skip
    faults: list[dict[str, Any]] = [{name: None} for name in event if name != "v"]
    faults += [{"type": ["app.x"]}, {"time": "x"}, {"severity": "fatal"}, {"trace": 5}, {"data": [1]}, {"step": "a"}]
    with (layout.day(date(2026, 11, 26)) / "trainer.log.jsonl").open("ab") as file:
        file.writelines(orjson.dumps(one) + b"\n" for one in ({"a": 1}, *(event | fault for fault in faults), event))
    assert len(said(layout, "events", "--format", form)) == len(LIFE) + 1


def test_events_are_cloud_events(layout: Layout) -> None:
    """By the rules of the specification: required attributes, names of extensions, types of values."""
    found = said(layout, "events", "--format", "cloudevents")
    assert [event["type"] for event in found] == [f"dev.railbus.{kind}" for kind in LIFE]
    assert len({(event["source"], event["id"]) for event in found}) == len(found)
    for event in found:
        assert {"specversion", "id", "source", "type"} <= event.keys()
        assert event["specversion"] == "1.0"
        assert all(re.fullmatch("[a-z0-9]{1,20}", name) for name in event)
        attributes = {name: value for name, value in event.items() if name != "data"}
        assert all(value for value in attributes.values())
        assert all(isinstance(value, str) or -(2**31) <= value < 2**31 for value in attributes.values())
        assert (event["subject"], event["traceparent"], event["leaseepoch"]) == ("j-1", TRACE, str(2**40))
    assert found[0]["data"] == {"seconds": 0.5, "cause": "signal"}


def test_events_are_log_records(layout: Layout) -> None:
    found = said(layout, "events", "--format", "otlp", "--type", "job.")
    records = [line["resourceLogs"][0]["scopeLogs"][0]["logRecords"][0] for line in found]
    assert [record["severityNumber"] for record in records] == [9, 9, 9, 9, 17]
    assert {record["traceId"] for record in records} == {TRACE.split("-")[1]}


def test_what_a_person_tells_has_the_key_of_nothing_that_a_service_has_told(layout: Layout) -> None:
    plain = layout.day(date(2026, 11, 26)) / "trainer.log.jsonl"
    forged = [{**orjson.loads(line), "type": "app.lied", "person": "ann"} for line in plain.read_bytes().splitlines()]
    with plain.open("ab") as file:
        file.writelines(orjson.dumps(one) + b"\n" for one in forged)
    found = said(layout, "events", "--format", "cloudevents")
    assert len({(event["source"], event["id"]) for event in found}) == len(found) == 2 * len(LIFE)
    assert [event.get("person") for event in found] == [None] * len(LIFE) + ["ann"] * len(LIFE)
    attributes = [
        {one["key"]: one["value"].get("stringValue") for one in record["attributes"]}
        for line in said(layout, "events", "--format", "otlp")
        for resource in line["resourceLogs"]
        for record in resource["scopeLogs"][0]["logRecords"]
    ]
    assert len({one["log.record.uid"] for one in attributes}) == len(attributes) == 2 * len(LIFE)
    assert {one.get("railbus.person") for one in attributes} == {None, "ann"}


def test_a_trace_opens_in_perfetto_and_goes_to_a_collector(layout: Layout) -> None:
    (sent,) = said(layout, "export", "trace", "j-1", "--format", "otlp", "--to", "-")
    ((resource,),) = sent.values()
    spans = resource["scopeSpans"][0]["spans"]
    assert {span["name"] for span in spans} == {
        "job", "wait", "start", "attempt", "setup", "train", "checkpoint.written"
    }  # fmt: skip
    assert {span["status"]["code"] for span in spans if span["name"] in {"job", "attempt"}} == {2}
    done = railbus_here("export", "trace", "j-1", cwd=layout.root.parent, env=ENV)
    assert (done.status, done.out) == (0, "j-1.trace.json\n"), done.err
    drawn = json.loads((layout.root.parent / "j-1.trace.json").read_bytes())["traceEvents"]
    pieces = [event for event in drawn if event["ph"] == "X"]
    assert len(pieces) == len(spans)
    by_lane = itertools.groupby(sorted(pieces, key=lambda event: (event["tid"], event["ts"])), key=lambda e: e["tid"])
    for _, lane in by_lane:
        assert all(a["ts"] + a["dur"] <= b["ts"] + 0.001 for a, b in itertools.pairwise(lane))


def test_a_job_of_which_nothing_is_written_is_told_so(layout: Layout) -> None:
    done = railbus_here("export", "trace", "j-2", cwd=layout.root.parent, env=ENV)
    assert done.status != 0
    assert "j-2" in done.err

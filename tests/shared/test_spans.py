"""From a job's events to its spans: whatever became of its attempts."""

from __future__ import annotations

import random

import pytest

from railbus_shared import clock, tracing
from railbus_shared.otlp import log_record, traces
from railbus_shared.spans import Span, spans_of

T0 = 1_800_000_000_000_000_000
INCARNATION = "abcdef012345"
TRACE = tracing.of_job("j-1", incarnation=INCARNATION)
PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
Told = dict[str, object]


def job(*told: str, trace: str | None = TRACE) -> list[Told]:
    """Events of `type@seconds[/epoch] [name=value ...]`."""
    return [_event(number, words, trace) for number, words in enumerate(told, start=1)]


def _event(number: int, words: str, trace: str | None) -> Told:
    what, *said = words.split()
    kind, _, when = what.partition("@")
    seconds, _, epoch = when.partition("/")
    data: Told = {}
    for name, _, value in (word.partition("=") for word in said):
        data[name] = (
            float(value) if name == "seconds" else {"code": value, "message": "m"} if name == "error" else value
        )
    source = "trainer" if kind.startswith(("checkpoint", "job.first")) else "runner" if epoch else "device_manager"
    event: Told = {
        "v": 1, "id": f"p-{number}", "type": kind, "time": clock.rfc3339(T0 + int(float(seconds) * 1e9)),
        "producer": "p", "number": number, "severity": "info", "source": source, "host": "h", "job": "j-1",
        "data": data, "incarnation": INCARNATION, "seq": number,
    }  # fmt: skip
    if epoch:
        event |= {"lease_epoch": int(epoch), "attempt": int(epoch)}
    if trace is not None:
        event["trace"] = tracing.of_attempt(trace, int(epoch or 0))
    return event


def drawn(spans: list[Span]) -> list[str]:
    """`parent/name start-end status`, in the order in which they begin."""
    names = {span.context.span_id: span.name for span in spans}
    return [
        f"{names.get(span.parent_id, '')}/{span.name} {_s(span.start_ns)}-{_s(span.end_ns)} {span.status}"
        for span in sorted(spans, key=lambda span: (span.start_ns, -span.end_ns))
    ]


def _s(ns: int) -> str:
    return f"{(ns - T0) / 1e9:g}"


BEGUN = ("job.queued@0 model=m dataset=d", "job.placed@2", "job.started@3/1", "job.first_step@5/1 seconds=2")
FIRST = ["job/wait 0-2 unset", "job/start 2-3 unset"]


@pytest.mark.parametrize(
    ("events", "spans"),
    [
        (
            job(*BEGUN, "checkpoint.written@8/1 seconds=2", "job.succeeded@9/1 cause=ok"),
            ["/job 0-9 ok", *FIRST, "job/attempt 3-9 ok", "attempt/setup 3-5 unset", "attempt/train 5-9 unset",
             "attempt/checkpoint.written 6-8 unset"],
        ),
        (  # killed, and tried again
            job(*BEGUN, "job.requeued@6/1 cause=runner_lost error=RUNNER_LOST", "job.placed@7", "job.started@8/2",
                "job.first_step@9/2 seconds=1", "job.succeeded@12/2 cause=ok"),
            ["/job 0-12 ok", *FIRST, "job/attempt 3-6 error", "attempt/setup 3-5 unset", "attempt/train 5-6 unset",
             "job/wait 6-7 unset", "job/start 7-8 unset", "job/attempt 8-12 ok", "attempt/setup 8-9 unset",
             "attempt/train 9-12 unset"],
        ),
        (  # preempted
            job(*BEGUN, "job.preempting@6/1 by=j-2", "job.requeued@7/1 cause=preempted", "job.placed@8",
                "job.started@9/2", "job.cancelled@10/2 cause=cancelled"),
            ["/job 0-10 unset", *FIRST, "job/attempt 3-7 unset", "attempt/setup 3-5 unset", "attempt/train 5-7 unset",
             "job/wait 7-8 unset", "job/start 8-9 unset", "job/attempt 9-10 unset", "attempt/setup 9-10 unset"],
        ),
        (  # the start was refused, and then nobody wanted it any more
            job("job.queued@0", "job.placed@2", "job.requeued@3/1 cause=start_refused", "job.cancelled@5"),
            ["/job 0-5 error", *FIRST, "job/wait 3-5 unset"],
        ),
        (  # failed before the first step
            job(*BEGUN[:3], "job.failed@4/1 cause=user_error error=ENTRYPOINT_FAILED"),
            ["/job 0-4 error", *FIRST, "job/attempt 3-4 error", "attempt/setup 3-4 unset"],
        ),
        (  # it runs still
            job(*BEGUN, "checkpoint.removed@7/1"),
            ["/job 0-7 unset", *FIRST, "job/attempt 3-7 unset", "attempt/setup 3-5 unset", "attempt/train 5-7 unset"],
        ),
        (job("job.queued@0"), ["/job 0-0 unset", "job/wait 0-0 unset"]),
        ([], []),
    ],
)  # fmt: skip
def test_a_job_is_a_tree_of_spans(events: list[Told], spans: list[str]) -> None:
    found = spans_of(events)
    assert drawn(found) == spans
    shuffled = events * 2  # told twice, and in any order
    random.Random(7).shuffle(shuffled)
    assert traces(spans_of(shuffled)) == traces(found)
    assert len({span.context.span_id for span in found}) == len(found)


def test_spans_say_what_ended_them_and_what_happened_meanwhile() -> None:
    events = job(*BEGUN, "checkpoint.removed@6/1 checkpoint=c", "job.failed@7/1 cause=signal error=TRAINER_LOST")
    root, *others = spans_of(events)
    (attempt,) = [span for span in others if span.name == "attempt"]
    assert attempt.attributes | {"railbus.attempt": 1, "error.type": "TRAINER_LOST"} == attempt.attributes
    assert (attempt.message, root.attributes["railbus.state"], root.attributes["railbus.model"]) == ("m", "failed", "m")
    assert [(moment.name, moment.attributes["railbus.checkpoint"]) for moment in attempt.moments] == [
        ("checkpoint.removed", "c")
    ]
    unfinished = spans_of(job(*BEGUN))
    assert [span.name for span in unfinished if "railbus.unfinished" in span.attributes] == ["job", "attempt", "train"]


@pytest.mark.parametrize(("seconds", "took_s"), [(1e300, 4), (-1e300, 0), (2**63, 4), (True, 1)])
def test_a_span_lasts_no_longer_than_its_parent_whatever_is_told(seconds: float, took_s: int) -> None:
    told = [*job(*BEGUN), *job("app.slept@7/1")]
    told[-1] |= {"number": 9, "data": {"seconds": seconds}}
    (span,) = (span for span in spans_of(told) if span.name == "app.slept")
    assert span.end_ns - span.start_ns == took_s * clock.NS_PER_S


def test_the_trace_is_the_submitters_and_old_events_without_one_get_the_same_as_ever() -> None:
    below = tracing.of_job("j-1", incarnation=INCARNATION, submitter=PARENT)
    root = spans_of(job("job.queued@0 parent_span=b7ad6b7169203331", "job.placed@1", trace=below))[0]
    assert (root.context.trace_id, root.parent_id) == ("0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331")
    assert str(root.context) == below
    assert [str(spans_of(job(*BEGUN, trace=trace))[0].context) for trace in (None, TRACE)] == [TRACE] * 2
    attempt = next(span for span in spans_of(job(*BEGUN)) if span.name == "attempt")
    assert str(attempt.context) == tracing.of_attempt(TRACE, 1)


def test_an_event_is_a_log_record_that_finds_its_span() -> None:
    (event,) = job("job.started@1.5/3 devices=x seconds=2")
    event["data"] = {"a": [1, True, None, 2**63], "b": {"c": 1.5}}
    record = log_record(event)
    assert (record["timeUnixNano"], record["severityNumber"], record["severityText"]) == (
        str(T0 + 1_500_000_000),
        9,
        "INFO",
    )
    assert record["eventName"] == "job.started"
    context = tracing.parsed(tracing.of_attempt(TRACE, 3))
    assert context is not None
    assert (record["traceId"], record["spanId"], record["flags"]) == (context.trace_id, context.span_id, 1)
    assert record["body"] == {"kvlistValue": {"values": [
        {"key": "a", "value": {"arrayValue": {"values": [
            {"intValue": "1"}, {"boolValue": True}, {}, {"stringValue": str(2**63)}]}}},
        {"key": "b", "value": {"kvlistValue": {"values": [{"key": "c", "value": {"doubleValue": 1.5}}]}}},
    ]}}  # fmt: skip
    assert {"key": "railbus.job.id", "value": {"stringValue": "j-1"}} in record["attributes"]  # type: ignore[operator]


def test_what_a_person_tells_takes_the_place_of_nothing_that_a_service_has_told() -> None:
    """Nor of what another has: each may have numbers that the other knows."""
    told = job(*BEGUN, "job.succeeded@9/1", "app.slept@9.5/1")
    forged = [{**event, "type": "app.lied", "person": "ann", "data": {}} for event in told]
    names = [(drawn(spans_of(some)), spans_of(some)[0].status) for some in (told, [*told, *forged])]
    assert names[0] == names[1]

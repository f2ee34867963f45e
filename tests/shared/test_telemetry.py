"""LearningTelemetry: numbered without gaps, batched without loss, stored exactly once whatever happens to the bus."""

from __future__ import annotations

import asyncio
import collections
import enum
import functools
import json
import logging
import math
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import cast

import numpy as np
import pytest

from railbus_shared import logs, tracing, wire
from railbus_shared.buffering import Bounds
from railbus_shared.bus.bucket import nonce
from railbus_shared.bus.connection import Bus, Outgoing
from railbus_shared.bus.follow import events_in, follow
from railbus_shared.bus.sink import BusSink, messages, subject_of
from railbus_shared.contracts.events import Event
from railbus_shared.contracts.model import JsonMap
from railbus_shared.errors import BusUnavailable
from railbus_shared.metrics import Metrics
from railbus_shared.plain_values import plain
from railbus_shared.settings import CommonSettings
from railbus_shared.subjects import Subjects
from railbus_shared.telemetry import LearningTelemetry
from servers import Server
from until import PATIENCE_S, until


class Kept:
    """A sink that keeps what it is given, after failing as often as it is told to."""

    def __init__(self, *, failures: int = 0) -> None:
        self.events: list[JsonMap] = []
        self.offers: list[Sequence[JsonMap]] = []
        self.failures = failures

    async def send(self, events: Sequence[JsonMap]) -> None:
        self.offers.append(events)
        if self.failures:
            self.failures -= 1
            raise BusUnavailable("away")
        self.events.extend(events)


@pytest.fixture
def telemetry() -> LearningTelemetry:
    return LearningTelemetry("runner", host="h")


async def _flushed(telemetry: LearningTelemetry) -> None:
    running = asyncio.ensure_future(telemetry.run())
    try:
        assert await telemetry.flush(timeout_s=PATIENCE_S)
    finally:
        running.cancel()
        await asyncio.wait([running])


async def test_events_of_several_threads_are_numbered_without_gaps(telemetry: LearningTelemetry) -> None:
    sink = Kept()
    telemetry.with_sink(sink)
    running = asyncio.ensure_future(telemetry.run())

    def record() -> None:
        for _ in range(500):
            telemetry.event("a.b")

    threads = [threading.Thread(target=record) for _ in range(4)]
    for thread in threads:
        thread.start()
    await until(lambda: not any(thread.is_alive() for thread in threads))
    assert await telemetry.flush(timeout_s=PATIENCE_S)
    running.cancel()
    assert sorted(int(str(event["number"])) for event in sink.events) == list(range(1, 2001))
    assert len({str(event["id"]) for event in sink.events}) == 2000
    assert {str(event["producer"]) for event in sink.events} == {telemetry.producer}


async def test_every_event_is_a_valid_one(telemetry: LearningTelemetry) -> None:
    sink = Kept()
    telemetry.with_sink(sink)
    telemetry.event(
        "job.placed", job="j-1", attempt=1, lease_epoch=2, step=3, severity="warning", trace="t", device="d"
    )
    telemetry.event("rows_written", rows=3)
    await _flushed(telemetry)
    first, second = (Event.parse(event) for event in sink.events)
    assert (first.type, first.job, first.attempt, first.lease_epoch, first.step) == ("job.placed", "j-1", 1, 2, 3)
    assert (first.data, first.severity, first.source, first.host) == ({"device": "d"}, "warning", "runner", "h")
    assert (second.type, second.number, second.data) == ("app.rows_written", 2, {"rows": 3})


@pytest.mark.parametrize(
    "what", ["", "rows written", "Rows", "a..b", ".a", "a.", "a.*", "a.>", "a\n", "é", "a." + "b" * 80]
)
def test_a_type_that_cannot_stand_in_a_subject_is_a_mistake_of_the_caller(
    telemetry: LearningTelemetry, what: str
) -> None:
    with pytest.raises(ValueError, match="event type has value"):
        telemetry.event(what)


async def test_what_the_sink_cannot_take_is_offered_again_as_it_was(
    telemetry: LearningTelemetry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("railbus_shared.telemetry._RETRY_S", 0.01)
    sink = Kept(failures=3)
    telemetry.with_sink(sink)
    telemetry.event("a.b")
    telemetry.event("a.c")
    await _flushed(telemetry)
    assert [event["type"] for event in sink.events] == ["a.b", "a.c"]
    assert all(offer is sink.offers[0] for offer in sink.offers)  # so that it is stored under the same ids


async def test_what_was_given_up_is_told_once_there_is_room_and_leaves_no_gap_in_the_numbers() -> None:
    metrics, sink = Metrics("x"), Kept()
    telemetry = LearningTelemetry("runner", host="h", bounds=Bounds(20_000, 20_000, 50_000))
    telemetry.with_sink(sink, metrics=metrics)
    for number in range(100):
        telemetry.event("train.metrics", job="j-1", step=number, loss=1.0)
        telemetry.event("log.line", message="x")
    for _ in range(100):
        telemetry.event("job.placed", severity="warning")
    await _flushed(telemetry)
    told = [event for event in sink.events if event["type"] == "events.dropped"]
    counted = collections.Counter(str(event["type"]) for event in sink.events)
    lost: collections.Counter[str] = collections.Counter()
    for loss, count in telemetry.dropped.items():
        lost[loss.type] += count
    assert counted["log.line"] + lost["log.line"] == counted["train.metrics"] + lost["train.metrics"] == 100
    assert counted["job.placed"] + lost["job.placed"] == 100
    assert lost["log.line"] > 0 < lost["train.metrics"]
    assert [event["number"] for event in sink.events] == list(range(1, len(sink.events) + 1))
    assert [(event.get("job"), event["data"]) for event in told if event.get("job")] == [
        ("j-1", {"dropped": {"info": lost["train.metrics"]}, "types": {"train.metrics": lost["train.metrics"]}})
    ]
    sample = metrics.registry.get_sample_value
    assert sample("railbus_events_dropped_total", {"type": "log.line", "severity": "info"}) == lost["log.line"]
    before = len(sink.events)
    await _flushed(telemetry)
    assert len(sink.events) == before


class Colour(enum.Enum):
    RED = "red"


class Odd:
    def __str__(self) -> str:
        return "odd"


_CYCLE: list[object] = []
_CYCLE.append(_CYCLE)


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (1, 1), (1.5, 1.5), (True, True), (None, None), ("x", "x"), (math.nan, "NaN"), (-math.inf, "-Infinity"),
        (np.float32(1.5), 1.5), (np.float64(1.5), 1.5), (np.int64(7), 7), (np.bool_(True), True), (np.array(3.0), 3.0),
        (np.float64("nan"), "NaN"), (np.array([1, 2]), "[1 2]"), ((1, [2]), [1, [2]]),
        ({3: {"a": (1,)}}, {"3": {"a": [1]}}),
        ({1}, [1]), (Odd(), "odd"), (Colour.RED, "Colour.RED"), (2**64, str(2**64)), (-(2**70), str(-(2**70))),
        (2**64 - 1, 2**64 - 1), ("\ud800", "?"), ({"\ud800": 1}, {"?": 1}), (b"x", "b'x'"), (logging.INFO, 20),
    ],
    ids=lambda value: ascii(value)[:30],
)  # fmt: skip
def test_any_value_becomes_one_that_an_event_can_carry(value: object, shown: object) -> None:
    found = plain(value)
    assert found == shown
    assert type(found) is type(shown)
    assert wire.decode(wire.encode({"a": found})) == {"a": found}


def test_scalars_of_torch_become_numbers() -> None:
    torch = pytest.importorskip("torch")
    assert plain(torch.tensor(1.5)) == 1.5
    assert plain(torch.tensor(3)) == 3
    assert plain(torch.tensor(math.nan)) == "NaN"
    assert plain(torch.tensor([1.0])) == "tensor([1.])"


def test_a_value_that_holds_itself_comes_to_an_end() -> None:
    wire.encode({"a": plain(_CYCLE)})


SUBJECTS = Subjects()


def _event(number: int, kind: str = "train.metrics", **fields: object) -> JsonMap:
    event: JsonMap = {
        "v": 1, "id": f"p-{number}", "type": kind, "time": "2026-01-01T00:00:00.000000007Z", "producer": "p",
        "number": number, "severity": "info", "source": "trainer", "host": "h", "job": "j-1",
        "data": {"loss": 1 / number},
    }  # fmt: skip
    return {**event, **fields}  # type: ignore[dict-item]


def _decoded(events: list[JsonMap]) -> list[dict[str, object]]:
    found = [
        event
        for message in messages(events, subjects=SUBJECTS)
        for event in events_in(message.data, subject=message.subject)
    ]
    return sorted(found, key=lambda event: int(str(event["number"])))


def test_a_batch_says_what_is_common_once_and_decodes_to_the_same_events() -> None:
    events = [_event(n, step=n) for n in range(1, 101)]
    (message,) = messages(events, subjects=SUBJECTS)
    batch = wire.decode(message.data)
    assert isinstance(batch["common"], dict)
    assert set(batch["common"]) == {"v", "type", "producer", "severity", "source", "host", "job"}
    assert (batch["v"], batch["number"], len(message.data) < 1900) == (2, 1, True)
    assert (message.subject, message.msg_id) == ("railbus.evt.train.j-1.metrics", "p-1+99")
    assert _decoded(events) == events


def test_events_of_other_jobs_types_and_producers_never_share_a_batch() -> None:
    events = [
        _event(1),
        _event(2, job="j-2"),
        _event(3, "log.line"),
        _event(4, producer="q"),
        _event(5),
        _event(6, "job.placed"),
    ]
    assert [message.msg_id for message in messages(events, subjects=SUBJECTS)] == ["p-1+1", "p-2", "p-3", "p-4", "p-6"]
    assert _decoded(events) == events


def test_a_fact_that_is_told_twice_under_one_key_is_one_message() -> None:
    events = [_event(1, "job.failed"), _event(2, "job.placed"), _event(1, "job.failed", source="runner")]
    assert [message.msg_id for message in messages(events, subjects=SUBJECTS)] == ["p-1", "p-2"]


def test_a_field_that_only_some_events_of_a_batch_have_stays_with_those() -> None:
    events = [_event(1), _event(2, attempt=3), _event(3, severity="error")]
    assert _decoded(events) == events


def test_batches_that_would_be_too_large_are_split_and_a_giant_event_loses_its_data_only() -> None:
    events = [_event(n, data={"x": "y" * 60_000}) for n in range(1, 31)]
    found = list(messages(events, subjects=SUBJECTS))
    assert len(found) > 3
    assert all(len(message.data) <= wire.MAX_BYTES for message in found)
    assert _decoded(events) == events
    (giant,) = _decoded([_event(1, data={"x": "y" * 600_000})])
    assert giant["id"] == "p-1"
    assert "too_large" in str(giant["data"])
    assert len(_decoded([_event(n) for n in range(1, 2502)])) == 2501


def test_one_event_that_cannot_be_encoded_loses_its_data_and_holds_up_no_other() -> None:
    events = [_event(1), _event(2, data={"x": math.nan}), _event(3)]
    first, bad, third = _decoded(events)
    assert (first, third) == (events[0], events[2])
    assert "not_encodable" in str(bad["data"])


@pytest.mark.parametrize(
    ("event", "subject"),
    [
        (_event(1, "job.placed"), "job.j-1.placed"),
        (_event(1, "checkpoint.was.written"), "checkpoint.j-1.was_written"),
        (_event(1, "dataset.described", job=None, data={"dataset": "digits.v2"}), "dataset.digits=v2.described"),
        (_event(1, "service.started", job=None, data={"service": "runner"}), "service.runner.started"),
        (_event(1, "app.rows", job=None, data={"app": "a b"}), "app.trainer.rows"),
        (_event(1, "app.rows", job="*.>", data={}), "app.trainer.rows"),
        (_event(1, "app.rows", job=None, data={"app": 3}, source="Bad Source"), "app.unknown.rows"),
    ],
)
def test_the_subject_names_what_an_event_is_about(event: JsonMap, subject: str) -> None:
    assert subject_of(event, subjects=SUBJECTS) == f"railbus.evt.{subject}"


async def _stored(bus: Bus) -> list[tuple[object, object]]:
    """The key of every event in the stream."""
    return [(event["producer"], event["number"]) for event in await _stored_events(bus)]


async def _stored_events(bus: Bus) -> list[dict[str, object]]:
    """Every event in the stream, up to a last one that is written here."""
    await bus.publish(Outgoing("railbus.evt.a.b.end", wire.encode({"producer": "end", "number": 0}), ""))
    found: list[dict[str, object]] = []
    async with asyncio.timeout(PATIENCE_S):
        async for event in follow(bus, bus.subjects.all_events):
            if event["producer"] == "end":
                break
            found.append(event)
    return found


async def _has_grown(bus: Bus, sequence: int) -> bool:
    return await bus.last_sequence(bus.subjects.events_stream) >= sequence


async def test_every_event_is_stored_exactly_once_through_kills_of_the_server_under_load(
    bus: Bus, server: Server
) -> None:
    telemetry = LearningTelemetry("runner", host="h").with_sink(BusSink(bus))
    running, enough = asyncio.ensure_future(telemetry.run()), threading.Event()

    def load() -> int:
        number = 0
        while not enough.wait(0.001):
            telemetry.event("train.metrics" if number % 3 else "job.placed", job="j-1", n=number)
            number += 1
        return number

    loading = [asyncio.ensure_future(asyncio.to_thread(load)) for _ in range(2)]
    for turn in range(2):
        before = await bus.last_sequence(bus.subjects.events_stream)
        await until(functools.partial(_has_grown, bus, before + 30))
        server.kill()
        await until(lambda: len(telemetry._buffer) > 50)
        server.start()
        await until(lambda turn=turn: bus.generation > turn)  # type: ignore[misc]
    enough.set()
    recorded = sum(await asyncio.gather(*loading))
    assert await telemetry.flush(timeout_s=PATIENCE_S)
    running.cancel()
    found = await _stored(bus)
    assert sorted(found, key=str) == sorted(((telemetry.producer, n) for n in range(1, recorded + 1)), key=str)


class _Portions:
    """A sink that remembers what came together."""

    def __init__(self) -> None:
        self.portions: list[list[str]] = []

    async def send(self, events: Sequence[JsonMap]) -> None:
        self.portions.append([str(event["type"]) for event in events])


async def test_metrics_wait_for_company_and_a_fact_takes_them_along(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("railbus_shared.telemetry._FLUSH_S", 10 * PATIENCE_S)
    sink = _Portions()
    telemetry = LearningTelemetry("runner", host="h").with_sink(sink)
    running = asyncio.ensure_future(telemetry.run())
    for _ in range(3):
        telemetry.event("train.metrics", loss=1.0)
        await asyncio.sleep(0)
    assert sink.portions == []
    telemetry.event("job.placed")
    await until(lambda: sink.portions == [["train.metrics"] * 3 + ["job.placed"]])
    running.cancel()


async def test_metrics_that_nothing_takes_along_go_by_themselves() -> None:
    sink = _Portions()
    telemetry = LearningTelemetry("runner", host="h").with_sink(sink)
    running = asyncio.ensure_future(telemetry.run())
    telemetry.event("train.metrics", loss=1.0)
    await until(lambda: sink.portions == [["train.metrics"]])
    running.cancel()


async def test_events_of_which_one_was_stored_before_are_all_stored_once(bus: Bus) -> None:
    """An atomic batch with it is refused whole; and one that cannot be stored keeps no other back."""
    facts = [_event(number, "job.placed") for number in range(1, 21)]
    await bus.publish(next(iter(messages(facts[4:5], subjects=bus.subjects))))
    sink = BusSink(bus)
    await sink.send(facts)
    await sink.send(facts[:])
    assert sorted(number for _, number in await _stored(bus)) == list(range(1, 21))  # type: ignore[type-var]


_SCRIPT = """
import logging
from railbus_shared.telemetry import LearningTelemetry
logger = logging.getLogger("rows")
with LearningTelemetry("preprocess").with_logging() as telemetry:
    telemetry.event("rows_written", rows=1000)
    logger.warning("three rows were empty", extra={"rows": 3, "job_id": "j-9"})
    logger.info("fine")
    logger.debug("not told")
"""


TRACE = tracing.of_job("j-1", incarnation="abc")


async def _run_script(script: str, common: CommonSettings) -> bytes:
    """Run it to its end, and give what it printed to stderr."""
    environment = {**os.environ, "RAILBUS_NATS_URL": common.nats_url, "RAILBUS_HOST": "h", tracing.VARIABLE: TRACE}
    running = await asyncio.create_subprocess_exec(
        sys.executable, "-c", script, env=environment, stderr=subprocess.PIPE
    )
    async with asyncio.timeout(PATIENCE_S):
        _, errors = await running.communicate()
    assert running.returncode == 0, errors.decode()
    return errors


_FORKING = """
import multiprocessing, os
from railbus_shared.telemetry import LearningTelemetry
telemetry = LearningTelemetry("preprocess").__enter__()      # never left
telemetry.event("began")
def work():
    telemetry.event("worked")
    telemetry.event("worked")
children = [multiprocessing.get_context("fork").Process(target=work) for _ in range(2)]
for child in children:
    child.start()
for child in children:
    child.join()
telemetry.event("ended")
"""


async def test_what_a_script_forks_is_a_producer_of_its_own_and_all_is_sent_at_exit(
    bus: Bus, common: CommonSettings
) -> None:
    await _run_script(_FORKING, common)
    by_producer: dict[object, list[tuple[object, object]]] = {}
    for event in await _stored_events(bus):
        by_producer.setdefault(event["producer"], []).append((event["type"], event["number"]))
    assert sorted(map(sorted, by_producer.values()), key=str) == [
        [("app.began", 1), ("app.ended", 2)],
        [("app.worked", 1), ("app.worked", 2)],
        [("app.worked", 1), ("app.worked", 2)],
    ]


async def test_a_script_of_ten_lines_joins_the_bus(bus: Bus, common: CommonSettings) -> None:
    errors = await _run_script(_SCRIPT, common)
    found: list[dict[str, object]] = []
    async with asyncio.timeout(PATIENCE_S):
        async for event in follow(bus, bus.subjects.all_events):
            found.append(event)
            if len(found) == 3:
                break
    first, second, third = (Event.parse(event) for event in sorted(found, key=lambda event: int(str(event["number"]))))
    assert (first.type, first.data) == ("app.rows_written", {"rows": 1000})
    assert {event.trace for event in (first, second, third)} == {TRACE}
    assert (second.type, second.severity, second.job) == ("log.line", "warning", "j-9")
    assert second.data == {"logger": "rows", "message": "three rows were empty", "fields": {"rows": 3}}
    assert (third.severity, third.data["message"]) == ("info", "fine")
    lines = [json.loads(line) for line in errors.decode().splitlines()]
    assert [(line["level"], line["event"]) for line in lines if line["logger"] == "rows"] == [
        ("warning", "three rows were empty"), ("info", "fine")
    ]  # fmt: skip


def test_a_script_without_a_bus_is_told_so() -> None:
    environment = {**os.environ, "RAILBUS_NATS_URL": "nats://127.0.0.1:9", "RAILBUS_CONNECT_TIMEOUT_S": "0.3"}
    done = subprocess.run(
        [sys.executable, "-c", _SCRIPT], env=environment, capture_output=True, timeout=PATIENCE_S, check=False
    )
    assert done.returncode == 1
    assert b"BusUnavailable" in done.stderr


def test_a_script_that_may_not_tell_is_told_so_in_one_line_and_ends(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    may = 'permissions: { publish: { deny: "railbus.evt.>" } }'
    server = Server(tmp_path, extra=f'authorization {{ users: [{{ user: "u", password: "p", {may} }}] }}')
    server.start()
    try:
        settings = CommonSettings(nats_url=f"nats://u:p@127.0.0.1:{server.port}")
        with LearningTelemetry("script", host="h").with_bus(settings) as telemetry:
            telemetry.event("rows_written", rows=1)
    finally:
        server.stop()
    (lost,) = (record for record in caplog.records if record.message == "events lost")
    assert "railbus.evt.app.script.rows_written" in vars(lost)["problem"]


@pytest.fixture
def root_logger() -> Iterator[logging.Logger]:
    """The root logger, put back as it was."""
    root = logging.getLogger()
    before = (list(root.handlers), root.level)
    yield root
    root.handlers[:] = before[0]
    root.setLevel(before[1])


async def test_log_records_become_events_and_a_bad_log_call_harms_nobody(
    telemetry: LearningTelemetry, root_logger: logging.Logger, capsys: pytest.CaptureFixture[str]
) -> None:
    sink, name = Kept(), f"user.{nonce()}"
    telemetry.with_logging(event_level="warning").with_sink(sink)
    logger = logging.getLogger(name)
    logger.info("too low for an event")
    logging.getLogger("railbus_shared.bus").error("of the code that sends")
    logger.warning("value %d", "no number")
    with logs.log_context(job="j-1", msg="m"):
        logger.error("value %d", 3, extra={"odd": Odd(), "big": 2**70, "text": "\ud800", "map": {(1, 2): math.nan}})
    await _flushed(telemetry)
    (event,) = sink.events
    assert (event["severity"], event["job"]) == ("error", "j-1")
    assert event["data"] == {
        "logger": name,
        "message": "value 3",
        "fields": {"odd": "odd", "big": str(2**70), "text": "?", "map": {"(1, 2)": "NaN"}, "msg_id": "m"},
    }
    printed = [json.loads(line) for line in capsys.readouterr().err.splitlines() if line.startswith("{")]
    assert [line["event"] for line in printed] == ["too low for an event", "of the code that sends", "value 3"]
    assert printed[-1]["job_id"] == "j-1"


async def test_a_record_of_what_was_raised_has_its_traceback(
    telemetry: LearningTelemetry, root_logger: logging.Logger
) -> None:
    sink = Kept()
    telemetry.with_logging(event_level="warning").with_sink(sink)
    try:
        _ = 1 / len("")
    except ZeroDivisionError:
        logging.getLogger("user").exception("failed")
    logging.getLogger("user").error("nothing was raised", exc_info=True)
    await _flushed(telemetry)
    raised, not_raised = (cast("dict[str, str]", event["data"]) for event in sink.events)
    assert raised["message"] == "failed"
    assert raised["traceback"].endswith("ZeroDivisionError: division by zero")
    assert "traceback" not in not_raised


def test_a_traceback_is_one_line(root_logger: logging.Logger, capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("x")
    try:
        _ = 1 / len("")
    except ZeroDivisionError:
        logging.getLogger("user").exception("failed")
    (line,) = capsys.readouterr().err.splitlines()
    found = json.loads(line)
    assert (found["level"], found["source"], found["event"]) == ("error", "x", "failed")
    assert "ZeroDivisionError: division by zero" in found["traceback"]

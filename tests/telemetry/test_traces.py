"""The trace of a job reaches a collector once the job has ended, and a collector that is away holds up no line."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import pytest
from aiohttp import web

from railbus_shared import clock, tracing
from railbus_shared.bus.connection import Bus
from railbus_shared.bus.sink import BusSink
from railbus_shared.layout import Layout
from railbus_shared.log_reader import read_events
from railbus_shared.metrics import Metrics
from railbus_shared.service import Context
from railbus_shared.settings import CommonSettings
from railbus_shared.telemetry import About, LearningTelemetry
from railbus_shared.waiting import end
from railbus_telemetry.service import TelemetryService
from railbus_telemetry.settings import Settings
from railbus_telemetry.traces import JobsUnderWay
from until import PATIENCE_S, until


class Collector:
    """An OTLP endpoint that refuses as often as it is told to."""

    def __init__(self, *refusals: int) -> None:
        self.refusals = list(refusals)
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[str] = []

    async def take(self, request: web.Request) -> web.Response:
        if self.refusals:
            return web.Response(status=self.refusals.pop(0))
        self.headers.append(request.headers["authorization"])
        self.bodies.append(await request.json())
        return web.json_response({})

    @property
    def spans(self) -> list[dict[str, Any]]:
        groups = [group for body in self.bodies for group in body["resourceSpans"]]
        return [span for group in groups for scope in group["scopeSpans"] for span in scope["spans"]]


@contextlib.asynccontextmanager
async def listening(collector: Collector) -> AsyncIterator[str]:
    app = web.Application()
    app.router.add_post("/v1/traces", collector.take)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


@contextlib.asynccontextmanager
async def serving_log(common: CommonSettings, bus: Bus, endpoint: str) -> AsyncIterator[Metrics]:
    """A telemetry service, with what its metrics say."""
    metrics, stopping = Metrics("telemetry"), asyncio.Event()
    own = LearningTelemetry("telemetry", host="h")
    settings = Settings(otlp_endpoint=endpoint, otlp_headers={"authorization": "Bearer x"})  # type: ignore[dict-item]
    service = TelemetryService(Context(common, bus, own, metrics, stopping), settings)
    running = asyncio.ensure_future(service.run())
    try:
        yield metrics
    finally:
        stopping.set()
        async with asyncio.timeout(PATIENCE_S):
            await running


async def tell(bus: Bus, job: str, *whats: str) -> None:
    telemetry = LearningTelemetry("runner", host="h").with_sink(BusSink(bus))
    trace = tracing.of_job(job, incarnation=bus.incarnation)
    for what in whats:
        telemetry.record(what, {"cause": "ok"}, about=About(job, 1, 1, trace=trace))
    sending = asyncio.ensure_future(telemetry.run())
    assert await telemetry.flush(timeout_s=PATIENCE_S)
    await end(sending)


def lines(layout: Layout, job: str) -> int:
    return len(list(read_events(layout, job=job)))


LIFE = ("job.placed", "job.started", "job.first_step", "job.succeeded")


async def test_a_trace_is_sent_when_its_job_has_ended_also_past_a_refusal_and_a_restart(
    common: CommonSettings, bus: Bus, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("railbus_telemetry.traces._FIRST_WAIT_S", 0.01)
    collector = Collector(503)
    async with listening(collector) as url:
        async with serving_log(common, bus, url) as metrics:
            await tell(bus, "j-1", "job.queued", *LIFE)
            await tell(bus, "j-2", "job.queued", *LIFE[:2])
            await until(lambda: len(collector.spans) == 6)
            await until(lambda: lines(common.layout, "j-2") == 3)
            assert metrics.registry.get_sample_value("railbus_traces_exported_total") == 1
        async with serving_log(common, bus, url):
            await tell(bus, "j-2", *LIFE[2:])
            await until(lambda: len(collector.spans) == 12)
    assert set(collector.headers) == {"Bearer x"}
    for job, spans in (("j-1", collector.spans[:6]), ("j-2", collector.spans[6:])):
        root = tracing.parsed(tracing.of_job(job, incarnation=bus.incarnation))
        assert root is not None
        assert {span["traceId"] for span in spans} == {root.trace_id}
        assert [span["name"] for span in spans if "parentSpanId" not in span] == ["job"]
        assert {span["name"] for span in spans} == {"job", "wait", "start", "attempt", "setup", "train"}


async def test_the_trace_of_a_job_that_ends_right_before_a_stop_is_sent(common: CommonSettings, bus: Bus) -> None:
    collector = Collector(503)
    async with listening(collector) as url:
        async with serving_log(common, bus, url) as metrics:
            await tell(bus, "j-1", "job.queued", *LIFE)
        assert len(collector.spans) == 6
        assert metrics.registry.get_sample_value("railbus_traces_exported_total") == 1


async def test_a_trace_that_there_is_no_time_for_at_a_stop_is_counted(
    common: CommonSettings, bus: Bus, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("railbus_telemetry.traces._FINISH_S", 0.2)
    async with serving_log(common, bus, "http://127.0.0.1:9") as metrics:
        await tell(bus, "j-1", "job.queued", *LIFE)
    assert metrics.registry.get_sample_value("railbus_traces_dropped_total", {"reason": "stopped"}) == 1


async def test_a_collector_that_is_away_costs_traces_that_are_counted_and_no_line(
    common: CommonSettings, bus: Bus, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("railbus_telemetry.traces._FIRST_WAIT_S", 0.01)
    monkeypatch.setattr("railbus_telemetry.traces._LINGER_S", 0.0)
    async with serving_log(common, bus, "http://127.0.0.1:9") as metrics:
        for number in range(3):
            await tell(bus, f"j-{number}", "job.queued", *LIFE)
        await until(lambda: [lines(common.layout, f"j-{number}") for number in range(3)] == [5, 5, 5])
        sample = metrics.registry.get_sample_value
        await until(lambda: sample("railbus_traces_dropped_total", {"reason": "unreachable"}) == 3)
    assert sample("railbus_log_lines_written_total") == 15


def test_jobs_that_never_end_are_given_up_the_oldest_first_and_counted() -> None:
    held = JobsUnderWay(max_bytes=1000)
    for number in range(15):
        event = {"type": "job.queued", "job": f"j-{number}", "time": clock.now()}
        assert not held.heed(event, size=100)
    assert held.given_up == 5
    assert held.heed({"type": "job.failed", "job": "j-14"}, size=0)
    assert held.heed({"type": "job.failed", "job": "j-0"}, size=0)
    assert not held.heed({"type": "job.rejected", "job": "j-9"}, size=10**6)
    assert not held.heed({"type": "train.metrics", "job": "j-9"}, size=10**6)
    assert held.given_up == 5
    assert [len(held.take(job)) for job in ("j-14", "j-0")] == [2, 1]


def test_what_is_told_of_a_job_after_its_end_is_held_within_the_bound_and_not_for_ever() -> None:
    held = JobsUnderWay(max_bytes=1000)
    assert held.heed({"type": "job.failed", "job": "j-1"}, size=100)
    late = {"type": "app.x", "job": "j-1"}
    assert not any(held.heed(late, size=100) for _ in range(50))
    assert len(held.take("j-1")) == 10
    assert not any(held.heed(late, size=100) for _ in range(50))
    assert (held.take("j-1"), held.given_up) == ([], 0)
    assert not any(held.heed({"type": "app.x", "job": f"j-{n}"}, size=100) for n in range(2, 12))
    assert held.given_up == 0, "all of the bound is free again"

"""A trace goes from whoever submits a job into its record and into all that is told of it; the runner is played."""

from __future__ import annotations

import functools

import pytest

from played_cluster import JOB, History, device_manager, played_runner
from railbus.client import Client
from railbus_shared import tracing, wire
from railbus_shared.bus.connection import Bus, Outgoing
from railbus_shared.settings import CommonSettings
from until import PATIENCE_S, until

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.mark.timeout(2 * PATIENCE_S)
async def test_a_trace_comes_by_header_by_environment_or_is_the_jobs_own(
    common: CommonSettings, bus: Bus, monkeypatch: pytest.MonkeyPatch
) -> None:
    history, client = History(), Client(bus)
    async with played_runner(common, "a", history=history) as runner, device_manager(common, "dm1", history=history):
        header = {tracing.HEADER: PARENT}
        await bus.publish(Outgoing(bus.subjects.submit, wire.encode({**JOB, "id": "by-header"}), "m1", headers=header))
        await client.submit({**JOB, "id": "alone"})
        monkeypatch.setenv(tracing.VARIABLE, PARENT)
        await client.submit({**JOB, "id": "by-environment"})
        again = await client.submit({**JOB, "id": "alone"})  # the same job, though somebody else asks for it
        assert again.record.spec.trace is None
        for job in ("by-header", "alone", "by-environment"):
            await until(functools.partial(runner.has, job))
            await runner.end(job)
        records = {job: await client.job(job) for job in ("by-header", "alone", "by-environment")}
    contexts = {job: tracing.parsed(record.trace) for job, record in records.items()}
    parent = tracing.parsed(PARENT)
    assert parent is not None
    for job, context in contexts.items():
        assert context is not None
        assert (context.trace_id == parent.trace_id) == (job != "alone")
        assert context.span_id != parent.span_id
    assert len({context.span_id for context in contexts.values() if context}) == 3
    told = {(event.get("job"), event["type"]): event for event in history.events}
    for job, record in records.items():
        queued = told[job, "job.queued"]
        assert queued["trace"] == record.trace
        assert isinstance(queued["data"], dict)
        assert queued["data"].get("parent_span") == (None if job == "alone" else parent.span_id)
        for what in ("job.placed", "job.started", "job.succeeded"):
            assert told[job, what]["trace"] == tracing.of_attempt(record.trace, 1)

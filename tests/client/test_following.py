"""The story of a job is told to its end, also to who listens slowly, and it ends where the end is not told."""

from __future__ import annotations

import asyncio

import pytest

from railbus import following
from railbus.asking import Asker
from railbus.following import events_of
from railbus_shared import clock, wire
from railbus_shared.bus.connection import Bus, Outgoing
from railbus_shared.bus.endpoints import Endpoint, serving
from railbus_shared.contracts.jobs import JobRecord
from railbus_shared.contracts.requests import JobRef
from railbus_shared.metrics import Metrics
from records_for_tests import record

JOB = "j-1"
NUM_LINES = 40


async def _answer(_: JobRef) -> JobRecord:
    return record(state="succeeded")


async def _tell(bus: Bus, number: int, kind: str) -> None:
    event = {"v": 1, "id": f"p-{number}", "type": kind, "time": clock.now(), "producer": "p", "number": number,
             "severity": "info", "source": "test", "host": "h", "job": JOB, "data": {}}  # fmt: skip
    subject = bus.subjects.event("job", JOB, kind.partition(".")[2])
    await bus.publish(Outgoing(subject, wire.encode(event), msg_id=f"p-{number}"))


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(following, "_LAST_EVENTS_S", 1.0)
    monkeypatch.setattr(following, "_MAX_WAITING", 5)


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize("is_end_told", [True, False])
async def test_who_listens_slowly_hears_a_job_that_has_ended_to_its_end(bus: Bus, is_end_told: bool) -> None:
    """A listener that pauses for longer than the quiet after which a story counts as told."""
    for number in range(1, NUM_LINES + 1):
        await _tell(bus, number, "job.output")
    if is_end_told:
        await _tell(bus, NUM_LINES + 1, "job.succeeded")
    endpoint = Endpoint("get", bus.subjects.request("jobs", "get"), JobRef, _answer)
    heard: list[object] = []
    async with serving(bus, "jobs", "", [endpoint], metrics=Metrics("test"), rejected=lambda *_: None):
        async for event in events_of(Asker(bus), JOB):
            heard.append(event["number"])
            await asyncio.sleep(1.5 if len(heard) in {1, 20} else 0.01)
    assert heard == list(range(1, NUM_LINES + 1 + is_end_told))

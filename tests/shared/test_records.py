"""Job records: which state may follow which, and changing them against others."""

from __future__ import annotations

import asyncio
import itertools
import signal
from typing import get_args

import pytest

import railbus_shared.bus.bucket
from railbus_shared import clock
from railbus_shared.bus import connection
from railbus_shared.bus.bucket import Bucket
from railbus_shared.bus.connection import Bus
from railbus_shared.contracts.jobs import FINAL_STATES, JobRecord, JobSpec, JobState
from railbus_shared.errors import Conflict, JobNotFound, RequestTimeout
from railbus_shared.records import JobRecords, moved
from railbus_shared.settings import CommonSettings
from servers import Server

STATES: tuple[JobState, ...] = get_args(JobState)
ALLOWED = {
    ("queued", "placed"),
    ("placed", "running"), ("placed", "queued"),
    ("running", "succeeded"), ("running", "checkpointing"), ("running", "queued"),
    ("checkpointing", "queued"), ("checkpointing", "succeeded"),
    *((state, end) for state in ("queued", "placed", "running", "checkpointing") for end in ("failed", "cancelled")),
}  # fmt: skip


def _record(name: str = "j-1", *, state: JobState = "queued", **params: int) -> JobRecord:
    spec = JobSpec.parse({"model": "m", "dataset": "d", "entrypoint": "classifier", "params": dict(params)})
    return JobRecord(
        id=name, spec=spec, spec_sha256=spec.digest, sequence=1, incarnation="ab", state=state,
        submitted_at=clock.now(),
        changed_at=clock.now(),
    )  # fmt: skip


@pytest.mark.parametrize(("before", "after"), list(itertools.product(STATES, STATES)))
def test_only_the_states_of_the_design_follow_each_other(before: JobState, after: JobState) -> None:
    record = _record(state=before)
    if (before, after) not in ALLOWED:
        with pytest.raises(Conflict, match=f"is {before} and cannot become {after}") as caught:
            moved(record, after)
        assert caught.value.details == {"state": before}
        return
    found = moved(record, after, reason="because")
    assert (found.state, found.reason) == (after, "because")
    assert found.changed_at > record.changed_at
    assert (found.ended_at is not None) == (after in FINAL_STATES)


def test_no_state_follows_a_final_one() -> None:
    assert not {before for before, _ in ALLOWED} & FINAL_STATES
    assert {state for state in STATES if state not in {before for before, _ in ALLOWED}} == FINAL_STATES


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a second instead of three until an acknowledgement counts as lost."""
    monkeypatch.setattr(connection, "_PUBLISH_TIMEOUT_S", 0.5)
    monkeypatch.setattr(railbus_shared.bus.bucket, "_SNAPSHOT_TIMEOUT_S", 0.5)


@pytest.fixture
def records(bus: Bus) -> JobRecords:
    return JobRecords(Bucket(bus, bus.subjects.jobs))


async def test_a_record_is_created_once_and_the_same_spec_is_the_same_job(records: JobRecords) -> None:
    first = await records.create(_record(seed=1))
    assert await records.create(_record(seed=1)) == first
    assert (await records.get("j-1")).record == first
    with pytest.raises(Conflict, match="another spec") as caught:
        await records.create(_record(seed=2))
    assert caught.value.details["field"] == "id"
    assert (await records.get("j-1")).record == first


async def test_a_missing_job_is_told(records: JobRecords) -> None:
    with pytest.raises(JobNotFound):
        await records.get("nothing")
    with pytest.raises(JobNotFound):
        await records.change("nothing", lambda record: record)


async def test_a_change_that_wants_nothing_writes_nothing(records: JobRecords) -> None:
    await records.create(_record())
    before = await records.get("j-1")
    assert await records.change("j-1", lambda _: None) == before.record
    assert await records.get("j-1") == before


async def test_an_error_in_a_change_is_passed_on_and_nothing_is_written(records: JobRecords) -> None:
    await records.create(_record())
    before = await records.get("j-1")
    with pytest.raises(Conflict):
        await records.change("j-1", lambda record: moved(record, "running"))
    assert await records.get("j-1") == before


async def test_of_racing_ends_exactly_one_wins(records: JobRecords, common: CommonSettings) -> None:
    async with Bus.open(common, name="a") as first, Bus.open(common, name="b") as second:
        rivals = [JobRecords(Bucket(bus, bus.subjects.jobs)) for bus in (first, second)] + [records]
        ends: tuple[JobState, ...] = ("succeeded", "failed", "cancelled")
        for race in range(50):
            name = f"j-{race}"
            await records.create(_record(name, state="running"))

            async def finish(rival: JobRecords, end: JobState, name: str = name) -> JobRecord:
                return await rival.change(name, lambda record: moved(record, end))

            found = await asyncio.gather(
                *(finish(rival, end) for rival, end in zip(rivals, ends, strict=True)), return_exceptions=True
            )
            winners = [one for one in found if isinstance(one, JobRecord)]
            assert len(winners) == 1
            assert sum(isinstance(one, Conflict) for one in found) == 2
            assert (await records.get(name)).record == winners[0]


async def test_changes_that_do_not_exclude_each_other_are_all_made(records: JobRecords) -> None:
    await records.create(_record())
    await asyncio.gather(
        *(records.change("j-1", lambda record: record.changed(attempt=record.attempt + 1)) for _ in range(6))
    )
    assert (await records.get("j-1")).record.attempt == 6


async def test_a_change_whose_acknowledgement_is_lost_is_made_once(
    records: JobRecords, server: Server, impatient: None
) -> None:
    await records.create(_record(state="running"))
    assert server.process is not None

    stops = iter([signal.SIGSTOP])

    def finish(record: JobRecord) -> JobRecord:
        assert server.process is not None
        server.process.send_signal(next(stops, signal.SIGCONT))
        return moved(record, "succeeded", attempt=record.attempt + 1)

    asyncio.get_running_loop().call_later(0.8, server.process.send_signal, signal.SIGCONT)
    found = await records.change("j-1", finish)
    server.process.send_signal(signal.SIGCONT)
    assert (found.state, found.attempt) == ("succeeded", 1)
    assert (await records.get("j-1")).record == found


async def test_a_creation_that_is_not_known_to_be_stored_is_worth_trying_again(
    records: JobRecords, server: Server, impatient: None
) -> None:
    assert server.process is not None
    server.process.send_signal(signal.SIGSTOP)
    try:
        with pytest.raises(RequestTimeout):
            await records.create(_record())
    finally:
        server.process.send_signal(signal.SIGCONT)
    assert (await records.create(_record())).state == "queued"

"""Job records in their bucket: created once, changed against others, and when acknowledgements are lost."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator

import pytest

from railbus_shared import clock
from railbus_shared.bus import connection
from railbus_shared.bus.bucket import Bucket
from railbus_shared.bus.connection import Bus, Outgoing
from railbus_shared.contracts.jobs import CheckpointRef, JobRecord, JobSpec, JobState
from railbus_shared.errors import Conflict, JobNotFound, RequestTimeout, StaleLeaseEpoch
from railbus_shared.happenings import CancelAsked, Ended, Happening, PrioritySet, Saved, Started
from railbus_shared.records import Applied, JobRecords
from railbus_shared.settings import CommonSettings
from servers import Server


def _record(name: str = "j-1", *, state: JobState = "queued", **params: int) -> JobRecord:
    spec = JobSpec.parse({"model": "m", "dataset": "d", "entrypoint": "classifier", "params": dict(params)})
    return JobRecord(
        id=name, spec=spec, spec_sha256=spec.digest, sequence=1, incarnation="ab", state=state,
        submitted_at=clock.now(),
        changed_at=clock.now(),
    )  # fmt: skip


def _running(name: str) -> JobRecord:
    return _record(name, state="running").changed(attempt=1, lease_epoch=1, host="a", devices=("a-gpu0",))


@contextlib.contextmanager
def deaf(server: Server) -> Iterator[None]:
    """The server does not answer, and an acknowledgement counts as lost after half a second instead of three."""
    server.pause()
    try:
        with pytest.MonkeyPatch.context() as impatient:
            impatient.setattr(connection, "_PUBLISH_TIMEOUT_S", 0.5)
            yield
    finally:
        server.resume()


@pytest.fixture
def records(bus: Bus) -> JobRecords:
    return JobRecords(Bucket(bus, bus.subjects.jobs))


async def test_a_record_is_created_once_and_the_same_spec_is_the_same_job(records: JobRecords) -> None:
    first = await records.create(_record(seed=1))
    assert await records.create(_record(seed=1)) == first
    assert await records.get("j-1") == first
    with pytest.raises(Conflict, match="another spec") as caught:
        await records.create(_record(seed=2))
    assert caught.value.details["field"] == "id"
    assert await records.get("j-1") == first


async def test_a_missing_job_is_told(records: JobRecords) -> None:
    with pytest.raises(JobNotFound):
        await records.get("nothing")
    with pytest.raises(JobNotFound):
        await records.apply("nothing", CancelAsked())


async def test_what_was_told_already_writes_nothing(records: JobRecords) -> None:
    await records.create(_record())
    before = await records.get("j-1")
    found = await records.apply("j-1", PrioritySet(0))
    assert (found.held, found.decision.is_changed) == (before, False)
    assert await records.get("j-1") == before


async def test_what_cannot_be_is_refused_and_nothing_is_written(records: JobRecords) -> None:
    await records.create(_record())
    before = await records.get("j-1")
    with pytest.raises(StaleLeaseEpoch):
        await records.apply("j-1", Started(1, "a"))
    assert await records.get("j-1") == before


async def test_of_racing_ends_exactly_one_wins(records: JobRecords, common: CommonSettings) -> None:
    async with Bus.open(common, name="a") as first, Bus.open(common, name="b") as second:
        rivals = [JobRecords(Bucket(bus, bus.subjects.jobs)) for bus in (first, second)] + [records]
        ends = (Ended(1, "a", "ok"), Ended(1, "a", "user_error", None, 1), Ended(1, "a", "cancelled"))
        for race in range(50):
            name = f"j-{race}"
            await records.create(_running(name))
            found = await asyncio.gather(
                *(rival.apply(name, end) for rival, end in zip(rivals, ends, strict=True)), return_exceptions=True
            )
            winners = [one.record for one in found if isinstance(one, Applied)]
            assert len(winners) == 1
            assert sum(isinstance(one, StaleLeaseEpoch) for one in found) == 2
            assert (await records.get(name)).record == winners[0]


async def test_changes_that_do_not_exclude_each_other_are_all_made(records: JobRecords) -> None:
    await records.create(_running("j-1"))
    saved = [Saved(1, "a", CheckpointRef(number=n, step=n, sha256="0" * 64)) for n in range(1, 7)]
    happened: list[Happening] = [*saved, CancelAsked(by="ada")]
    found = await asyncio.gather(*(records.apply("j-1", one) for one in happened))
    last = max(found, key=lambda applied: applied.revision)
    assert (await records.get("j-1")).record == last.record
    assert last.record.cancelled_by == "ada"
    assert len({applied.revision for applied in found}) == 7


async def test_a_change_whose_acknowledgement_is_lost_is_made_once_and_its_effects_are_told(
    records: JobRecords, server: Server
) -> None:
    await records.create(_running("j-1"))
    bus = records._bucket._bus
    publish = bus.publish

    async def publish_to_a_deaf_server(outgoing: Outgoing) -> int:
        """Between the read and the write the server stops, so that only the write's acknowledgement is lost."""
        vars(bus).pop("publish")
        with deaf(server):
            return await publish(outgoing)

    vars(bus)["publish"] = publish_to_a_deaf_server
    found = await records.apply("j-1", Ended(1, "a", "ok", None, 0))
    assert (found.record.state, found.record.exit_code) == ("succeeded", 0)
    assert [told.what for told in found.decision.told] == ["job.succeeded"]
    assert (await records.get("j-1")).record == found.record


async def test_a_creation_that_is_not_known_to_be_stored_is_worth_trying_again(
    records: JobRecords, server: Server
) -> None:
    with deaf(server), pytest.raises(RequestTimeout):
        await records.create(_record())
    assert (await records.create(_record())).record.state == "queued"

"""What people ask about jobs, answered by device_managers on a real NATS; the runners are played."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import AsyncIterator
from dataclasses import dataclass

import pytest

from histories import violations
from played_cluster import JOB, History, PlayedRunner, device_manager, played_runner
from railbus.client import Client
from railbus_device_manager.job_requests import next_number, retried_spec, retry_id
from railbus_shared.bus.connection import Bus
from railbus_shared.contracts.jobs import CheckpointRef, JobRecord
from railbus_shared.contracts.model import Contract
from railbus_shared.contracts.requests import CancelJob, HoldJob, JobList, JobRef, ListJobs, RetryJob, SetPriority
from railbus_shared.contracts.saving import SaveAttempt
from railbus_shared.errors import Conflict, JobNotFound, RunnerLost
from railbus_shared.happenings import Saved, Stopping
from railbus_shared.records import Applied
from railbus_shared.settings import CommonSettings
from records_for_tests import record, spec
from until import until

pytestmark = pytest.mark.timeout(90)


@dataclass
class Cluster:
    """One device_manager and one host with one slot."""

    bus: Bus
    runner: PlayedRunner
    history: History

    async def submit(self, **fields: object) -> str:
        return (await Client(self.bus).submit({**JOB, **fields})).id

    async def ask(self, verb: str, request: Contract) -> JobRecord:
        return JobRecord.parse(await self.bus.request(self.bus.subjects.request("jobs", verb), request.to_map()))

    async def job(self, job: str) -> JobRecord:
        return await self.ask("get", JobRef(id=job))

    async def list(self, **fields: object) -> list[str]:
        asked = ListJobs.parse(fields)
        answer = await self.bus.request(self.bus.subjects.request("jobs", "list"), asked.to_map())
        return [one.id for one in JobList.parse(answer).jobs]

    async def submit_running(self, **fields: object) -> str:
        job = await self.submit(**fields)
        await until(lambda: self.runner.has(job))
        return job


@pytest.fixture
def preempt_after_s() -> float:
    """How long a job of higher priority waits before another makes room for it."""
    return 15.0


@pytest.fixture
async def cluster(common: CommonSettings, bus: Bus, preempt_after_s: float) -> AsyncIterator[Cluster]:
    settings, history = common.model_copy(update={"lease_ttl_s": 20}), History()
    async with (
        played_runner(settings, "a", history=history) as runner,
        device_manager(settings, "dm1", history=history, preempt_after_s=preempt_after_s),
    ):
        yield Cluster(bus, runner, history)


async def test_a_cancelled_attempt_is_told_to_stop_with_the_grace_of_its_job(cluster: Cluster) -> None:
    job = await cluster.submit_running(stop_grace_s=7)
    asked = await cluster.ask("cancel", CancelJob(id=job, by="ada"))
    assert (asked.state, asked.cancel_requested, asked.cancelled_by) == ("running", True, "ada")
    await cluster.ask("cancel", CancelJob(id=job, now=True))
    assert [(stop.job, stop.grace_s, stop.reason) for stop in cluster.runner.stops] == [
        (job, 7, "cancelled"),
        (job, 0, "cancelled"),
    ]
    assert (await cluster.runner.end(job, "cancelled")).record.state == "cancelled"
    assert (await cluster.ask("cancel", CancelJob(id=job))).state == "cancelled"


async def test_a_cancel_may_name_the_job_alone_as_before(cluster: Cluster) -> None:
    await cluster.submit_running()
    waiting = await cluster.submit()
    answer = await cluster.bus.request(cluster.bus.subjects.request("jobs", "cancel"), {"id": waiting})
    assert (answer["state"], answer["end_cause"]) == ("cancelled", "cancelled")
    with pytest.raises(JobNotFound):
        await cluster.ask("cancel", CancelJob(id="nothing"))


async def test_a_held_job_waits_until_it_is_released(cluster: Cluster) -> None:
    first = await cluster.submit_running()
    held, other = await cluster.submit(), await cluster.submit()
    assert (await cluster.ask("hold", HoldJob(id=held, by="ada"))).held_by == "ada"
    with pytest.raises(Conflict, match="cannot be held"):
        await cluster.ask("hold", HoldJob(id=first))
    await cluster.runner.end(first)
    await until(lambda: cluster.runner.has(other))
    assert "held by ada" in (await cluster.job(held)).reason
    await cluster.ask("hold", HoldJob(id=held, held=False))
    await cluster.runner.end(other)
    await until(lambda: cluster.runner.has(held))


async def test_a_job_that_is_given_a_higher_priority_goes_first(cluster: Cluster) -> None:
    first = await cluster.submit_running()
    second, third = await cluster.submit(), await cluster.submit()
    assert (await cluster.ask("priority", SetPriority(id=third, priority=5))).priority == 5
    await cluster.runner.end(first)
    await until(lambda: cluster.runner.has(third))
    assert not cluster.runner.has(second)


async def test_a_waiting_job_is_shown_with_what_it_waits_for_and_its_record_is_not_written(cluster: Cluster) -> None:
    first = await cluster.submit_running()
    second = await cluster.submit()
    await until(lambda: _waits_for(cluster, second, first))
    assert (await cluster.runner.records.get(second)).record.reason == ""
    answer = await cluster.bus.request(cluster.bus.subjects.request("jobs", "list"), {"states": ["queued"]})
    assert [first in job.reason for job in JobList.parse(answer).jobs] == [True]


async def _waits_for(cluster: Cluster, job: str, holder: str) -> bool:
    return holder in (await cluster.job(job)).reason


async def test_jobs_are_listed_by_owner_group_and_state(cluster: Cluster) -> None:
    first = await cluster.submit_running(owner="ada", group="sweep-1")
    second = await cluster.submit(owner="ada")
    third = await cluster.submit(owner="ben", group="sweep-1")
    assert await cluster.list() == [third, second, first]
    assert await cluster.list(owner="ada") == [second, first]
    assert await cluster.list(group="sweep-1") == [third, first]
    assert await cluster.list(group="sweep-1", owner="ada", states=["running"]) == [first]


async def test_a_checkpoint_is_asked_of_the_runner_that_has_the_job_and_of_no_job_that_does_not_run(
    cluster: Cluster,
) -> None:
    client = Client(cluster.bus)
    job = await cluster.submit_running()
    saved = await client.checkpoint(job, timeout_s=3)
    assert (saved.job, saved.checkpoint.step, saved.seconds) == (job, 5, 0.5)
    assert cluster.runner.saves == [SaveAttempt(job=job, lease_epoch=1, timeout_s=3)]
    waiting = await client.submit(JOB)
    with pytest.raises(Conflict, match="is queued and writes no checkpoint now"):
        await waiting.checkpoint()
    await cluster.runner.end(job)
    with pytest.raises(Conflict, match="is succeeded"):
        await client.checkpoint(job)
    with pytest.raises(JobNotFound):
        await client.checkpoint("nothing")
    assert len(cluster.runner.saves) == 1


async def test_a_failed_job_is_submitted_again_from_its_last_checkpoint(cluster: Cluster) -> None:
    job = await cluster.submit_running(params={"epochs": 3})
    with pytest.raises(Conflict, match="is running and cannot be retried"):
        await cluster.ask("retry", RetryJob(id=job))
    await cluster.runner.apply(job, Saved(1, "a", CheckpointRef(number=12, step=5, sha256="0" * 64)))
    await cluster.runner.end(job, "user_error")
    again = await cluster.ask("retry", RetryJob(id=job))
    assert (again.id, again.retry_of, again.spec.resume_from) == (f"{job}-r1", job, "checkpoint-000012")
    assert again.spec.params == {"epochs": 3}
    assert (await cluster.ask("retry", RetryJob(id=job))).id == again.id
    await until(lambda: cluster.runner.has(again.id))
    await cluster.runner.end(again.id, "user_error")
    scratch = await cluster.ask("retry", RetryJob(id=again.id, from_scratch=True))
    assert (scratch.id, scratch.retry_of, scratch.spec.resume_from) == (f"{job}-r2", again.id, None)


def test_a_retry_of_a_retry_counts_on_and_its_id_fits() -> None:
    assert retry_id("train", 1) == "train-r1"
    assert retry_id("train-r1", 2) == "train-r2"
    assert retry_id("x" * 64, 10) == "x" * 60 + "-r10"
    assert next_number("train-r1", {"train": 0, "train-r1": 0, "train-r2": 0}) == 3
    made = record("failed", of=spec(resume_from="checkpoint-000007", id="j-1"), priority=4)
    assert retried_spec(made, number=1, from_scratch=False) == spec(
        id="j-1-r1", resume_from="checkpoint-000007", priority=4
    )
    assert retried_spec(made, number=1, from_scratch=True).resume_from is None


async def test_a_refused_start_goes_back_into_the_queue_and_its_device_is_free(cluster: Cluster) -> None:
    cluster.runner.refusal = RunnerLost("not now")
    job = await cluster.submit()
    await until(lambda: "job.requeued" in cluster.history.of(job))
    cluster.runner.refusal = None
    await until(lambda: cluster.runner.has(job))
    decision = await cluster.runner.end(job)
    assert (decision.record.state, decision.record.attempt) == ("succeeded", 1)
    assert decision.record.lease_epoch >= 2


@pytest.mark.parametrize("preempt_after_s", [0.5])
async def test_a_job_of_higher_priority_is_made_room_for_after_a_checkpoint(cluster: Cluster) -> None:
    low = await cluster.submit_running(stop_grace_s=9)
    high = await cluster.submit(priority=10)
    await until(lambda: bool(cluster.runner.stops))
    (stop,) = cluster.runner.stops
    assert (stop.job, stop.reason, stop.grace_s) == (low, "preempted", 9)
    assert (await cluster.job(low)).preempted_by == high
    await cluster.runner.apply(low, Stopping(1, "a"))
    await cluster.runner.apply(low, Saved(1, "a", CheckpointRef(number=1, step=5, sha256="0" * 64)))
    await cluster.runner.end(low, "preempted")
    await until(lambda: cluster.runner.has(high))
    waiting = await cluster.job(low)
    assert (waiting.state, waiting.attempt, waiting.end_cause, waiting.preempted_by) == ("queued", 0, "preempted", None)
    await cluster.runner.end(high)
    await until(lambda: cluster.runner.has(low))
    assert (await cluster.runner.end(low)).record.attempt == 1
    assert violations(cluster.history.events) == []


async def test_cancel_and_finish_at_once_have_one_end_of_which_both_are_told(cluster: Cluster) -> None:
    """Two hundred races, in which the end begins between 0 and 2.5 ms after the cancellation was asked for."""
    for race in range(200):
        job = await cluster.submit_running()

        async def end_a_moment_later(job: str = job, wait_s: float = race % 20 / 8000) -> Applied:
            await asyncio.sleep(wait_s)
            return await cluster.runner.end(job)

        asked, ended = await asyncio.gather(cluster.ask("cancel", CancelJob(id=job)), end_a_moment_later())
        final = (await cluster.runner.records.get(job)).record
        assert final == ended.record, race
        assert final.state in {"succeeded", "cancelled"}
        assert (final.state == "cancelled") == final.cancel_requested
        assert (asked.state, asked.cancel_requested) in {
            ("succeeded", False),  # it came too late, and is told so
            ("running", True),
            ("cancelled", True),
        }
        assert asked.cancel_requested == final.cancel_requested
    ends = [event for event in cluster.history.events if event["type"] in {"job.succeeded", "job.cancelled"}]
    assert len({str(event["job"]) for event in ends}) == len(ends)


async def test_a_cancel_while_the_start_is_under_way_ends_the_job_once_and_frees_its_device(cluster: Cluster) -> None:
    """Sixty races, in which the cancellation is asked for between 0 and 12 ms after the submission was accepted."""
    met: set[str] = set()
    for race in range(60):
        job = await cluster.submit()
        await asyncio.sleep(race % 20 / 1600)
        asked = await cluster.ask("cancel", CancelJob(id=job))
        met.add(asked.state)
        if cluster.runner.has(job):  # it has begun: its runner was told to stop it, or has yet to be
            await cluster.runner.end(job, "cancelled")
        await until(functools.partial(_is_cancelled, cluster, job))
    assert len(met) > 1, "every cancellation came at the same moment"
    last = await cluster.submit_running()
    await cluster.runner.end(last)
    ends = [event["job"] for event in cluster.history.events if event["type"] == "job.cancelled"]
    assert len(ends) == len(set(ends)) == 60
    assert violations(cluster.history.events) == []


async def _is_cancelled(cluster: Cluster, job: str) -> bool:
    if cluster.runner.has(job):
        await cluster.runner.end(job, "cancelled")
    return (await cluster.job(job)).state == "cancelled"

"""Submissions around restarts of NATS: none that was acknowledged is lost, none is two jobs; the runner is played."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools

import pytest

from histories import violations
from played_cluster import JOB, History, device_manager, played_runner
from railbus.client import Client
from railbus_shared import wire
from railbus_shared.bus.connection import Bus, Outgoing
from railbus_shared.contracts.jobs import JobRecord
from railbus_shared.errors import Conflict, TransientError
from railbus_shared.settings import CommonSettings
from servers import Server
from until import until

pytestmark = pytest.mark.timeout(90)  # NATS is killed twice, and all reconnect

SPEC = {**JOB, "id": "once"}


async def _submitted(client: Client) -> JobRecord:
    """Submit, as whoever got no answer does it again, and look at what there is."""
    found: list[JobRecord] = []

    async def is_taken() -> bool:
        with contextlib.suppress(TransientError):
            found.append(await client.job((await client.submit(SPEC)).id))
        return bool(found)

    await until(is_taken)
    return found[0]


async def _restart(server: Server, bus: Bus) -> None:
    before = bus.generation
    server.kill()
    server.start()
    await until(lambda: bus.generation > before)


async def test_a_submission_again_after_a_restart_of_nats_and_after_the_end_runs_nothing_twice(
    common: CommonSettings, bus: Bus, server: Server
) -> None:
    settings, history, client = common.model_copy(update={"lease_ttl_s": 20}), History(), Client(bus)
    async with (
        played_runner(settings, "a", history=history) as runner,
        device_manager(settings, "dm1", history=history),
    ):
        first = await client.job((await client.submit(SPEC)).id)
        await until(functools.partial(runner.has, "once"))
        await _restart(server, bus)
        again = await _submitted(client)
        assert (again.id, again.sequence, again.lease_epoch) == ("once", first.sequence, 1)
        with pytest.raises(Conflict, match="another spec"):
            await client.submit({**SPEC, "seed": 8})
        await runner.end("once")
        await _restart(server, bus)
        over = await _submitted(client)
        assert (over.state, over.sequence, over.attempt) == ("succeeded", first.sequence, 1)
        other = (await client.submit(JOB)).id
        await until(functools.partial(runner.has, other))
        assert not runner.has("once")
        await runner.end(other)
    assert history.of("once") == ["job.queued", "job.placed", "job.started", "job.succeeded"]


async def _publish(bus: Bus, number: int) -> None:
    """Publish a job event until it is acknowledged, under another id of the message each time."""
    for attempt in itertools.count():
        with contextlib.suppress(TransientError):
            event = Outgoing(bus.subjects.submit, wire.encode({**JOB, "id": f"j{number}"}), f"{number}-{attempt}")
            await bus.publish(event)
            return
        await asyncio.sleep(0.05)


async def test_what_is_acknowledged_while_nats_is_killed_again_and_again_is_one_job_each(
    common: CommonSettings, bus: Bus, server: Server
) -> None:
    settings, history = common.model_copy(update={"lease_ttl_s": 20}), History()
    jobs = {f"j{number}" for number in range(40)}
    async with (
        played_runner(settings, "a", history=history) as runner,
        device_manager(settings, "dm1", history=history),
    ):
        for restart in range(2):
            async with asyncio.TaskGroup() as tasks:
                for number in range(20):
                    tasks.create_task(_publish(bus, 20 * restart + number))
                await _restart(server, bus)
        async with asyncio.timeout(60):
            while jobs - _ended(history):
                for ref in list(runner.attempts):
                    await runner.end(ref.job)
                await asyncio.sleep(0.005)
    assert violations(history.events) == []
    assert _ended(history) == jobs
    assert all(history.of(job).count("job.started") == 1 for job in jobs)


def _ended(history: History) -> set[str]:
    return {str(event["job"]) for event in history.events if event["type"] == "job.succeeded"}

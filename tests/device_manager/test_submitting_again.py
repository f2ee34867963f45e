"""The same submission again, whatever happened in between, is the same job; the runner is played."""

from __future__ import annotations

import contextlib
import functools

import pytest

from played_cluster import JOB, History, device_manager, played_runner
from railbus.client import Client
from railbus_shared.bus.connection import Bus
from railbus_shared.contracts.jobs import JobRecord
from railbus_shared.errors import Conflict, TransientError
from railbus_shared.settings import CommonSettings
from servers import Server
from until import PATIENCE_S, until

pytestmark = pytest.mark.timeout(90)  # NATS is killed twice, and all reconnect

SPEC = {**JOB, "id": "once"}


async def _submitted(client: Client) -> JobRecord:
    """Submit, as whoever got no answer does it again, and look at what there is."""
    found: list[JobRecord] = []

    async def is_taken() -> bool:
        with contextlib.suppress(TransientError):
            found.append(await client.job((await client.submit(SPEC)).id))
        return bool(found)

    await until(is_taken, seconds=2 * PATIENCE_S)
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

"""What the queue takes: many jobs at once, on the real bus, with the real services.

    python -m benchmarks many_jobs [JOBS]

At rest, all services together: CPU, and memory that is theirs alone plus their share of the rest (PSS), the process
that forks trainers left out. A hundred jobs that do nothing, submitted at once, on one CPU slot a core: jobs a second
from the first publish to the last `job.succeeded`. Then JOBS jobs (10,000) while every device is leased by hand: how
soon each has its record, whether one is lost, what the device_manager needs, and how soon one of the highest priority
starts among them.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from benchmarks.results import Cell, command, show, tell
from benchmarks.running import Running, running_up
from railbus.client import FINAL_EVENTS, Client
from railbus.importing import import_dataset
from railbus_shared import clock, wire
from railbus_shared.bus.connection import Bus, Outgoing
from railbus_shared.contracts.devices import HeldLease
from railbus_shared.contracts.requests import HeldLeases
from railbus_shared.layout import Layout

_NOTHING: Final = {
    "model": "nothing",
    "dataset": "digits",
    "entrypoint": "trivial:nothing",
    "devices": {"kind": "cpu"},
}
_TRIVIAL: Final = 100
_SETTLE_S: Final = 10.0
_REST_S: Final = 30.0
_AT_ONCE: Final = 256
_PATIENCE_S: Final = 600.0
_LEASE_S: Final = 3600


@dataclass(frozen=True)
class Rest:
    """All services while nothing is to be done."""

    cores: float
    pss_mib: float
    by_service: Mapping[str, tuple[float, float]]
    """Share of a core, and MiB."""


@dataclass(frozen=True)
class Flood:
    """Many jobs that must wait."""

    jobs: int
    published_s: float
    """Until the last one was acknowledged by the stream."""
    accepted_s: float
    """Until the last record was made."""
    records: int
    rejected: int
    memory_mib: float
    """Of the device_manager, afterwards."""
    list_s: float
    """To list a hundred of them."""
    urgent_s: float
    """From submitting a job of the highest priority to `job.placed`, the device being given back before."""


async def at_rest(up: Running) -> Rest:
    await asyncio.sleep(_SETTLE_S)
    before, began = up.cpu_by_service(), time.perf_counter()
    await asyncio.sleep(_REST_S)
    took = time.perf_counter() - began
    after, memory = up.cpu_by_service(), up.pss_by_service()
    shares = {name: ((after[name] - before[name]) / took, memory[name] / 2**20) for name in after}
    return Rest(sum(cpu for cpu, _ in shares.values()), sum(mib for _, mib in shares.values()), shares)


async def trivial(client: Client, bus: Bus, num_jobs: int) -> float:
    """Jobs a second, from the first publish to the last success."""
    jobs = [{**_NOTHING, "id": f"trivial-{number}"} for number in range(num_jobs)]
    async with _ends(client, {str(job["id"]) for job in jobs}) as ended:
        began = time.perf_counter()
        await publish_all(bus, jobs)
        await ended.wait()
    return num_jobs / (time.perf_counter() - began)


@contextlib.asynccontextmanager
async def _ends(client: Client, waiting: set[str]) -> AsyncIterator[asyncio.Event]:
    """Set once all these jobs have succeeded."""
    done = asyncio.Event()

    async def listen() -> None:
        async for event in client.follow_all():
            if event.get("type") in FINAL_EVENTS:
                assert event["type"] == "job.succeeded", event
                waiting.discard(str(event.get("job")))
                if not waiting:
                    done.set()

    async with asyncio.timeout(_PATIENCE_S), asyncio.TaskGroup() as tasks:
        listening = tasks.create_task(listen())
        await asyncio.sleep(0.5)  # its subscription
        yield done
        listening.cancel()


async def publish_all(bus: Bus, jobs: Iterable[Mapping[str, object]]) -> None:
    """As any NATS client would, and each acknowledged by the stream."""
    slots = asyncio.Semaphore(_AT_ONCE)

    async def one(job: Mapping[str, object]) -> None:
        async with slots:
            await bus.publish(Outgoing(bus.subjects.submit, wire.encode(job), ""))

    await asyncio.gather(*(one(job) for job in jobs))


async def flood(up: Running, client: Client, bus: Bus, num_jobs: int) -> Flood:
    held = await lease_all(bus, client)
    counted: dict[str, int] = {"job.queued": 0, "job.rejected": 0}
    done = asyncio.Event()

    async def count() -> None:
        async for event in client.follow_all():
            kind = str(event["type"])
            if kind in counted:
                counted[kind] += 1
                if sum(counted.values()) >= num_jobs:
                    done.set()

    async with asyncio.timeout(_PATIENCE_S), asyncio.TaskGroup() as tasks:
        counting = tasks.create_task(count())
        await asyncio.sleep(0.5)
        began = time.perf_counter()
        await publish_all(bus, ({**_NOTHING, "id": f"flood-{number}"} for number in range(num_jobs)))
        published_s = time.perf_counter() - began
        await done.wait()
        accepted_s = time.perf_counter() - began
        counting.cancel()
    await asyncio.sleep(5.0)
    memory = up.pss_by_service()["device_manager"] / 2**20
    began = time.perf_counter()
    listed = await client.jobs(states=["queued"])
    list_s = time.perf_counter() - began
    urgent_s = await urgent(bus, client, held)
    return Flood(
        num_jobs,
        published_s,
        accepted_s,
        listed.total,
        counted["job.rejected"],
        memory,
        list_s,
        urgent_s,
    )


async def urgent(bus: Bus, client: Client, held: list[HeldLease]) -> float:
    """Give the devices back for one job that goes before all others; seconds until it is placed."""
    placed: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    async def listen() -> None:
        async for event in client.follow_all():
            if event.get("job") == "urgent" and event["type"] == "job.placed" and not placed.done():
                placed.set_result(clock.parse_rfc3339(str(event["time"])))

    async with asyncio.timeout(_PATIENCE_S), asyncio.TaskGroup() as tasks:
        listening = tasks.create_task(listen())
        await asyncio.sleep(0.5)
        released = HeldLeases(leases=tuple(held))
        began = time.time_ns()
        await client.submit({**_NOTHING, "id": "urgent", "priority": 100})
        await bus.request(bus.subjects.request("devices", "release"), released.to_map())
        seconds = (await placed - began) / 1e9
        listening.cancel()
    return seconds


async def lease_all(bus: Bus, client: Client) -> list[HeldLease]:
    """Take every device by hand, so that jobs wait."""
    held: list[HeldLease] = []
    for state in (await client.devices()).devices:
        wanted = {"holder": "bench", "devices": {"kind": state.device.kind}, "ttl_s": _LEASE_S}
        answer = await bus.request(bus.subjects.request("devices", "lease"), wanted)
        held += HeldLeases.parse(answer).leases
    return held


async def measured(root: Path, num_jobs: int) -> tuple[Rest, float, Flood]:
    with running_up(root, "--cpu-slots", str(os.cpu_count())) as up:
        rest = await at_rest(up)
        async with Client.connect(up.settings) as client, Bus.open(up.settings, name="bench") as bus:
            await trivial_warm_up(client, bus)
            rate = await trivial(client, bus, _TRIVIAL)
            found = await flood(up, client, bus, num_jobs)
            await asyncio.sleep(0)
    return rest, rate, found


async def trivial_warm_up(client: Client, bus: Bus) -> None:
    """The first jobs read files that later ones find in memory."""
    async with _ends(client, {"warm-1", "warm-2"}) as ended:
        await publish_all(bus, [{**_NOTHING, "id": "warm-1"}, {**_NOTHING, "id": "warm-2"}])
        await ended.wait()


def report(rest: Rest, rate: float, found: Flood) -> None:
    rows: list[list[Cell]] = [[name, cpu, mib] for name, (cpu, mib) in rest.by_service.items()]
    rows.append(["all", rest.cores, rest.pss_mib])
    show(f"$ {command('many_jobs')}   at rest", header=["", "cores", "PSS MiB"], rows=rows)
    accepted = found.jobs / found.accepted_s
    shown: list[list[Cell]] = [
        ["trivial jobs a second", rate],
        ["published a second", found.jobs / found.published_s],
        ["accepted a second", accepted],
        ["records", found.records],
        ["rejected", found.rejected],
        ["device_manager, PSS MiB", found.memory_mib],
        ["list of 100, s", found.list_s],
        ["urgent job placed, s", found.urgent_s],
    ]
    show(f"{found.jobs} jobs that wait", header=["", ""], rows=shown)
    tell(
        "many_jobs",
        rest_cores=round(rest.cores, 4),
        rest_pss_mib=round(rest.pss_mib),
        trivial_per_s=round(rate, 1),
        accepted_per_s=round(accepted, 1),
        published_per_s=round(found.jobs / found.published_s, 1),
        records=found.records,
        rejected=found.rejected,
        device_manager_mib=round(found.memory_mib),
        list_s=round(found.list_s, 3),
        urgent_s=round(found.urgent_s, 3),
    )


def main() -> None:
    num_jobs = int(sys.argv[1]) if len(sys.argv) > 1 else 10_000
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "learning"
        import_dataset(Layout(root), "digits")
        report(*asyncio.run(measured(root, num_jobs)))


if __name__ == "__main__":
    main()

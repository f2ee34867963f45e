"""How soon a job trains: from submitting it to its first optimizer step, on a runner that is warm.

    python -m benchmarks latency [JOBS]

One tiny job after another by a plain NATS publish, each when the one before has ended, on a real `railbus up` with the
embedded NATS. All processes read the same clock, so an event's time can be held against the publisher's. In turns with
the jobs, a process that has torch imported forks, and the child takes a step: the physical limit. And, in the same run,
the same step as a script by itself, under torchrun, and by `ray job submit` to a Ray head that runs, where
`make bench-ray` has installed it; each is a few fresh processes.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from benchmarks import starting
from benchmarks.results import Cell, command, quantile, show, summary, tell
from benchmarks.running import running_up
from railbus.client import FINAL_EVENTS, Client
from railbus.importing import import_dataset
from railbus_shared import clock, wire
from railbus_shared.bus.connection import Bus, Outgoing
from railbus_shared.layout import Layout

TARGET_P50_S: Final = 0.10
TARGET_P99_S: Final = 0.4
TARGET_TIMES_RAY: Final = 30
STAGES: Final = ("job.queued", "job.placed", "job.started", "dataset.opened", "job.first_step")
_JOB: Final = {"model": "tiny", "dataset": "digits", "entrypoint": "tiny:train", "devices": {"kind": "cpu"}}
_PAUSE_S: Final = (0.1, 0.9)
_WARM_UP: Final = 2
_FRESH: Final = 5
_PEER_ENV: Final = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}  # as trainers have it


@dataclass
class Timing:
    """One job: seconds from the moment before it was submitted."""

    began_ns: int
    events: dict[str, float] = field(default_factory=dict)
    """By type, as the producers' clocks had it."""
    seen_s: float = 0.0
    """When this client had the first step's event in its hands."""
    done: asyncio.Event = field(default_factory=asyncio.Event)


async def timings(client: Client, bus: Bus, peer: ForkPeer, num_jobs: int) -> tuple[list[Timing], list[float]]:
    """Of jobs that ran one after the other, and of a bare fork after each."""
    found: dict[str, Timing] = {}
    forks: list[float] = []
    async with asyncio.TaskGroup() as tasks:
        listening = tasks.create_task(_listen(client, found))
        for number in range(num_jobs):
            await asyncio.sleep(random.uniform(*_PAUSE_S))  # at no fixed phase of any period in the services
            job = f"tiny-{number}"
            event = Outgoing(bus.subjects.submit, wire.encode({**_JOB, "id": job}), "")
            found[job] = timing = Timing(time.time_ns())
            await bus.publish(event)
            async with asyncio.timeout(60):
                await timing.done.wait()
            forks.append(await asyncio.to_thread(peer.fork_s))
        listening.cancel()
    return list(found.values()), forks


async def _listen(client: Client, found: Mapping[str, Timing]) -> None:
    async for event in client.follow_all():
        timing = found.get(str(event.get("job")))
        if timing is None:
            continue
        kind = str(event["type"])
        assert kind != "job.failed", event
        timing.events[kind] = (clock.parse_rfc3339(str(event["time"])) - timing.began_ns) / 1e9
        if kind == "job.first_step":
            timing.seen_s = (time.time_ns() - timing.began_ns) / 1e9
        if kind in FINAL_EVENTS:
            timing.done.set()


def peers() -> dict[str, list[float]]:
    """Seconds to the first step of a script that is started otherwise."""
    found = {"python script": [starting.bare(_PEER_ENV) for _ in range(_FRESH)]}
    found["torchrun"] = [starting.torchrun(_PEER_ENV) for _ in range(_FRESH)]
    if starting.RAY.exists():
        with starting.ray_head(_PEER_ENV):
            found["ray job submit"] = [starting.ray_submit(_PEER_ENV) for _ in range(_FRESH)]
    return found


class ForkPeer:
    """A warm process that forks when it is told to."""

    def __init__(self) -> None:
        command = [sys.executable, "-m", "benchmarks.one_step", "fork"]
        self._process = subprocess.Popen(
            command, env=_PEER_ENV, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        self.fork_s()

    def fork_s(self) -> float:
        """Seconds from before a fork until its child has taken a step."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return float(self._process.stdout.readline())

    def close(self) -> None:
        self._process.communicate()


async def measured(root: Path, num_jobs: int) -> tuple[list[Timing], list[float]]:
    """Timings of the jobs and of the bare forks between them, once a few of each have warmed everything up."""
    with running_up(root) as up, contextlib.closing(ForkPeer()) as peer:
        async with Client.connect(up.settings) as client, Bus.open(up.settings, name="bench") as bus:
            jobs, forks = await timings(client, bus, peer, num_jobs + _WARM_UP)
    return jobs[_WARM_UP:], forks[_WARM_UP:]


def report(jobs: list[Timing], *, forked: list[float], others: Mapping[str, list[float]]) -> None:
    first = [job.events["job.first_step"] for job in jobs]
    told = {
        "publish to first step": _summary(first),
        "the same, seen by a client": _summary([job.seen_s for job in jobs]),
        "bare fork to first step": _summary(forked),
        **{name: _summary(seconds) for name, seconds in others.items()},
    }
    rows: list[list[Cell]] = [[name, *numbers.values()] for name, numbers in told.items()]
    show(f"$ {command('latency')}   (seconds)", header=["", "p50", "p90", "min", "max", "p99"], rows=rows)
    stages: list[list[Cell]] = []
    before = [0.0] * len(jobs)
    for stage in STAGES:
        at = [job.events[stage] for job in jobs]
        step = [now - then for now, then in zip(at, before, strict=True)]
        stages.append([stage, statistics.median(at), *list(_summary(step).values())])
        before = at
    show(
        "where it goes (seconds since the stage before)", header=["", "at", *told["publish to first step"]], rows=stages
    )
    ours = statistics.median(first)
    times = {name: round(statistics.median(seconds) / ours, 1) for name, seconds in others.items()}
    tell(
        "latency",
        jobs=len(jobs),
        first_step_s=told["publish to first step"],
        seen_s=told["the same, seen by a client"],
        fork_s=round(statistics.median(forked), 4),
        others_s={name: round(statistics.median(seconds), 3) for name, seconds in others.items()},
        times_as_fast_as=times,
        stages_s={str(row[0]): round(float(row[2]), 4) for row in stages},
        targets={"p50": TARGET_P50_S, "p99": TARGET_P99_S, "times ray": TARGET_TIMES_RAY},
        within_target=ours <= TARGET_P50_S
        and quantile(first, 0.99) <= TARGET_P99_S
        and times.get("ray job submit", TARGET_TIMES_RAY) >= TARGET_TIMES_RAY,
    )


def _summary(values: Sequence[float]) -> dict[str, float]:
    return {**summary(values), "p99": round(quantile(values, 0.99), 4)}


def main() -> None:
    num_jobs = int(sys.argv[1]) if len(sys.argv) > 1 else 100
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "learning"
        import_dataset(Layout(root), "digits")
        jobs, forked = asyncio.run(measured(root, num_jobs))
    report(jobs, forked=forked, others=peers())


if __name__ == "__main__":
    main()

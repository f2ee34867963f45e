"""How soon a job trains: from submitting it to its first optimizer step, on a runner that is warm.

    python -m benchmarks submit_latency [JOBS]

One tiny job after another by `Client.submit`, each when the one before has ended, on a real `railbus up` with the
embedded NATS. All processes read the same clock, so an event's time can be held against the client's. In turns with the
jobs, a process that has torch imported forks, and the child takes a step: the physical limit. And, in the same run, a
few fresh interpreters import torch and take a step, which is what starting a script costs.
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
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from benchmarks.results import Cell, command, show, summary, tell
from benchmarks.running import running_up
from railbus.client import FINAL_EVENTS, Client
from railbus.importing import import_dataset
from railbus_shared import clock
from railbus_shared.layout import Layout

TARGET_S: Final = 0.25
STAGES: Final = ("job.queued", "job.placed", "job.started", "dataset.opened", "job.first_step")
_JOB: Final = {"model": "tiny", "dataset": "digits", "entrypoint": "tiny:train", "devices": {"kind": "cpu"}}
_PAUSE_S: Final = (0.1, 1.1)
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


async def timings(client: Client, peer: ForkPeer, num_jobs: int) -> tuple[list[Timing], list[float]]:
    """Of jobs that ran one after the other, and of a bare fork after each."""
    found: dict[str, Timing] = {}
    forks: list[float] = []
    async with asyncio.TaskGroup() as tasks:
        listening = tasks.create_task(_listen(client, found))
        for number in range(num_jobs):
            await asyncio.sleep(random.uniform(*_PAUSE_S))  # at no fixed phase of any period in the services
            found[f"tiny-{number}"] = timing = Timing(time.time_ns())
            await client.submit({**_JOB, "id": f"tiny-{number}"})
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


def fresh_s() -> float:
    """Seconds to a step of an interpreter that begins from nothing."""
    began = time.time_ns()
    command = [sys.executable, "-m", "benchmarks.one_step"]
    done = subprocess.run(command, env=_PEER_ENV, check=True, capture_output=True, text=True)
    return (int(done.stdout) - began) / 1e9


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
        async with Client.connect(up.settings) as client:
            jobs, forks = await timings(client, peer, num_jobs + _WARM_UP)
    return jobs[_WARM_UP:], forks[_WARM_UP:]


def report(jobs: list[Timing], *, fresh: list[float], forked: list[float]) -> None:
    first = [job.events["job.first_step"] for job in jobs]
    told = {
        "submit to first step": summary(first),
        "the same, seen by the client": summary([job.seen_s for job in jobs]),
        "fresh interpreter to first step": summary(fresh),
        "bare fork to first step": summary(forked),
    }
    rows: list[list[Cell]] = [[name, *numbers.values()] for name, numbers in told.items()]
    show(f"$ {command('submit_latency')}   (seconds)", header=["", "p50", "p90", "min", "max"], rows=rows)
    stages: list[list[Cell]] = []
    before = [0.0] * len(jobs)
    for stage in STAGES:
        at = [job.events[stage] for job in jobs]
        step = [now - then for now, then in zip(at, before, strict=True)]
        stages.append([stage, statistics.median(at), *list(summary(step).values())])
        before = at
    show("where it goes (seconds since the stage before)", header=["", "at", "p50", "p90", "min", "max"], rows=stages)
    p50, fresh_p50, fork_p50 = (statistics.median(values) for values in (first, fresh, forked))
    tell(
        "submit_latency",
        jobs=len(jobs),
        first_step_s=told["submit to first step"],
        seen_s=told["the same, seen by the client"],
        fresh_s=round(fresh_p50, 3),
        fork_s=round(fork_p50, 4),
        times_faster_than_fresh=round(fresh_p50 / p50, 1),
        over_bare_fork_s=round(p50 - fork_p50, 4),
        stages_s={str(row[0]): round(float(row[2]), 4) for row in stages},
        target_s=TARGET_S,
        within_target=p50 <= TARGET_S,
    )


def main() -> None:
    num_jobs = int(sys.argv[1]) if len(sys.argv) > 1 else 30
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "learning"
        import_dataset(Layout(root), "digits")
        jobs, forked = asyncio.run(measured(root, num_jobs))
    report(jobs, fresh=[fresh_s() for _ in range(_FRESH)], forked=forked)


if __name__ == "__main__":
    main()

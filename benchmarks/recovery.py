"""How soon a job trains again after what runs it was killed: from kill -9 to the first step of the next attempt.

    python -m benchmarks recovery [RUNS]

One job on a real `railbus up` writes a checkpoint every 20 steps, and goes on from its last one. Killed in turns: the
trainer alone; the runner, and the trainer dies with it. `railbus up` starts another runner, which must import torch
first. Then the runner once more, which stays away (`railbus up` is paused), beside another host with the same files:
there the lease must lapse. All processes read the same clock, so an event's time can be held against the kill's. The
work lost is what had been trained since the checkpoint.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Final

import psutil

from benchmarks.results import Cell, command, show, summary, tell
from benchmarks.running import WARM, Running, running_up
from benchmarks.second_host import HOST, second_host
from railbus.client import Client
from railbus.importing import import_dataset
from railbus_shared import clock
from railbus_shared.layout import Layout
from railbus_shared.settings import CommonSettings

TRAINER_TARGET_S: Final = 1.0
RUNNER_SLACK_S: Final = 3.0
_PATIENCE_S: Final = 90.0
_ELSEWHERE: Final = 3
_JOB: Final = {
    "model": "steady",
    "dataset": "digits",
    "entrypoint": "steady:train",
    "params": {"epochs": 100_000},
    "devices": {"kind": "cpu"},
    "checkpoint": {"every_steps": 20},
    "max_attempts": 100,
}


def runner_of(up: Running) -> int:
    return up.pid_of("runner")


def trainer_of(up: Running) -> int:
    """The process of the one trainer: the child of the process that forks them."""
    for child in psutil.Process(runner_of(up)).children():
        if WARM in child.cmdline():
            (trainer,) = child.children()
            return trainer.pid
    raise AssertionError("the runner has no process that forks trainers")


async def recoveries(up: Running, client: Client, job: str, victim: Callable[[Running], int], runs: int) -> list[float]:
    """Seconds from each kill to the first step afterwards."""
    found: list[float] = []
    events = client.follow(job)
    await _next(events, "job.checkpointed")
    for _ in range(runs):
        await asyncio.sleep(random.uniform(0.5, 5.5))  # at no fixed phase of the renewal of its lease
        killed_ns = time.time_ns()
        os.kill(victim(up), signal.SIGKILL)
        stepped = await _next(events, "job.first_step", after_ns=killed_ns)
        found.append((clock.parse_rfc3339(str(stepped["time"])) - killed_ns) / 1e9)
        await _next(events, "job.checkpointed", after_ns=time.time_ns())
    return found


async def _next(events: AsyncIterator[Mapping[str, object]], kind: str, *, after_ns: int = 0) -> Mapping[str, object]:
    async with asyncio.timeout(_PATIENCE_S):
        async for event in events:
            assert event["type"] not in {"job.failed", "job.succeeded"}, event
            if event["type"] == kind and clock.parse_rfc3339(str(event["time"])) > after_ns:
                return event
    raise AssertionError(f"the events ended without {kind}")


async def measured(root: Path, runs: int) -> tuple[list[float], list[float]]:
    """After kills of the trainer, and of the runner."""
    with running_up(root) as up:
        async with Client.connect(up.settings) as client:
            job = (await client.submit(_JOB)).id
            trainers = await recoveries(up, client, job, trainer_of, runs)
            runners = await recoveries(up, client, job, runner_of, runs)
            await client.cancel(job)
            async for _ in client.follow(job):
                pass
    return trainers, runners


async def taken_over(root: Path, other: Path) -> float:
    """Seconds from the kill of a runner that stays away to the first step on another host."""
    with running_up(root) as up:
        async with Client.connect(up.settings) as client:
            job = (await client.submit(_JOB)).id
            events = client.follow(job)
            await _next(events, "job.checkpointed")
            with second_host(up, other):
                await asyncio.sleep(random.uniform(0.5, 5.5))
                os.kill(up.pid, signal.SIGSTOP)
                try:
                    killed_ns = time.time_ns()
                    os.kill(runner_of(up), signal.SIGKILL)
                    stepped = await _next(events, "job.first_step", after_ns=killed_ns)
                finally:
                    os.kill(up.pid, signal.SIGCONT)
                assert stepped["host"] == HOST, stepped
                await client.cancel(job)
                async for _ in client.follow(job):
                    pass
    return (clock.parse_rfc3339(str(stepped["time"])) - killed_ns) / 1e9


def report(trainers: list[float], runners: list[float], elsewhere: list[float]) -> None:
    ttl_s = CommonSettings().lease_ttl_s
    rows: list[list[Cell]] = [
        ["trainer killed", *summary(trainers).values(), TRAINER_TARGET_S],
        ["runner killed", *summary(runners).values(), ttl_s + RUNNER_SLACK_S],
        ["runner killed for good", *summary(elsewhere).values(), ttl_s + RUNNER_SLACK_S],
    ]
    show(
        f"$ {command('recovery')}   (seconds from kill -9 to the first step)",
        header=["", "p50", "p90", "min", "max", "target"],
        rows=rows,
    )
    tell(
        "recovery",
        runs=len(trainers),
        trainer_s=summary(trainers),
        runner_s=summary(runners),
        elsewhere_s=summary(elsewhere),
        lease_ttl_s=ttl_s,
        within_target=max(trainers) <= TRAINER_TARGET_S and max(*runners, *elsewhere) <= ttl_s + RUNNER_SLACK_S,
    )


def main() -> None:
    runs = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "learning"
        import_dataset(Layout(root), "digits")
        trainers, runners = asyncio.run(measured(root, runs))
        elsewhere = [asyncio.run(taken_over(root, Path(folder) / f"other-{run}")) for run in range(_ELSEWHERE)]
    report(trainers, runners, elsewhere)


if __name__ == "__main__":
    main()

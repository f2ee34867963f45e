"""A cluster on a virtual clock: jobs arrive, a scheduler gives them hosts, and they end when their run time is over."""

from __future__ import annotations

import heapq
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from benchmarks.results import quantile
from benchmarks.scheduling.workload import HEAVY, HOSTS, OWNERS, PER_HOST, SIZES, Job


class Scheduler(Protocol):
    """Decides; it is told everything that happens."""

    def arrived(self, job: Job, now: float) -> None:
        """A job waits."""

    def ended(self, job: Job, now: float) -> None:
        """A job has freed its devices."""

    def starts(self, now: float) -> Iterable[Job]:
        """Jobs that start now."""


@dataclass(frozen=True)
class Outcome:
    """When each job started, and what follows from it."""

    jobs: Sequence[Job]
    started_at: Mapping[int, float]

    @property
    def utilisation(self) -> float:
        """Part of the devices in use, until the last job has arrived."""
        until = max(job.arrives_at for job in self.jobs)
        used = sum(
            job.devices * max(0.0, min(until, self.started_at[job.number] + job.run_s) - self.started_at[job.number])
            for job in self.jobs
        )
        return used / (HOSTS * PER_HOST * until)

    def waits(self, *, size: str | None = None, owner: str | None = None) -> list[float]:
        """Seconds that jobs waited."""
        return [
            self.started_at[job.number] - job.arrives_at
            for job in self.jobs
            if size in (None, job.size) and owner in (None, job.owner)
        ]

    def figures(self) -> dict[str, float]:
        """What is compared and bounded."""
        found = {"utilisation": self.utilisation, "mean_wait_s": statistics.mean(self.waits())}
        for size in SIZES:
            found[f"mean_wait_{size}_s"] = statistics.mean(self.waits(size=size))
            found[f"p99_wait_{size}_s"] = quantile(self.waits(size=size), 0.99)
        light = [statistics.mean(waits) for owner in OWNERS if owner != HEAVY and (waits := self.waits(owner=owner))]
        if light:
            found["mean_wait_light_owners_s"] = statistics.mean(light)
            found["light_owners_apart_s"] = max(light) - min(light)
            found["mean_wait_heavy_owner_s"] = statistics.mean(self.waits(owner=HEAVY))
        return found


def simulate(jobs: Sequence[Job], scheduler: Scheduler) -> Outcome:
    """Run all jobs; raises AssertionError if the scheduler starts one twice, too many, or lets one wait for ever."""
    started_at: dict[int, float] = {}
    ends: list[tuple[float, int]] = []
    arrivals = list(reversed(jobs))
    in_use = 0
    while arrivals or ends:
        now = min([*([arrivals[-1].arrives_at] if arrivals else []), *([ends[0][0]] if ends else [])])
        while ends and ends[0][0] <= now:
            job = jobs[heapq.heappop(ends)[1]]
            in_use -= job.devices
            scheduler.ended(job, now)
        while arrivals and arrivals[-1].arrives_at <= now:
            scheduler.arrived(arrivals.pop(), now)
        for job in scheduler.starts(now):
            assert job.number not in started_at, f"job {job.number} started twice"
            started_at[job.number] = now
            in_use += job.devices
            heapq.heappush(ends, (now + job.run_s, job.number))
        assert in_use <= HOSTS * PER_HOST, "more devices than there are"
    assert len(started_at) == len(jobs), f"{len(jobs) - len(started_at)} jobs never started"
    return Outcome(jobs, started_at)

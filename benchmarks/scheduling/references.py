"""What placement is compared with: first come, first served, and EASY backfill, as plainly as they can be written.

EASY: Lifka, "The ANL/IBM SP scheduling system", 1995; Mu'alem and Feitelson, "Utilization, predictability, workloads,
and user runtime estimates in scheduling the IBM SP2 with backfilling", 2001. Every job has its devices on one host.
"""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.scheduling.workload import HOSTS, PER_HOST, Job


class Fcfs:
    """Starts jobs in the order of their arrival, each on the host where it leaves the least free."""

    def __init__(self) -> None:
        self.queue: list[Job] = []
        self.free = [PER_HOST] * HOSTS
        self.running: dict[int, tuple[Job, int, float]] = {}
        """Job, host, and the end by its limit."""

    def arrived(self, job: Job, now: float) -> None:  # noqa: ARG002 - the others need it
        self.queue.append(job)

    def ended(self, job: Job, now: float) -> None:  # noqa: ARG002
        _, host, _ = self.running.pop(job.number)
        self.free[host] += job.devices

    def starts(self, now: float) -> Iterator[Job]:
        while self.queue and (host := self.best(self.queue[0])) is not None:
            yield self.start(self.queue[0], host, now)

    def best(self, job: Job) -> int | None:
        """The fullest host with enough room."""
        hosts = [host for host in range(HOSTS) if self.free[host] >= job.devices]
        return min(hosts, key=lambda host: (self.free[host], host), default=None)

    def start(self, job: Job, host: int, now: float) -> Job:
        self.queue.remove(job)
        self.free[host] -= job.devices
        self.running[job.number] = (job, host, now + job.limit_s)
        return job


class Easy(Fcfs):
    """Jobs behind a head that waits start if that does not delay it, by the time limits of all."""

    def starts(self, now: float) -> Iterator[Job]:
        yield from super().starts(now)
        if not self.queue:
            return
        at, reserved, spare = self._reservation(self.queue[0], now)
        for job in self.queue[1:]:
            ends_in_time = now + job.limit_s <= at
            hosts = [
                host
                for host in range(HOSTS)
                if self.free[host] >= job.devices and (host != reserved or ends_in_time or job.devices <= spare)
            ]
            if hosts:
                host = min(hosts, key=lambda one: (self.free[one], one))
                if host == reserved and not ends_in_time:
                    spare -= job.devices
                yield self.start(job, host, now)

    def _reservation(self, head: Job, now: float) -> tuple[float, int, int]:
        """When and on which host the head starts at the latest, and how many devices it leaves there then."""
        found = []
        for host in range(HOSTS):
            free = self.free[host]
            for end, devices in sorted(
                (max(end, now), job.devices) for job, on, end in self.running.values() if on == host
            ):
                free += devices
                if free >= head.devices:
                    found.append((end, host, free - head.devices))
                    break
        return min(found)

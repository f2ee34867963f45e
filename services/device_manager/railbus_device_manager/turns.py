"""Whose turn it is: by priority, then by a fair share of each owner, then by age.

Within one priority the owner goes first whose share is used least: the devices that his jobs hold now, what they held
lately on average, and those of his jobs that had their turn already, over his weight. His oldest job goes first. So two
owners with long queues alternate, and the order depends on nothing but the queue and the shares: whether the jobs that
had their turn could start does not matter.

An owner who uses much could wait for ever with a job for several devices: others would take every single device that
becomes free before enough are. So of the jobs for several devices that wait for very long the oldest goes before all
others of its priority; one at a time, so that this is no way around the shares.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from operator import attrgetter
from typing import Final

from railbus_device_manager.wishes import Waiting

_AGE: Final = attrgetter("age")


def in_turn(
    queue: Iterable[Waiting],
    *,
    shares: Mapping[str, float] | None = None,
    weights: Mapping[str, float] | None = None,
    has_waited_long: Callable[[Waiting], bool] = lambda _: False,
) -> Iterator[Waiting]:
    """The jobs of the queue, one after the other; `shares` is what each owner uses to begin with, in devices."""
    by_priority: dict[int, dict[str, list[Waiting]]] = defaultdict(lambda: defaultdict(list))
    for job in queue:
        by_priority[job.priority][job.owner].append(job)
    given = dict(shares or {})
    for priority in sorted(by_priority, reverse=True):
        owners = by_priority[priority]
        for jobs in owners.values():
            jobs.sort(key=_AGE)
        late = _late(owners, has_waited_long) if len(owners) > 1 else None
        if late is not None:
            yield late
        yield from (job for job in _alternating(owners, given, weights or {}) if job is not late)


def _late(owners: Mapping[str, list[Waiting]], has_waited_long: Callable[[Waiting], bool]) -> Waiting | None:
    """The oldest job for several devices, if it has waited for very long."""
    oldest = [next((job for job in jobs if job.count > 1), None) for jobs in owners.values()]
    return min((job for job in oldest if job is not None and has_waited_long(job)), key=_AGE, default=None)


def _alternating(
    owners: Mapping[str, list[Waiting]], given: dict[str, float], weights: Mapping[str, float]
) -> Iterator[Waiting]:
    """Jobs of one priority; counts them in `given`."""
    if len(owners) == 1:
        ((owner, jobs),) = owners.items()
        yield from jobs
        given[owner] = given.get(owner, 0.0) + sum(job.units for job in jobs)
        return
    turns = [(given.get(owner, 0.0) / weights.get(owner, 1.0), jobs[0].age, owner, 0) for owner, jobs in owners.items()]
    heapq.heapify(turns)
    while turns:
        share, _, owner, number = turns[0]
        jobs = owners[owner]
        job = jobs[number]
        yield job
        given[owner] = given.get(owner, 0.0) + job.units
        if number + 1 < len(jobs):
            share += job.units / weights.get(owner, 1.0)
            heapq.heapreplace(turns, (share, jobs[number + 1].age, owner, number + 1))
        else:
            heapq.heappop(turns)

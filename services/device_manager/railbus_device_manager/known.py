"""Every job that this process has heard of. Jobs that have ended are kept as bytes: there may be many of them."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from railbus_shared import wire
from railbus_shared.contracts.jobs import JobRecord, JobState
from railbus_shared.contracts.requests import ListJobs
from railbus_shared.records import HeldRecord


@dataclass(frozen=True, slots=True)
class KnownJob:
    """A job's record at a revision, and of it what lists are sorted out by."""

    id: str
    revision: int
    state: JobState
    owner: str | None
    group: str | None
    retry_of: str | None
    submitted_at: str
    sequence: int
    _record: JobRecord | None
    _data: bytes

    @property
    def age(self) -> tuple[str, int]:
        """Larger for younger jobs."""
        return self.submitted_at, self.sequence

    def record(self) -> JobRecord:
        return self._record or JobRecord.parse(wire.decode(self._data))

    def is_asked_for(self, request: ListJobs) -> bool:
        return (
            (not request.states or self.state in request.states)
            and request.owner in {None, self.owner}
            and request.group in {None, self.group}
        )


class KnownJobs:
    """By id."""

    def __init__(self) -> None:
        self._jobs: dict[str, KnownJob] = {}
        self.counts: Counter[JobState] = Counter()
        """How many are in each state."""

    def __contains__(self, job: str) -> bool:
        return job in self._jobs

    def __iter__(self) -> Iterator[KnownJob]:
        return iter(self._jobs.values())

    def revision(self, job: str) -> int:
        """Of the newest record of a job; 0 for one that is not known."""
        known = self._jobs.get(job)
        return 0 if known is None else known.revision

    def held(self, job: str) -> HeldRecord:
        """The newest record of a job that is known."""
        known = self._jobs[job]
        return HeldRecord(known.record(), known.revision)

    def accept(self, held: HeldRecord) -> bool:
        """Take a record over; False if it is not newer than what is known. Clocks differ and jump; revisions do not."""
        record = held.record
        if self.revision(record.id) >= held.revision:
            return False
        if record.id in self._jobs:
            self.counts[self._jobs[record.id].state] -= 1
        self.counts[record.state] += 1
        self._jobs[record.id] = KnownJob(
            id=record.id,
            revision=held.revision,
            state=record.state,
            owner=record.spec.owner,
            group=record.spec.group,
            retry_of=record.retry_of,
            submitted_at=record.submitted_at,
            sequence=record.sequence,
            _record=None if record.is_final else record,
            _data=wire.encode(record.to_map()) if record.is_final else b"",
        )
        return True

    def newest(self, request: ListJobs) -> tuple[list[JobRecord], int]:
        """Records that meet a request, newest first and at most as many as it asks for; and how many there are."""
        found = [job for job in self if job.is_asked_for(request)]
        before = self._jobs.get(request.before) if request.before is not None else None
        older = found if before is None else [job for job in found if job.age < before.age]
        chosen = heapq.nlargest(request.limit, older, key=lambda job: job.age)
        return [job.record() for job in chosen], len(found)

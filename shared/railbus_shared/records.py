"""Job records: which state may follow which, and changing a record by compare-and-set.

    queued -> placed -> running -> succeeded | failed | cancelled

Every state that is not final may go to `cancelled` or `failed`; a placed or running job may go back to `queued`;
`running -> checkpointing -> queued` on preemption. A final state is never left.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

from railbus_shared import clock
from railbus_shared.bus.bucket import Bucket, Write
from railbus_shared.contracts.jobs import JobRecord, JobState
from railbus_shared.errors import Conflict, JobNotFound, RequestTimeout, RevisionConflict

_FOLLOWERS: Final[Mapping[JobState, frozenset[JobState]]] = {
    "queued": frozenset({"placed", "failed", "cancelled"}),
    "placed": frozenset({"running", "queued", "failed", "cancelled"}),
    "running": frozenset({"checkpointing", "queued", "succeeded", "failed", "cancelled"}),
    "checkpointing": frozenset({"queued", "succeeded", "failed", "cancelled"}),
    "succeeded": frozenset(),
    "failed": frozenset(),
    "cancelled": frozenset(),
}
_MAX_TRIES: Final = 16

Change = Callable[[JobRecord], JobRecord | None]
"""The record as it should be, from the record as it is; None to leave it."""


def moved(record: JobRecord, state: JobState, **fields: object) -> JobRecord:
    """The record in another state, with other values in some fields; raises Conflict if it may not follow."""
    if state not in _FOLLOWERS[record.state]:
        raise Conflict(
            f"job {record.id!r} is {record.state} and cannot become {state}", details={"state": record.state}
        )
    now = clock.now()
    if record.model_copy(update={"state": state}).is_final:
        fields.setdefault("ended_at", now)
    return record.changed(state=state, changed_at=now, **fields)


@dataclass(frozen=True)
class HeldRecord:
    """A record and the revision of its key."""

    record: JobRecord
    revision: int


class JobRecords:
    """The bucket of job records."""

    def __init__(self, bucket: Bucket) -> None:
        self._bucket = bucket

    async def get(self, job: str) -> HeldRecord:
        """Raises JobNotFound."""
        entry = await self._bucket.get(job)
        if entry is None or entry.value is None:
            raise JobNotFound(f"job has value {job!r}: there is no such job", hint="`railbus jobs` lists them")
        return HeldRecord(JobRecord.parse(entry.value), entry.revision)

    async def create(self, record: JobRecord) -> JobRecord:
        """Create a record; if its id is taken by the same spec, the one that is there.

        Raises Conflict if the id is taken by another spec.
        """
        try:
            await self._bucket.create(record.id, record.to_map())
        except (RevisionConflict, RequestTimeout):
            entry = await self._bucket.get(record.id)
            if entry is None or entry.value is None:
                raise  # it may yet be stored: to be tried again, not to be refused
            there = JobRecord.parse(entry.value)
            if there.spec_sha256 != record.spec_sha256:
                raise Conflict(
                    f"field 'id' has value {record.id!r}: the id is taken by a job with another spec",
                    hint="choose another id, or submit the same spec again to get the same job",
                    details={"field": "id", "value": record.id},
                ) from None
            return there
        return record

    async def change(self, job: str, change: Change) -> JobRecord:
        """Change a record, reading it again for as long as others are quicker; returns it as it stands then.

        Whatever `change` raises is passed on, and nothing has been written then. Raises JobNotFound, RequestTimeout,
        BusUnavailable.
        """
        unknown: list[JobRecord] = []
        for _ in range(_MAX_TRIES):
            held = await self.get(job)
            if held.record in unknown:
                return held.record  # a write whose acknowledgement was lost has been stored after all
            wanted = change(held.record)
            if wanted is None:
                return held.record
            try:
                await self._bucket.write(Write(job, wanted.to_map(), held.revision))
            except RevisionConflict:
                continue
            except RequestTimeout:
                unknown.append(wanted)
                continue
            return wanted
        raise RequestTimeout(f"job {job!r} was changed by others {_MAX_TRIES} times in a row", hint="try again")

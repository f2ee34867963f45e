"""Job records in their bucket: created once, and changed by compare-and-set as `lifecycle.decide` says."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

from railbus_shared import clock
from railbus_shared.bus.bucket import Bucket, Write
from railbus_shared.contracts.jobs import JobRecord
from railbus_shared.errors import Conflict, JobNotFound, RailbusError, RequestTimeout, RevisionConflict, TransientError
from railbus_shared.happenings import Happening
from railbus_shared.lifecycle import Decision, decide

_MAX_TRIES: Final = 16


@dataclass(frozen=True)
class HeldRecord:
    """A record and the revision of its key."""

    record: JobRecord
    revision: int


@dataclass(frozen=True)
class Applied:
    """What became of a record, and the revision at which it stands."""

    decision: Decision
    revision: int

    @property
    def record(self) -> JobRecord:
        return self.decision.record

    @property
    def held(self) -> HeldRecord:
        return HeldRecord(self.decision.record, self.revision)


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

    async def create(self, record: JobRecord) -> HeldRecord:
        """Create a record; if its id is taken by the same spec, the one that is there.

        Raises Conflict if the id is taken by another spec.
        """
        try:
            revision = await self._bucket.create(record.id, record.to_map())
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
            return HeldRecord(there, entry.revision)
        return HeldRecord(record, revision)

    async def create_all(self, records: Sequence[JobRecord]) -> list[HeldRecord | RailbusError]:
        """Create records as `create` would one after the other; the error of each that was not, in its place."""
        if len(records) > 1 and len({record.id for record in records}) == len(records):
            writes = [Write(record.id, record.to_map(), 0) for record in records]
            with contextlib.suppress(RevisionConflict, RequestTimeout):  # some are there already; then one by one
                revisions = await self._bucket.write_all(writes)
                return [HeldRecord(*made) for made in zip(records, revisions, strict=True)]
        return [await self._created(record) for record in records]

    async def _created(self, record: JobRecord) -> HeldRecord | RailbusError:
        try:
            return await self.create(record)
        except RailbusError as exc:
            return exc

    async def apply(self, job: str, happening: Happening, *, unknown: list[Decision] | None = None) -> Applied:
        """Change a record as the happening has it, deciding again for as long as others are quicker.

        What was decided is written when this returns, and its effects are the caller's to carry out. Raises what
        `decide` raises, and nothing has been written then; JobNotFound, RequestTimeout, BusUnavailable.

        Args:
            job: its id.
            happening: what happened to it.
            unknown: decisions whose write was not acknowledged; for a caller that tries again after a RequestTimeout,
                so that the effects of one that was stored after all are still carried out.
        """
        unknown = [] if unknown is None else unknown
        for _ in range(_MAX_TRIES):
            held = await self.get(job)
            decision = decide(held.record, happening, clock.now())
            if not decision.is_changed:
                return Applied(_ours(unknown, decision), held.revision)
            try:
                revision = await self._bucket.write(Write(job, decision.record.to_map(), held.revision))
            except RevisionConflict:
                continue
            except RequestTimeout:
                unknown.append(decision)
                continue
            except TransientError:
                unknown.append(decision)  # a connection that breaks may have carried it
                raise
            return Applied(decision, revision)
        raise RequestTimeout(f"job {job!r} was changed by others {_MAX_TRIES} times in a row", hint="try again")


def _ours(unknown: list[Decision], found: Decision) -> Decision:
    """If a write whose acknowledgement was lost has been stored after all, its effects are still to be carried out."""
    likely = [decision for decision in unknown if decision.record.state == found.record.state]
    return replace(likely[-1], record=found.record) if likely else found

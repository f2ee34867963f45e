"""What people ask about jobs: to see them, to end, hold, hasten or repeat them. `jobs.submit` is in `submissions`."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Final, Protocol

from railbus_device_manager.orders import Orders
from railbus_device_manager.placer import Placer
from railbus_device_manager.reports import Reports
from railbus_device_manager.submissions import Submissions
from railbus_shared import wire
from railbus_shared.bus.endpoints import AnyEndpoint, Endpoint
from railbus_shared.contracts.jobs import FINAL_STATES, JobRecord, JobSpec
from railbus_shared.contracts.requests import CancelJob, HoldJob, JobList, JobRef, ListJobs, RetryJob, SetPriority
from railbus_shared.contracts.saving import CheckpointJob, SavedCheckpoint
from railbus_shared.errors import Conflict, TransientError
from railbus_shared.happenings import CancelAsked, Happening, Held, PrioritySet, Released
from railbus_shared.layout import checkpoint_stem
from railbus_shared.names import JobId
from railbus_shared.records import JobRecords
from railbus_shared.subjects import Subjects

_MAX_ID: Final = 64
_BELIEVED_S: Final = 0.5  # a reading of the buckets; many may ask again and again what their jobs wait for
_MAX_LIST_BYTES: Final = wire.MAX_BYTES - 4096
_RETRY_ID: Final = re.compile(r"(.*)-r([1-9][0-9]*)\Z")


class Known(Protocol):
    """Ids that are taken."""

    def __contains__(self, job: str, /) -> bool: ...


class JobRequests:
    """Answers requests about jobs."""

    def __init__(
        self, records: JobRecords, placer: Placer, reports: Reports, submissions: Submissions, orders: Orders
    ) -> None:
        self._records = records
        self._placer = placer
        self._reports = reports
        self._submissions = submissions
        self._orders = orders

    def endpoints(self, subjects: Subjects) -> list[AnyEndpoint]:
        request = subjects.request
        return [
            Endpoint("get", request("jobs", "get"), JobRef, self.get),
            Endpoint("list-jobs", request("jobs", "list"), ListJobs, self.list_jobs),
            Endpoint("cancel", request("jobs", "cancel"), CancelJob, self.cancel),
            Endpoint("hold", request("jobs", "hold"), HoldJob, self.hold),
            Endpoint("priority", request("jobs", "priority"), SetPriority, self.set_priority),
            Endpoint("retry", request("jobs", "retry"), RetryJob, self.retry),
            Endpoint("checkpoint", request("jobs", "checkpoint"), CheckpointJob, self.checkpoint, may_wait=True),
        ]

    async def get(self, request: JobRef) -> JobRecord:
        record = (await self._records.get(request.id)).record
        if record.state != "queued":
            return record
        with contextlib.suppress(TransientError):  # then the reason is what was known a moment ago
            await self._reports.refresh(older_than_s=_BELIEVED_S)
        return _with_reason(record, self._placer.reasons([record.id]))

    async def list_jobs(self, request: ListJobs) -> JobList:
        shown, total = self._placer.known.newest(request)
        if any(record.state == "queued" for record in shown):
            reasons = self._placer.reasons([record.id for record in shown])
            shown = [_with_reason(record, reasons) for record in shown]
        return JobList(jobs=tuple(fitting(shown)), total=total)

    async def cancel(self, request: CancelJob) -> JobRecord:
        """End a waiting job at once; ask the runner of an active one to end it. A job that has ended stays as it is."""
        return await self._apply(request.id, CancelAsked(by=request.by, at_once=request.now))

    async def hold(self, request: HoldJob) -> JobRecord:
        """Keep a waiting job from being placed, or let it go; raises Conflict for one that does not wait."""
        return await self._apply(request.id, Held(request.by) if request.held else Released())

    async def set_priority(self, request: SetPriority) -> JobRecord:
        """Raises Conflict for a job that has ended."""
        return await self._apply(request.id, PrioritySet(request.priority))

    async def retry(self, request: RetryJob) -> JobRecord:
        """Submit an ended job again, as another one; the one that was made before, while that has not ended.

        Raises JobNotFound, Conflict for a job that has not ended, and what a submission is refused for.
        """
        record = (await self._records.get(request.id)).record
        if not record.is_final:
            raise Conflict(
                f"job {record.id!r} is {record.state} and cannot be retried",
                hint="wait for its end, or cancel it before",
                details={"state": record.state},
            )
        for other in self._placer.known:
            if other.retry_of == record.id and other.state not in FINAL_STATES:
                return other.record()
        number = next_number(record.id, self._placer.known)
        spec = retried_spec(record, number=number, from_scratch=request.from_scratch)
        return await self._submissions.submit(spec, retry_of=record.id)

    async def checkpoint(self, request: CheckpointJob) -> SavedCheckpoint:
        """Have a running job write a checkpoint; answers once the job record names it.

        Raises JobNotFound, Conflict for a job that does not run, RequestTimeout, and what its trainer could not write
        it for, such as StorageFull.
        """
        record = (await self._records.get(request.id)).record
        if record.state not in ("running", "checkpointing"):
            raise Conflict(
                f"job {record.id!r} is {record.state} and writes no checkpoint now",
                hint="its last one is shown by `railbus job`" if record.is_final else "ask again once it runs",
                details={"state": record.state},
            )
        return await self._orders.save(record, timeout_s=request.timeout_s)

    async def _apply(self, job: str, happening: Happening) -> JobRecord:
        applied = await self._records.apply(job, happening)
        self._placer.accept(applied.held)
        await self._orders.carry_out(applied)
        return applied.record


def next_number(job: str, known: Known) -> int:
    """Number of the next retry of a job, or of the job that it is a retry of."""
    number = 1
    while retry_id(job, number) in known:
        number += 1
    return number


def retry_id(job: str, number: int) -> str:
    """`<id>-r<number>`, cut to the length of an id; a retry of a retry counts on."""
    match = _RETRY_ID.match(job)
    suffix = f"-r{number}"
    return f"{(match[1] if match else job)[: _MAX_ID - len(suffix)]}{suffix}"


def retried_spec(record: JobRecord, *, number: int, from_scratch: bool) -> JobSpec:
    """The spec of a retry: the same, but that it begins from the last checkpoint that there is."""
    resume_from = record.spec.resume_from
    if from_scratch:
        resume_from = None
    elif record.checkpoint is not None:
        resume_from = checkpoint_stem(record.checkpoint.number)
    return record.spec.changed(
        id=retry_id(record.id, number), resume_from=resume_from, priority=record.priority, held=False
    )


def fitting(records: Iterable[JobRecord]) -> Iterator[JobRecord]:
    """The first records, as many as one message takes in either encoding."""
    left = _MAX_LIST_BYTES
    for record in records:
        message = record.to_map()
        left -= max(len(wire.encode(message, encoding=encoding)) for encoding in wire.Encoding)
        if left < 0:
            return
        yield record


def _with_reason(record: JobRecord, reasons: Mapping[JobId, str]) -> JobRecord:
    """The record with what it waits for now, in place of what it was queued for."""
    reason = reasons.get(JobId(record.id)) if record.state == "queued" else None
    return record if reason is None else record.model_copy(update={"reason": reason})

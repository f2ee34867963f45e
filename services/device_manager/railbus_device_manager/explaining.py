"""Requests that ask why: of a job that was submitted, and of one that is not yet."""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable

from railbus_device_manager.explanation import why
from railbus_device_manager.manager import DeviceManager
from railbus_device_manager.reports import Reports
from railbus_device_manager.submissions import new_record
from railbus_shared import clock
from railbus_shared.bus.endpoints import AnyEndpoint, Endpoint
from railbus_shared.contracts.jobs import JobRecord, JobSpec
from railbus_shared.contracts.requests import JobRef
from railbus_shared.contracts.waiting import Why
from railbus_shared.errors import TransientError
from railbus_shared.records import JobRecords
from railbus_shared.subjects import Subjects

_YOUNGEST = 2**63 - 1


class Explaining:
    """Answers `jobs.why` and `jobs.dry_run`."""

    def __init__(
        self,
        manager: DeviceManager,
        records: JobRecords,
        reports: Reports,
        *,
        check: Callable[[JobSpec], Awaitable[None]],
    ) -> None:
        self._manager = manager
        self._records = records
        self._reports = reports
        self._check = check

    def endpoints(self, subjects: Subjects) -> list[AnyEndpoint]:
        return [
            Endpoint("why", subjects.request("jobs", "why"), JobRef, self.why),
            Endpoint("dry-run", subjects.request("jobs", "dry_run"), JobSpec, self.dry_run),
        ]

    async def why(self, request: JobRef) -> Why:
        """Raises JobNotFound."""
        await self._refresh()  # before: a record that is older than the leases would wait for its own
        record = (await self._records.get(request.id)).record
        return self._explained(record, is_submitted=True)

    async def dry_run(self, spec: JobSpec) -> Why:
        """What would become of a job; raises what its submission would be refused for."""
        await self._check(spec)
        record = new_record(spec, sequence=_YOUNGEST, incarnation="", now=clock.now())
        await self._refresh()
        return self._explained(record, is_submitted=False)

    async def _refresh(self) -> None:
        with contextlib.suppress(TransientError):  # then it is what was known a moment ago
            await self._reports.refresh()

    def _explained(self, record: JobRecord, *, is_submitted: bool) -> Why:
        now = clock.boottime_s()
        offset_s = clock.now_ns() / clock.NS_PER_S - now
        return why(record, self._manager, now=now, wall_offset_s=offset_s, is_submitted=is_submitted)

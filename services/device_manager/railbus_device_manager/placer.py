"""The placer: one device_manager at a time looks at the queue and gives jobs their devices.

Being the placer is a key that expires. Two may believe it for a moment, when one of them was paused; leases are created
by compare-and-set, so even then no device is leased twice, and the records' lease epochs refuse the slower one.

A placement takes three steps, and what a crash leaves after each is mended by `DeviceManager.lost`:
leases (they expire), the record (`placed`, without a start: queued again), the request to the runner.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Iterable
from typing import Final

from railbus_device_manager.manager import DeviceManager, LostAttempt
from railbus_device_manager.placement import Placement
from railbus_device_manager.reports import Reports
from railbus_shared import clock, leases
from railbus_shared.bus.bucket import Bucket, SnapshotEnd, Write
from railbus_shared.bus.connection import Bus
from railbus_shared.conclusion import concluded
from railbus_shared.contracts.devices import DeviceInfo, HeldLease, ReclaimMark
from railbus_shared.contracts.jobs import ErrorBody, JobRecord
from railbus_shared.contracts.requests import StartAttempt
from railbus_shared.errors import (
    Conflict,
    NoFreeDevice,
    RailbusError,
    RequestTimeout,
    RevisionConflict,
    RunnerLost,
    TransientError,
    WireError,
)
from railbus_shared.records import JobRecords, moved
from railbus_shared.telemetry import LearningTelemetry
from railbus_shared.waiting import is_set_within

logger = logging.getLogger(__name__)

_LEADER_KEY: Final = "placer"
_LEADER_TTL_S: Final = 5
_START_S: Final = 5.0
_REFUSED_HOLD_S: Final = 2.0
_LOST_GRACE_S: Final = 2.0
_REASON_EVERY_S: Final = 2.0


class Leadership:
    """The key that says who places."""

    def __init__(self, bucket: Bucket, name: str) -> None:
        self._bucket = bucket
        self._name = name
        self._revision = 0
        self._renewed_s = 0.0

    async def held(self) -> bool:
        """Whether this process is the placer now; takes the key or renews it where it can."""
        now_s = clock.boottime_s()
        if self._revision and now_s - self._renewed_s < _LEADER_TTL_S / 3:
            return True
        value = {"holder": self._name}
        try:
            if self._revision:
                self._revision = await self._bucket.write(Write(_LEADER_KEY, value, self._revision, _LEADER_TTL_S))
            else:
                self._revision = await self._bucket.create(_LEADER_KEY, value, ttl_s=_LEADER_TTL_S)
        except (RevisionConflict, RequestTimeout):
            self._revision = 0
            return False
        self._renewed_s = now_s
        return True

    async def resign(self) -> None:
        """Let another one take over at once."""
        if self._revision:
            with contextlib.suppress(RailbusError):
                await self._bucket.write(Write(_LEADER_KEY, None, self._revision))


class Placer:
    """Places waiting jobs, and queues again those whose attempts are lost."""

    def __init__(
        self,
        bus: Bus,
        manager: DeviceManager,
        reports: Reports,
        telemetry: LearningTelemetry,
        *,
        lease_ttl_s: int,
    ) -> None:
        self._bus = bus
        self._manager = manager
        self._facts = manager.facts
        self._reports = reports
        self._telemetry = telemetry
        self._lease_ttl_s = lease_ttl_s
        self._jobs = Bucket(bus, bus.subjects.jobs)
        self._records = JobRecords(self._jobs)
        self._leadership = Leadership(Bucket(bus, bus.subjects.leader), telemetry.producer)
        self._news = asyncio.Event()
        self._has_records = asyncio.Event()
        self._contact_since_s = clock.boottime_s()
        self._reasons_told_s = 0.0
        self.records: dict[str, JobRecord] = {}
        """All records, final ones too."""

    def nudge(self) -> None:
        """There is news: look at the queue now."""
        self._news.set()

    def reconnected(self) -> None:
        """NATS was away, so leases may have lapsed whose holders are well: give those one life to come back."""
        self._contact_since_s = clock.boottime_s()

    def accept(self, record: JobRecord) -> None:
        """A record as this process has just written or read it; the watch tells it too, later."""
        before = self.records.get(record.id)
        if before is not None and (before.is_final or before.changed_at > record.changed_at):
            return
        self.records[record.id] = record
        self._facts.apply_record(record.id, record, now=clock.boottime_s())
        self.nudge()

    async def watch_records(self) -> None:
        """Keep the view of the job records up to date, until cancelled."""
        async with contextlib.aclosing(self._jobs.watch()) as told:
            async for entry in told:
                if isinstance(entry, SnapshotEnd):
                    self._has_records.set()
                    self.nudge()
                elif entry.value is not None:
                    self._accept_value(entry.key, entry.value)

    def _accept_value(self, job: str, value: dict[str, object]) -> None:
        try:
            self.accept(JobRecord.parse(value))
        except WireError as exc:
            logger.warning("a job record cannot be read", extra={"job": job, "problem": str(exc)})

    async def run(self, *, period_s: float) -> None:
        """Place until cancelled: when there is news, and every so often without."""
        await self._has_records.wait()
        try:
            while True:
                await is_set_within(self._news, period_s)
                self._news.clear()
                try:
                    if await self._leadership.held():
                        await self._look()
                except TransientError as exc:
                    logger.info("not placed now", extra={"problem": str(exc)})
        finally:
            await self._leadership.resign()

    async def _look(self) -> None:
        """One look at everything: what was lost, what can be granted again, what can be placed, why the rest waits."""
        if not self._facts.jobs and not self._facts.marks:
            return
        await self._reports.refresh()
        lost = self._manager.lost(
            clock.boottime_s(),
            contact_since=self._contact_since_s,
            ttl_s=self._lease_ttl_s,
            grace_s=_LOST_GRACE_S,
            placed_grace_s=_LOST_GRACE_S,
        )
        for attempt in lost:
            await self._requeue(attempt)
        for mark in self._manager.released_marks():
            await self._reports.leases.remove(f"{mark.device}.reclaim")
            self._telemetry.event("device.reclaimed", device=mark.device, job=mark.job, lease_epoch=mark.lease_epoch)
        for placement in self._manager.plan(clock.boottime_s()):
            await self._place(placement)
        await self._tell_reasons()

    # --- placing -----------------------------------------------------------------------------------------------------

    async def _place(self, placement: Placement) -> None:
        record = self._facts.jobs[placement.job_id]
        devices = self._devices_of(placement)
        epoch = record.lease_epoch + 1
        try:
            held = await leases.grant(
                self._reports.leases, devices, holder=record.id, lease_epoch=epoch, ttl_s=self._lease_ttl_s
            )
        except NoFreeDevice as exc:
            logger.info("somebody was quicker", extra={"job": record.id, "problem": str(exc)})
            return

        def placed(now: JobRecord) -> JobRecord:
            if now.state != "queued" or now.lease_epoch != record.lease_epoch:
                raise Conflict(f"job {now.id!r} is {now.state} by now")
            ids = tuple(device.id for device in devices)
            return moved(now, "placed", lease_epoch=epoch, host=placement.host, devices=ids, reason="")

        try:
            record = await self._records.change(record.id, placed)
        except Conflict:
            await leases.release(self._reports.leases, held)
            return
        self.accept(record)
        self._telemetry.event(
            "job.placed", job=record.id, lease_epoch=epoch, placed_on=placement.host, devices=list(record.devices)
        )
        await self._start(record, StartAttempt(job=record.id, lease_epoch=epoch, leases=held, devices=devices))

    def _devices_of(self, placement: Placement) -> tuple[DeviceInfo, ...]:
        known = {device.id: device for device in self._facts.hosts[placement.host].devices}
        return tuple(known[device] for device in placement.device_ids)

    async def _start(self, record: JobRecord, request: StartAttempt) -> None:
        """Ask the runner; what it refuses goes back into the queue, what is unknown is settled by `lost`."""
        subject = self._bus.subjects.runner(str(record.host), "start")
        try:
            await self._bus.request(subject, request.to_map(), timeout_s=_START_S)
        except RequestTimeout as exc:
            logger.warning("runner did not answer", extra={"job": record.id, "problem": str(exc)})
        except RailbusError as exc:
            await self._take_back(record, request.leases, exc.message)

    async def _take_back(self, record: JobRecord, held: Iterable[HeldLease], why: str) -> None:
        def queued(now: JobRecord) -> JobRecord | None:
            if now.state != "placed" or now.lease_epoch != record.lease_epoch:
                return None
            return moved(now, "queued", host=None, devices=(), reason=f"start refused: {why}")

        self._facts.hold(record.id, until=clock.boottime_s() + _REFUSED_HOLD_S)
        self.accept(await self._records.change(record.id, queued))
        await leases.release(self._reports.leases, list(held))
        self._telemetry.event(
            "job.requeued",
            job=record.id,
            lease_epoch=record.lease_epoch,
            severity="warning",
            cause="start_refused",
            why=why,
        )

    # --- what was lost -----------------------------------------------------------------------------------------------

    async def _requeue(self, lost: LostAttempt) -> None:
        """Queue a job again whose attempt is lost; devices that may still be in use are marked before."""
        record = lost.record
        for device in lost.marks:
            mark = ReclaimMark(
                device=device,
                host=str(record.host),
                job=record.id,
                lease_epoch=record.lease_epoch,
                marked_at=clock.now(),
            )
            await self._reports.leases.put(f"{device}.reclaim", mark.to_map())
        error = RunnerLost(f"the leases of the attempt on {record.host!r} have lapsed", hint="the job is placed again")
        body = ErrorBody(code=error.code, message=error.message, hint=error.hint)

        def queued(now: JobRecord) -> JobRecord | None:
            if not now.is_active or now.lease_epoch != record.lease_epoch:
                return None
            return concluded(now, lost.cause, body)

        after = await self._records.change(record.id, queued)
        self.accept(after)
        self._telemetry.event(
            "job.requeued" if after.state == "queued" else f"job.{after.state}",
            job=record.id,
            attempt=record.attempt,
            lease_epoch=record.lease_epoch,
            severity="warning",
            cause=lost.cause,
            error=body.to_map(),
        )

    async def _tell_reasons(self) -> None:
        """Write into the records of waiting jobs why they wait, where that has changed; not at every look."""
        now_s = clock.boottime_s()
        if now_s - self._reasons_told_s < _REASON_EVERY_S:
            return
        self._reasons_told_s = now_s
        for job, reason in self._manager.reasons(now_s).items():
            if self._facts.jobs[job].reason == reason:
                continue

            def told(now: JobRecord, *, why: str = reason) -> JobRecord | None:
                return now.changed(reason=why, changed_at=clock.now()) if now.state == "queued" else None

            self.accept(await self._records.change(job, told))

"""The placer: one device_manager at a time looks at the queue and gives jobs their devices.

Being the placer is a key that expires. Two may believe it for a moment, when one of them was paused; leases are created
by compare-and-set, so even then no device is leased twice, and the records' lease epochs refuse the slower one.

A placement takes three steps, and what a crash leaves after each is mended by `DeviceManager.lost`:
leases (they expire), the record (`placed`, without a start: queued again), the request to the runner. That one may
take long where a runner hangs, so it runs beside the next look.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Coroutine, Iterable, Mapping
from typing import Any, Final, Protocol

from railbus_device_manager.known import KnownJobs
from railbus_device_manager.manager import DeviceManager, LostAttempt
from railbus_device_manager.orders import Orders
from railbus_device_manager.placement import Placement, Preemption
from railbus_device_manager.reports import Reports
from railbus_device_manager.untold import UntoldEnds
from railbus_shared import clock, leases
from railbus_shared.bus.bucket import Bucket, SnapshotEnd, Write
from railbus_shared.bus.connection import Bus
from railbus_shared.contracts.devices import DeviceInfo, ReclaimMark
from railbus_shared.contracts.jobs import ErrorBody, JobRecord
from railbus_shared.contracts.requests import StartAttempt
from railbus_shared.errors import (
    Conflict,
    JobNotFound,
    LeaseLost,
    NoFreeDevice,
    RailbusError,
    RequestTimeout,
    RevisionConflict,
    RunnerLost,
    StaleLeaseEpoch,
    TransientError,
    WireError,
)
from railbus_shared.happenings import Happening, Lost, Placed, PreemptAsked, StartRefused
from railbus_shared.names import JobId
from railbus_shared.records import Applied, HeldRecord, JobRecords
from railbus_shared.telemetry import LearningTelemetry
from railbus_shared.waiting import is_set_within

logger = logging.getLogger(__name__)

_LEADER_KEY: Final = "placer"
_LEADER_TTL_S: Final = 5
_START_S: Final = 5.0
_LOST_GRACE_S: Final = 1.5
_BELIEVED_S: Final = 0.5
"""For so long a whole reading of reports and leases holds, with what is heard since; what expires is not heard."""
_MAX_BREATH_S: Final = 0.25


class Tasks(Protocol):
    """What runs beside the next look; a TaskGroup is one."""

    def create_task(self, coro: Coroutine[Any, Any, None], /) -> object:
        """Run it."""
        ...


class Leadership:
    """The key that says who places."""

    def __init__(self, bucket: Bucket, name: str) -> None:
        self._bucket = bucket
        self._name = name
        self._revision = 0
        self._renewed_s = 0.0

    @property
    def is_held(self) -> bool:
        """Whether this process was the placer when it looked last, and may be still."""
        return bool(self._revision) and clock.boottime_s() - self._renewed_s < _LEADER_TTL_S

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
    """Places waiting jobs, makes room for them, and queues again those whose attempts are lost."""

    def __init__(
        self,
        bus: Bus,
        manager: DeviceManager,
        reports: Reports,
        telemetry: LearningTelemetry,
        *,
        lease_ttl_s: int,
        placed: Callable[[JobRecord, float | None], None] = lambda *_: None,
    ) -> None:
        """`placed` is told each job that has got its devices, as it was before, and since when it was queued."""
        self._bus = bus
        self._placed = placed
        self._manager = manager
        self._facts = manager.facts
        self._reports = reports
        self._telemetry = telemetry
        self._lease_ttl_s = lease_ttl_s
        self._jobs = Bucket(bus, bus.subjects.jobs)
        self._store = JobRecords(self._jobs)
        self._orders = Orders(bus, telemetry)
        self._leadership = Leadership(Bucket(bus, bus.subjects.leader), telemetry.producer)
        self._news = asyncio.Event()
        self._has_records = asyncio.Event()
        self._contact_since_s = clock.boottime_s()
        self.known = KnownJobs()
        """All jobs, final ones too, as far as this process has heard."""
        self._untold = UntoldEnds(bus, telemetry, self.known)

    @property
    def is_placer(self) -> bool:
        return self._leadership.is_held

    def reasons(self, among: Iterable[str]) -> Mapping[JobId, str]:
        """Why each of these jobs waits that are queued, as far as this process has heard."""
        return self._manager.reasons(clock.boottime_s(), among=among)

    def nudge(self) -> None:
        """There is news: look at the queue now."""
        self._news.set()

    def reconnected(self) -> None:
        """NATS was away, so leases may have lapsed whose holders are well: give those one life to come back."""
        self._contact_since_s = clock.boottime_s()

    def accept(self, held: HeldRecord) -> None:
        """A record as this process has just written or read it; the watch tells it too, later."""
        if self.known.accept(held):
            self._facts.apply_record(held.record.id, held.record, now=clock.boottime_s())
            if held.record.is_final:
                self._untold.expect(held.record, now=clock.boottime_s())
            self.nudge()

    async def watch_records(self) -> None:
        """Keep the view of the job records up to date, until cancelled."""
        async with contextlib.aclosing(self._jobs.watch()) as told:
            async for entry in told:
                if isinstance(entry, SnapshotEnd):
                    self._has_records.set()
                    self.nudge()
                elif entry.value is not None and entry.revision > self.known.revision(entry.key):
                    self._accept_value(entry.key, entry.value, entry.revision)

    def _accept_value(self, job: str, value: dict[str, object], revision: int) -> None:
        try:
            self.accept(HeldRecord(JobRecord.parse(value), revision))
        except WireError as exc:
            logger.warning("a job record cannot be read", extra={"job": job, "problem": str(exc)})

    async def run(self, *, period_s: float) -> None:
        """Place until cancelled: when there is news, and every so often without.

        After each look others have their turn for as long as it took, so that a flood of news keeps nobody waiting.
        """
        await self._has_records.wait()
        try:
            async with asyncio.TaskGroup() as tasks:
                while True:
                    await is_set_within(self._news, self._pause_s(period_s))
                    self._news.clear()
                    began_s = clock.boottime_s()
                    try:
                        await self.turn(tasks)
                    except TransientError as exc:
                        logger.info("not placed now", extra={"problem": str(exc)})
                    except WireError as exc:  # a key of somebody's, which others need not wait for
                        logger.error("a key cannot be read", extra={"problem": str(exc)})  # noqa: TRY400 - it says it all
                    await asyncio.sleep(min(clock.boottime_s() - began_s, _MAX_BREATH_S))
        finally:
            await self._leadership.resign()

    def _pause_s(self, period_s: float) -> float:
        """Until the next look that no news will ask for: a lease lapses, an attempt is lost, or a back-off is over."""
        now_s = clock.boottime_s()
        lost = [since + _LOST_GRACE_S for since in self._facts.leaseless_since.values()]
        dues = (*lost, *self._facts.held_until.values(), *self._reports.lapses())
        return min([period_s, *(due - now_s for due in dues if due > now_s)])

    async def turn(self, tasks: Tasks) -> None:
        """Look at the queue, if this process is the one that places; raises TransientError."""
        if await self._leadership.held():
            if ended := self._untold.take_due(clock.boottime_s()):
                tasks.create_task(self._untold.look(ended))
            await self._look(tasks)

    async def _look(self, tasks: Tasks) -> None:
        """One look at everything: what was lost, what can be granted again, what can be placed, who must make room."""
        if not self._facts.jobs and not self._facts.marks:
            return
        await self._reports.refresh(older_than_s=_BELIEVED_S)
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
            await self._reports.leases.remove(leases.reclaim_key(mark.device))
            self._facts.apply_mark(mark.device, None, now=clock.boottime_s())
            self._telemetry.event("device.reclaimed", device=mark.device, job=mark.job, lease_epoch=mark.lease_epoch)
        decision = self._manager.plan(clock.boottime_s())
        for placement in decision.placements:
            await self._place(placement, tasks)
        for preemption in decision.preemptions:
            await self._preempt(preemption, tasks)

    async def _apply(self, job: str, happening: Happening) -> Applied | None:
        """Change a record; None if others have changed it so that this is no longer to be."""
        try:
            applied = await self._store.apply(job, happening)
        except (Conflict, StaleLeaseEpoch, JobNotFound) as exc:
            logger.info("a job has changed in the meantime", extra={"job": job, "problem": str(exc)})
            return None
        self.accept(applied.held)
        return applied

    # --- placing -----------------------------------------------------------------------------------------------------

    async def _place(self, placement: Placement, tasks: Tasks) -> None:
        job, devices = placement.job_id, self._devices_of(placement)
        record = self._facts.jobs.get(job)
        if record is None or len(devices) != len(placement.device_ids):
            return  # it was cancelled, or its host has gone, while those before it were placed
        epoch, began_s, queued_s = record.lease_epoch + 1, clock.boottime_s(), self._facts.ledger.queued_since.get(job)
        try:
            held = await leases.grant(
                self._reports.leases,
                devices,
                holder=job,
                lease_epoch=epoch,
                ttl_s=self._lease_ttl_s,
                shares=placement.shares,
            )
        except NoFreeDevice as exc:
            logger.info("somebody was quicker", extra={"job": job, "problem": str(exc)})
            return
        placed = Placed(epoch, placement.host, tuple(device.id for device in devices))
        applied = await self._apply(job, placed)
        if applied is None or not applied.decision.is_changed:
            await leases.release(self._reports.leases, held)
            return
        self._placed(record, queued_s)
        await self._orders.carry_out(applied)
        start = StartAttempt(job=job, lease_epoch=epoch, leases=held, devices=devices)
        if clock.boottime_s() - began_s > self._lease_ttl_s / 2:
            await self._take_back(start, LeaseLost(f"placing job {job!r} took as long as its leases live"))
        else:
            tasks.create_task(self._start(placement.host, start))

    def _devices_of(self, placement: Placement) -> tuple[DeviceInfo, ...]:
        report = self._facts.hosts.get(placement.host)
        known = {device.id: device for device in report.devices} if report is not None else {}
        return tuple(known[device] for device in placement.device_ids if device in known)

    async def _start(self, host: str, request: StartAttempt) -> None:
        """Ask the runner; what it refuses goes back into the queue, what is unknown is settled by `lost`."""
        try:
            await self._bus.request(self._bus.subjects.runner(host, "start"), request.to_map(), timeout_s=_START_S)
        except RequestTimeout as exc:
            logger.warning("runner did not answer", extra={"job": request.job, "problem": str(exc)})
        except RailbusError as exc:
            try:
                await self._take_back(request, exc)
            except TransientError as problem:
                logger.warning("not taken back", extra={"job": request.job, "problem": str(problem)})

    async def _take_back(self, request: StartAttempt, why: RailbusError) -> None:
        applied = await self._apply(request.job, StartRefused(request.lease_epoch, _body(why)))
        if applied is not None and applied.decision.is_changed:
            await self._orders.carry_out(applied)
            await leases.release(self._reports.leases, request.leases)
            self.nudge()

    async def _preempt(self, preemption: Preemption, tasks: Tasks) -> None:
        """Ask an attempt to make room; its devices are free once its runner has ended it."""
        applied = await self._apply(preemption.job_id, PreemptAsked(preemption.lease_epoch, preemption.by))
        if applied is not None and applied.decision.is_changed:
            tasks.create_task(self._orders.carry_out(applied))

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
            await self._reports.mark(mark)
        error = RunnerLost(f"the leases of the attempt on {record.host!r} have lapsed", hint="the job is placed again")
        applied = await self._apply(record.id, Lost(record.lease_epoch, lost.cause, _body(error)))
        if applied is not None:
            await self._orders.carry_out(applied)


def _body(error: RailbusError) -> ErrorBody:
    return ErrorBody(code=error.code, message=error.message, hint=error.hint)

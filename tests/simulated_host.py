"""A host of the simulated cluster: devices, and a played runner that may crash; and what is seen of all of them.

The real runner forks processes; what it does with its record, its leases and its reports is written here as there.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

from cluster_for_tests import device, host_report
from railbus_shared import clock, leases
from railbus_shared.contracts.devices import AttemptRef, HeldLease, Lease, RunnerReport
from railbus_shared.contracts.events import EventKey
from railbus_shared.contracts.jobs import CheckpointRef, EndCause, ErrorBody, JobRecord
from railbus_shared.contracts.requests import StartAttempt, StopAttempt
from railbus_shared.effects import tell
from railbus_shared.errors import Conflict, JobNotFound, LeaseLost, StaleLeaseEpoch, TransientError
from railbus_shared.happenings import (
    Ended,
    Happening,
    Lost,
    ReleaseLeases,
    Saved,
    Started,
    Stopping,
)
from railbus_shared.lifecycle import TRANSITIONS, Decision, check_names
from railbus_shared.records import Applied, JobRecords
from railbus_shared.telemetry import About
from simulated_bus import Actor, SimulatedBucket, SimulatedBus, Simulation

LEASE_TTL_S = 5
HEARTBEAT_S = 1.0
OVER = (StaleLeaseEpoch, Conflict, JobNotFound)


@dataclass
class Telling:
    """Stands where a `LearningTelemetry` does, and keeps what is told."""

    producer: str
    events: list[dict[str, object]]

    def event(self, what: str, /, **data: object) -> None:
        """What is told here is about no change of a record."""

    def record(
        self, what: str, data: object, *, about: About, severity: str = "info", key: EventKey | None = None
    ) -> None:
        told = {"job": about.job, "lease_epoch": about.lease_epoch, "step": about.step}
        event = {"type": what, "data": data, "severity": severity, "key": key, **told}
        if key is None or key not in {known["key"] for known in self.events}:  # as telemetry, which writes each once
            self.events.append(event)


class Recorder:
    """What all processes of the cluster have done to the world outside of the store."""

    def __init__(self) -> None:
        self.events: list[dict[str, object]] = []
        self.processes: dict[str, set[AttemptRef]] = {}
        self.broken: list[str] = []
        self.versions: dict[str, JobRecord] = {}
        self.promised: set[str] = set()
        """Jobs whose cancellation was acknowledged."""

    def begins(self, devices: tuple[str, ...], ref: AttemptRef) -> None:
        for name in devices:
            on_it = self.processes.setdefault(name, set())
            on_it.add(ref)
            if len(on_it) > 1:
                self.broken.append(f"{name} has processes of {sorted((one.job, one.lease_epoch) for one in on_it)}")

    def ends(self, ref: AttemptRef) -> None:
        for on_it in self.processes.values():
            on_it.discard(ref)

    def written(self, bucket: str, job: str, value: dict[str, object] | None, _revision: int) -> None:
        """Compare a record with the one before."""
        if not bucket.endswith("jobs") or value is None:
            return
        after, before = JobRecord.parse(value), self.versions.get(job)
        self.versions[job] = after
        if before is not None:
            self.broken += _wrong_step(before, after)


def _wrong_step(before: JobRecord, after: JobRecord) -> Iterator[str]:
    name = f"{after.id}: {before.state} (epoch {before.lease_epoch}) to {after.state} (epoch {after.lease_epoch})"
    followers = {state for states in TRANSITIONS[before.state].values() for state in states}
    if after.state not in followers:
        yield f"{name} is no step of the table"
    if after.lease_epoch < before.lease_epoch:
        yield f"{name} goes back"
    if after.attempt > after.spec.max_attempts or after.attempt < 0:
        yield f"{name} has attempt {after.attempt}"
    if after.checkpoint != before.checkpoint:
        assert after.checkpoint is not None
        if after.checkpoint.number // 1000 != after.lease_epoch or not after.is_active:
            yield f"{name} names checkpoint {after.checkpoint.number} of another attempt"
        elif before.checkpoint is not None and after.checkpoint.step < before.checkpoint.step:
            yield f"{name} goes back from step {before.checkpoint.step} to {after.checkpoint.step}"


# --- a host ----------------------------------------------------------------------------------------------------------


@dataclass
class Attempt:
    """One attempt on a played runner."""

    ref: AttemptRef
    devices: tuple[str, ...]
    held: tuple[HeldLease, ...]
    first_step: int
    stop: str | None = None
    is_fenced: bool = False
    is_over: bool = False


class Host:
    """A host with some devices and a runner, which may crash and come again."""

    def __init__(self, sim: Simulation, recorder: Recorder, name: str, devices: int) -> None:
        self.sim = sim
        self.name = name
        self.recorder = recorder
        self.devices = devices
        self.starts = 0
        self.attempts: dict[AttemptRef, Attempt] = {}
        self.starting: set[AttemptRef] = set()
        self.starved_until = 0.0
        """Leases are not renewed before, although reports are told."""
        self.boot()

    def boot(self) -> None:
        """A new process, with a connection of its own."""
        self.starts += 1
        self.actor = Actor(f"runner-{self.name}-{self.starts}", skew_s=self.sim.random.uniform(-3600, 3600))
        bus = SimulatedBus(self.sim, self.actor)
        self.telemetry = Telling(self.actor.name, self.recorder.events)
        self.jobs = SimulatedBucket(bus, bus.subjects.jobs)
        self.records = JobRecords(self.jobs)
        self.leases = SimulatedBucket(bus, bus.subjects.leases)
        self.reports = SimulatedBucket(bus, bus.subjects.devices)
        self.subjects = bus.subjects
        self.sim.spawn(self.actor, self._begin())

    def crash(self) -> None:
        """The runner is killed, and the kernel ends its trainers with it."""
        self.sim.kill(self.actor)
        for verb in ("start", "stop"):
            self.sim.services.pop(self.subjects.runner(self.name, verb), None)
        for ref in self.attempts:
            self.recorder.ends(ref)
        self.attempts.clear()
        self.starting.clear()

    async def _begin(self) -> None:
        while True:
            with contextlib.suppress(TransientError):
                await self._report()
                await self._give_back()
                break
            await self.sim.sleep(0.5)
        self.sim.services[self.subjects.runner(self.name, "start")] = (self.actor, self._start)
        self.sim.services[self.subjects.runner(self.name, "stop")] = (self.actor, self._stop)
        while True:
            with contextlib.suppress(TransientError):
                await self._report()
            await self.sim.sleep(HEARTBEAT_S)

    async def _report(self) -> None:
        slots = [device(f"{self.name}-cpu{index}") for index in range(self.devices)]
        told = RunnerReport(
            host=self.name,
            runner=self.actor.name,
            ready=True,
            attempts=tuple(dict.fromkeys((*self.starting, *self.attempts))),
            entrypoints=("classifier",),
            reported_at=clock.now(),
        )
        await self.reports.put(f"{self.name}.runner", told.to_map(), ttl_s=5)
        await self.reports.put(self.name, host_report(self.name, *slots).to_map(), ttl_s=5)

    async def _give_back(self) -> None:
        body = ErrorBody(code="RUNNER_LOST", message="the runner ended")
        for entry in (await self.jobs.read_all()).values():
            record = JobRecord.parse(entry.value or {})
            if record.is_active and record.host == self.name:
                with contextlib.suppress(*OVER):
                    tell_of(self, await self.records.apply(record.id, Lost(record.lease_epoch, "runner_lost", body)))
                    await self._release_of(record)

    async def _release_of(self, record: JobRecord) -> None:
        for name in record.devices:
            entry = await self.leases.get(name)
            if entry is not None and entry.value is not None:
                lease = Lease.parse(entry.value)
                if (lease.holder, lease.lease_epoch) == (record.id, record.lease_epoch):
                    await leases.release(self.leases, [HeldLease(lease=lease, revision=entry.revision)])

    # --- requests ----------------------------------------------------------------------------------------------------

    async def _start(self, body: dict[str, object]) -> dict[str, object]:
        request = StartAttempt.parse(body)
        ref = AttemptRef(job=request.job, lease_epoch=request.lease_epoch)
        if self.sim.random.random() < 0.05:
            raise Conflict("not today")
        if ref in self.attempts or ref in self.starting:
            return {}
        self.starting.add(ref)
        try:
            await self._take(request, ref)
        finally:
            self.starting.discard(ref)
        return {}

    async def _take(self, request: StartAttempt, ref: AttemptRef) -> None:
        applied = await self.records.apply(request.job, Started(request.lease_epoch, self.name))
        if not applied.decision.is_changed:
            raise StaleLeaseEpoch("it has been started")
        tell_of(self, applied)
        if applied.record.state != "running":
            with contextlib.suppress(TransientError):
                await leases.release(self.leases, request.leases)
            return
        names = tuple(one.id for one in request.devices)
        saved = applied.record.checkpoint
        attempt = Attempt(ref, names, request.leases, first_step=saved.step if saved is not None else 0)
        self.attempts[ref] = attempt
        self.sim.spawn(self.actor, self._live(attempt))
        self.sim.spawn(self.actor, self._keep(attempt))

    async def _stop(self, body: dict[str, object]) -> dict[str, object]:
        order = StopAttempt.parse(body)
        attempt = self.attempts.get(AttemptRef(job=order.job, lease_epoch=order.lease_epoch))
        if attempt is None:
            raise JobNotFound("it does not run here")
        await self._tell_to_stop(attempt, order.reason)
        return {}

    async def _tell_to_stop(self, attempt: Attempt, reason: str) -> None:
        if attempt.stop is None or reason == "cancelled":
            attempt.stop = reason
        if reason == "preempted":
            with contextlib.suppress(*OVER, TransientError):
                tell_of(self, await self.records.apply(attempt.ref.job, Stopping(attempt.ref.lease_epoch, self.name)))

    # --- an attempt --------------------------------------------------------------------------------------------------

    async def _live(self, attempt: Attempt) -> None:
        """Train, save now and then, and end: processes first, then the record, then the leases."""
        cause = await self._train(attempt) if await self._is_first_renewed(attempt) else "lease_lost"
        self.recorder.ends(attempt.ref)
        attempt.is_over = True
        ended = Ended(attempt.ref.lease_epoch, self.name, cause)
        applied = None if attempt.is_fenced else await self._insist(attempt.ref.job, ended)
        if applied is not None and ReleaseLeases() in applied.decision.effects:
            with contextlib.suppress(TransientError):
                await leases.release(self.leases, attempt.held)
        self.attempts.pop(attempt.ref, None)

    async def _is_first_renewed(self, attempt: Attempt) -> bool:
        """As `Attempt._prepare`: the trainer gets no plan, and touches no device, before its leases were renewed."""
        while not attempt.is_fenced:
            try:
                await self._renew(attempt)
            except TransientError:
                await self.sim.sleep(0.5)
            except LeaseLost:
                break
            else:
                self.recorder.begins(attempt.devices, attempt.ref)
                return True
        attempt.is_fenced = True
        return False

    async def _train(self, attempt: Attempt) -> EndCause:
        ends = self.sim.random.choice([0.4, 0.1])
        for step in itertools.count(1):
            await self.sim.sleep(self.sim.random.uniform(0.2, 1.5))
            if attempt.is_fenced:
                return "lease_lost"
            if self.sim.random.random() < 0.5:
                await self._save(attempt, step)
            if attempt.stop is not None:
                return cast("EndCause", attempt.stop)
            if self.sim.random.random() < ends:
                return self.sim.random.choice(["ok", "ok", "ok", "ok", "signal", "user_error", "device_fault"])
        raise AssertionError

    async def _save(self, attempt: Attempt, step: int) -> None:
        epoch = attempt.ref.lease_epoch
        ref = CheckpointRef(number=1000 * epoch + step, step=attempt.first_step + step, sha256="0" * 64)
        if await self._insist(attempt.ref.job, Saved(epoch, self.name, ref), step=ref.step) is None:
            attempt.is_fenced = True

    async def _insist(self, job: str, happening: Happening, *, step: int | None = None) -> Applied | None:
        """As `Claim.apply`: through outages; None if the attempt is over."""
        unknown: list[Decision] = []
        while True:
            try:
                applied = await self.records.apply(job, happening, unknown=unknown)
            except TransientError:
                await self.sim.sleep(0.5)
                continue
            except OVER:
                return None
            tell_of(self, applied, step=step)
            return applied

    async def _keep(self, attempt: Attempt) -> None:
        """As `LeaseKeeper`, and the look into the record beside it."""
        while not attempt.is_over and not attempt.is_fenced:
            await self.sim.sleep(LEASE_TTL_S / 3)
            if self.starved_until > self.sim.now:
                continue
            try:
                await self._renew(attempt)
                await self._heed(attempt)
            except LeaseLost:
                attempt.is_fenced = True
            except TransientError:
                await self.sim.sleep(0.5)

    async def _renew(self, attempt: Attempt) -> None:
        try:
            attempt.held = await leases.renew(self.leases, attempt.held, ttl_s=LEASE_TTL_S)
        except LeaseLost:
            if await self._record_of(attempt) is None:
                raise
            attempt.held = await leases.regrant(self.leases, attempt.held, ttl_s=LEASE_TTL_S)

    async def _heed(self, attempt: Attempt) -> None:
        record = await self._record_of(attempt)
        if record is None:
            raise LeaseLost("the record does not name the attempt")
        if record.cancel_requested:
            await self._tell_to_stop(attempt, "cancelled")
        elif record.preempted_by is not None:
            await self._tell_to_stop(attempt, "preempted")

    async def _record_of(self, attempt: Attempt) -> JobRecord | None:
        record = (await self.records.get(attempt.ref.job)).record
        try:
            check_names(record, lease_epoch=attempt.ref.lease_epoch, host=self.name)
        except StaleLeaseEpoch:
            return None
        return record


def tell_of(host: Host, applied: Applied, *, step: int | None = None) -> None:
    tell(cast("Any", host.telemetry), applied, step=step)

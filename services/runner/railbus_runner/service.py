"""The runner: takes placed jobs of its host and sees each attempt through.

Requests: `runner.<host>.start`, `.stop` and `.save`, from device_managers. It reports itself in `railbus_devices` under
`<host>.runner`: the attempts it has processes of, and the entrypoints it offers. On start it kills what a former runner
left and gives back that runner's jobs, before it reports anything: its report is what frees devices.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import hashlib
import logging
import os
from collections.abc import Iterator, Mapping
from typing import Final

from railbus_runner import cgroups
from railbus_runner.attempt import Attempt
from railbus_runner.clearing import Clearing, unclear
from railbus_runner.entrypoints.registry import available
from railbus_runner.frames import Stop
from railbus_runner.measures import Measures
from railbus_runner.reaping import AttemptLedger, attempt_name
from railbus_runner.settings import Settings
from railbus_runner.tools import Tools
from railbus_runner.warm_process import WarmProcess
from railbus_runner.workdirs import Workdirs
from railbus_shared import clock, leases
from railbus_shared.bus.bucket import Bucket
from railbus_shared.bus.endpoints import AnyEndpoint, Endpoint
from railbus_shared.contracts.devices import AttemptRef, HostReport, RunnerReport
from railbus_shared.contracts.jobs import ACTIVE_STATES, ErrorBody, JobRecord
from railbus_shared.contracts.requests import Nothing, StartAttempt, StopAttempt
from railbus_shared.contracts.saving import SaveAttempt, SavedCheckpoint
from railbus_shared.effects import tell
from railbus_shared.errors import (
    AlreadyRunning,
    JobNotFound,
    RunnerLost,
    StaleLeaseEpoch,
    TransientError,
    WireError,
)
from railbus_shared.happenings import Lost, Started
from railbus_shared.records import JobRecords
from railbus_shared.service import Context, Description
from railbus_shared.settings import CommonSettings
from railbus_shared.waiting import end, is_set_within

logger = logging.getLogger(__name__)

DESCRIPTION: Final = Description("runner", "Attempts: starts trainers, feeds them, commits their checkpoints.")
_RETRY_S: Final = 0.5
_MAX_OFFERED: Final = 1000


class RunnerService:
    """All attempts of one host."""

    def __init__(self, context: Context, settings: Settings) -> None:
        self._context = context
        self._settings = settings
        subjects = context.bus.subjects
        self._state = context.common.layout.state / "runner"
        self._devices = Bucket(context.bus, subjects.devices)
        self._jobs = Bucket(context.bus, subjects.jobs)
        self._warm = WarmProcess(env=os.environ)
        held = Bucket(context.bus, subjects.leases)
        measures = Measures.of(context.metrics)
        context.telemetry.heard = measures.heard
        self._tools = Tools(
            context=context,
            measures=measures,
            records=JobRecords(self._jobs),
            leases=held,
            clearing=Clearing(context.bus, held, host=context.common.host),
            warm=self._warm,
            groups=cgroups.discover(_scope(context.common)),
            ledger=AttemptLedger(self._state / "attempts"),
            workdirs=Workdirs(self._state / "work", allowed=settings.workdirs),
            entrypoint_dirs=tuple(path.resolve() for path in settings.entrypoint_dirs),
            log_rules=settings.log_rules,
            reap_s=settings.reap_s,
            may_gain_privileges=settings.may_gain_privileges,
        )
        self._attempts: dict[AttemptRef, Attempt] = {}
        self._starting: set[AttemptRef] = set()
        self._tasks: asyncio.TaskGroup | None = None
        self._news = asyncio.Event()
        self._is_offered = False

    def endpoints(self) -> list[AnyEndpoint]:
        runner, host = self._context.bus.subjects.runner, self._context.common.host
        return [
            Endpoint("start", runner(host, "start"), StartAttempt, self._start),
            Endpoint("stop", runner(host, "stop"), StopAttempt, self._stop),
            Endpoint("save", runner(host, "save"), SaveAttempt, self._save, may_wait=True),
        ]

    async def run(self) -> None:
        """Sweep, then serve until told to stop; then let the trainers write a checkpoint and end."""
        self._state.mkdir(parents=True, exist_ok=True)
        with self._only_runner():
            await self._sweep_processes()
            async with asyncio.TaskGroup() as tasks:
                warm = tasks.create_task(self._warm.run())
                await self._give_back_jobs()
                async with asyncio.TaskGroup() as attempts:
                    self._tasks = attempts
                    reporting = attempts.create_task(self._report())
                    await self._context.stopping.wait()
                    self._news.set()
                    for attempt in list(self._attempts.values()):
                        await self._shut_down(attempt)
                    await self._drained()
                    await end(reporting)
                await self._warm.close()
                await end(warm)

    async def checks(self) -> Mapping[str, str]:
        models = self._context.common.layout.models
        try:
            models.mkdir(parents=True, exist_ok=True)
            disk = "" if os.access(models, os.W_OK) else f"{str(models)!r} cannot be written"
        except OSError as exc:
            disk = f"{str(models)!r} cannot be written: {exc}"
        if not self._warm.is_alive:
            return {"trainer": "the pre-warmed process is not ready", "disk": disk}
        return {"trainer": "" if self._is_offered else "not yet reported to the device_managers", "disk": disk}

    # --- requests ----------------------------------------------------------------------------------------------------

    async def _start(self, request: StartAttempt) -> Nothing:
        """Take a placed job; from here on its record is this runner's to change."""
        tasks = self._tasks
        if tasks is None or self._context.stopping.is_set() or not self._warm.is_alive:
            raise RunnerLost(
                f"runner of {self._context.common.host!r} takes no attempts now", hint="place it elsewhere"
            )
        ref = _ref(request)
        if ref in self._attempts or ref in self._starting:
            return Nothing()  # the request came twice
        self._starting.add(ref)  # a report that lacked it could free its devices
        try:
            await self._begin(request, tasks)
        finally:
            self._starting.discard(ref)
            self._news.set()
        return Nothing()

    async def _begin(self, request: StartAttempt, tasks: asyncio.TaskGroup) -> None:
        started = Started(request.lease_epoch, self._context.common.host)
        applied = await self._tools.records.apply(request.job, started)
        if not applied.decision.is_changed:
            raise StaleLeaseEpoch(f"job {request.job!r} has been started with lease epoch {request.lease_epoch}")
        tell(self._context.telemetry, applied)
        if applied.record.state != "running":  # it was to end before it began
            await leases.release(self._tools.leases, request.leases)
            return
        attempt = Attempt(self._tools, request, applied.record)
        self._attempts[attempt.ref] = attempt
        tasks.create_task(self._see_through(attempt, applied.record))
        if self._context.stopping.is_set():  # that came while the record was changed
            await self._shut_down(attempt)

    async def _shut_down(self, attempt: Attempt) -> None:
        await attempt.stop(Stop(reason="shutdown"), grace_s=self._settings.grace_s)

    async def _stop(self, request: StopAttempt) -> Nothing:
        attempt = self._running(request)
        await attempt.stop(Stop(reason=request.reason, why=request.why), grace_s=request.grace_s)
        return Nothing()

    async def _save(self, request: SaveAttempt) -> SavedCheckpoint:
        return await self._running(request).save(timeout_s=request.timeout_s)

    def _running(self, request: StopAttempt | SaveAttempt) -> Attempt:
        attempt = self._attempts.get(_ref(request))
        if attempt is None:
            raise JobNotFound(f"job {request.job!r} with lease epoch {request.lease_epoch} does not run here")
        return attempt

    async def _see_through(self, attempt: Attempt, record: JobRecord) -> None:
        self._news.set()
        try:
            await attempt.run()
        except Exception:  # a bug in one attempt must not take the others down; the placer requeues its job
            logger.exception("bug in an attempt", extra={"job": record.id})
        finally:
            self._attempts.pop(attempt.ref, None)
            self._tools.measures.is_over(attempt.ref)
            self._news.set()

    async def _drained(self) -> None:
        """Wait until the trainers have ended, those that begin just now too; `Attempt.stop` kills the slow ones."""
        while self._attempts or self._starting:
            self._news.clear()
            await self._news.wait()

    # --- reports -----------------------------------------------------------------------------------------------------

    async def _report(self) -> None:
        """Say at every heartbeat, and when there is news, what runs here."""
        while True:
            self._news.clear()
            report = await self._current_report()
            period_s = self._context.common.heartbeat_s
            try:
                await self._tell(report)
            except TransientError as exc:
                logger.warning("not reported", extra={"problem": str(exc)})
                period_s = min(period_s, _RETRY_S)
            await is_set_within(self._news, period_s if self._warm.is_alive else _RETRY_S / 2)

    async def _tell(self, report: RunnerReport) -> None:
        ttl_s = max(1, round(5 * self._context.common.heartbeat_s))
        await self._devices.put(f"{report.host}.runner", report.to_map(), ttl_s=ttl_s)
        self._is_offered = report.ready

    async def _current_report(self) -> RunnerReport:
        offered = await asyncio.to_thread(available, self._tools.entrypoint_dirs)
        stuck = [state.ref for state in await asyncio.to_thread(self._tools.ledger.states)]
        return RunnerReport(
            host=self._context.common.host,
            runner=self._context.telemetry.producer,
            ready=self._warm.is_alive and not self._context.stopping.is_set(),
            attempts=tuple(dict.fromkeys((*stuck, *self._starting, *self._attempts))),
            entrypoints=tuple(offered[:_MAX_OFFERED]),
            reported_at=clock.now(),
        )

    # --- what a former runner left -----------------------------------------------------------------------------------

    async def _sweep_processes(self) -> None:
        """Kill what a former runner left running."""
        swept = await asyncio.to_thread(
            self._tools.ledger.sweep, deadline_s=self._tools.reap_s, tree=self._tools.groups
        )
        if swept:
            logger.warning("swept what a former runner left", extra={"attempts": [ref.job for ref in swept]})
        left = [attempt_name(state.ref) for state in await asyncio.to_thread(self._tools.ledger.states)]
        await asyncio.to_thread(self._tools.workdirs.sweep, left)

    async def _give_back_jobs(self) -> None:
        """Queue again what a former runner had, however long NATS takes to answer."""
        while not self._context.stopping.is_set():
            try:
                await self._tell(await self._current_report())  # else the old report has jobs placed here too early
                await self._give_back()
            except TransientError as exc:
                logger.warning("jobs not given back yet", extra={"problem": str(exc)})
                await asyncio.sleep(_RETRY_S)
                continue
            return

    async def _give_back(self) -> None:
        host = self._context.common.host
        for entry in (await self._jobs.read_all()).values():
            value = entry.value or {}
            if value.get("host") != host or value.get("state") not in ACTIVE_STATES:
                continue  # there may be ten thousand, and checking each takes longer than all the rest
            try:
                await self._give_back_one(JobRecord.parse(value))
            except WireError as exc:
                logger.warning("a record cannot be read", extra={"job": entry.key, "problem": str(exc)})

    async def _give_back_one(self, record: JobRecord) -> None:
        lost = RunnerLost(f"the runner of {record.host!r} ended while the job was {record.state}")
        body = ErrorBody(code=lost.code, message=lost.message)

        try:
            applied = await self._tools.records.apply(record.id, Lost(record.lease_epoch, "runner_lost", body))
        except StaleLeaseEpoch:
            return  # the placer was quicker
        tell(self._context.telemetry, applied)
        await self._release_all(record)

    async def _release_all(self, record: JobRecord) -> None:
        """Release what the job still holds, so that nobody need wait for it to expire; GPUs once they are clear."""
        held = await leases.leases_of(self._tools.leases, holder=record.id, lease_epoch=record.lease_epoch)
        ref = AttemptRef(job=record.id, lease_epoch=record.lease_epoch)
        gpus = await self._gpus_of(record)
        if still := unclear(await self._tools.clearing.check(ref, gpus), gpus):
            await self._tools.clearing.mark(ref, still)
        await leases.release(self._tools.leases, held)

    async def _gpus_of(self, record: JobRecord) -> list[str]:
        """The GPUs that the record names; all its devices, where nothing is known of them."""
        entry = await self._devices.get(self._context.common.host)
        if entry is None or entry.value is None:
            return list(record.devices)
        cpus = {device.id for device in HostReport.parse(entry.value).devices if device.kind == "cpu"}
        return [device for device in record.devices if device not in cpus]

    @contextlib.contextmanager
    def _only_runner(self) -> Iterator[None]:
        """Two runners of one host would sweep each other's trainers; raises AlreadyRunning."""
        with (self._state / "runner.lock").open("a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as exc:
                raise AlreadyRunning(
                    f"another runner serves host {self._context.common.host!r} on this root",
                    hint="stop it, or give this one another RAILBUS_HOST and root",
                ) from exc
            yield


def _ref(request: StartAttempt | StopAttempt | SaveAttempt) -> AttemptRef:
    return AttemptRef(job=request.job, lease_epoch=request.lease_epoch)


def _scope(common: CommonSettings) -> str:
    """A name for control groups that this runner shares with its former and later starts only."""
    root = hashlib.sha256(str(common.root.resolve()).encode()).hexdigest()[:8]
    return f"{common.host[:40]}-{root}"

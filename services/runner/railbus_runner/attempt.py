"""One attempt of one job, from the fork of its trainer to the end that its record states.

The attempt lives in three parts: it keeps the leases (`leasing`), it serves the trainer (`answers`), and it holds a
claim on the job record (`claim`). When it ends, whatever the reason, all processes that it started are gone before its
record says so; an attempt that has lost its claim is killed and writes nothing more.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
from collections.abc import AsyncGenerator, Coroutine
from typing import Any, Final, TypeVar

from railbus_runner import processes
from railbus_runner.answers import Answers
from railbus_runner.claim import OVER, Claim, through_outages
from railbus_runner.clearing import blamed, unclear
from railbus_runner.commits import Commits
from railbus_runner.deadlines import DeadlineTeller
from railbus_runner.end_cause import no_progress
from railbus_runner.evidence import Evidence
from railbus_runner.forwarding import Forwarding
from railbus_runner.frames import Fork, Plan, Stop
from railbus_runner.leasing import LeaseKeeper
from railbus_runner.link import TrainerLink
from railbus_runner.output_telling import OutputPipes, OutputTelling
from railbus_runner.premises import Premises, make_premises
from railbus_runner.processes import ProcessId
from railbus_runner.reaping import attempt_name
from railbus_runner.saving import SaveRequests
from railbus_runner.stall_watch import StallWatch
from railbus_runner.tools import Tools
from railbus_runner.writers import Writers
from railbus_shared import clock, tracing
from railbus_shared.contracts.devices import AttemptRef
from railbus_shared.contracts.jobs import JobRecord
from railbus_shared.contracts.requests import OpenedStream, StartAttempt
from railbus_shared.contracts.saving import SavedCheckpoint
from railbus_shared.errors import LeaseLost, RailbusError, RunnerLost, TrainerLost, TransientError
from railbus_shared.happenings import Ended, Stopping
from railbus_shared.logs import log_context
from railbus_shared.records import Applied
from railbus_shared.telemetry import new_producer
from railbus_shared.waiting import beside, end

logger = logging.getLogger(__name__)

_REFUSED_GRACE_S: Final = 5.0
_KILLED_S: Final = 2.0
_MAX_LEAKED: Final = 20
_LAST_FRAMES_S: Final = 10.0  # what a trainer had said when it ended
_LAST_OUTPUT_S: Final = 0.5

A = TypeVar("A")


class Attempt:
    """Supervises one trainer."""

    def __init__(self, tools: Tools, request: StartAttempt, record: JobRecord) -> None:
        self.ref = AttemptRef(job=request.job, lease_epoch=request.lease_epoch)
        self._tools = tools
        self._request = request
        self._record = record
        self._link = TrainerLink()
        self._trainer: ProcessId | None = None
        self._end = Evidence(record.spec)
        self._has_plan = False
        self._kill = asyncio.Event()
        self._deadlines = DeadlineTeller(self._link)
        self._claim = Claim(self.ref, record, records=tools.records, telemetry=tools.context.telemetry)
        self._output = OutputTelling(self._claim.event)
        self._stalls = StallWatch(self._claim, is_waiting=self._is_waiting, ended=self._hung)
        self._saves = SaveRequests(self.ref.job, self._link.send)
        commits = Commits(self._claim, self._saves, refused=self._fenced)
        self._producer = new_producer("trainer", host=tools.context.common.host)
        forward = Forwarding(self.ref, record, tools, producer=self._producer)
        self._writers = Writers(
            self._link, commits, ref=self.ref, warm=tools.warm, ledger=tools.ledger, forward=forward
        )
        self._answers = Answers(
            self._link,
            self._claim,
            tools.context,
            commits=commits,
            saves=self._saves,
            writers=self._writers,
            moved=self._stalls.moved,
            forward=forward,
        )
        self._keeper = LeaseKeeper(
            tools.leases,
            request.leases,
            ttl_s=tools.context.common.lease_ttl_s,
            still_mine=self._claim.holds,
            new_deadline=self._new_deadline,
            tell=tools.measures.renewed,
        )
        tools.measures.began(self.ref, deadline_s=lambda: self._keeper.deadline_s)

    async def run(self) -> None:
        """Live through the attempt and write its end into the job record."""
        tracing.current.set(self._claim.trace)
        with log_context(job=self.ref.job):
            try:
                await self._train()
            finally:
                self._saves.close()
                self._link.close()
                self._stalls.close()
            await self._conclude()
            await self._answers.close_stream()

    async def stop(self, stop: Stop, *, grace_s: float) -> None:
        """Ask the trainer to end with a checkpoint; it is killed after the grace, with all that it has started.

        One that takes no steps hears of it at half the grace by SIGTERM, if it handles that; if not, SIGTERM would
        only be its death before its time. To stop again means sooner, not later.
        """
        loop = asyncio.get_running_loop()
        grace_s = grace_s if self._has_plan else 0.0  # one that has not begun has nothing to save
        loop.call_later(grace_s, self._kill.set)
        before = self._end.stop
        if before is None or (before.reason, stop.reason) == ("preempted", "cancelled"):
            self._end.stop = stop
        if before is not None:
            return
        loop.call_later(grace_s / 2, self._remind)
        await self._link.send(stop.changed(deadline_boottime_s=clock.boottime_s() + grace_s))
        if stop.reason == "preempted":
            await self._tell_stopping()

    async def save(self, *, timeout_s: float) -> SavedCheckpoint:
        """Have the trainer write a checkpoint; returns once the job record names it. Raises like `SaveRequests.ask`."""
        return await self._saves.ask(timeout_s=timeout_s)

    def _remind(self) -> None:
        if self._trainer is not None and processes.handles(self._trainer.pid, signal.SIGTERM):
            processes.signal_exactly(self._trainer, signal.SIGTERM)

    async def _tell_stopping(self) -> None:
        """The record says so where it can; nothing rests on it."""
        stopping = Stopping(self.ref.lease_epoch, str(self._record.host))
        try:
            await self._tools.records.apply(self.ref.job, stopping)
        except (*OVER, TransientError) as exc:
            logger.info("not told that room is made", extra={"problem": str(exc)})

    # --- the trainer's life ------------------------------------------------------------------------------------------

    async def _train(self) -> None:
        """Start the trainer, serve it, and return once all its processes are gone."""
        try:
            async with self._forked() as (outputs, trainer, fork), asyncio.TaskGroup() as tasks:
                heeding = tasks.create_task(self._heed_record())
                try:
                    opened = await self._unless_killed(self._prepare())
                    if opened is not None:
                        self._has_plan = True
                        plan = self._plan(opened)
                        await self._link.send(plan)  # one that is gone already is to be heard out, too
                        await self._serve(outputs, trainer, self._writers.run(fork, plan))
                finally:
                    await end(heeding)
        except* LeaseLost:
            self._end.is_fenced = True
        except* RailbusError as group:
            self._end.failure = _first(group)

    @contextlib.asynccontextmanager
    async def _forked(self) -> AsyncGenerator[tuple[OutputPipes, ProcessId, Fork], None]:
        """A trainer, written into the ledger; at the end it and all that it started are gone, whatever happened."""
        tools, name = self._tools, attempt_name(self.ref)
        with contextlib.closing(OutputPipes()) as outputs:
            spec, devices = self._record.spec, self._request.devices
            place = await asyncio.to_thread(
                make_premises,
                name,
                workdirs=tools.workdirs,
                wanted=spec.workdir,
                groups=tools.groups,
                devices=devices,
            )
            fork = Fork(
                attempt=name,
                cgroup_procs=place.procs_files,
                cores=tuple(core for device in devices for core in device.cores),
                env=spec.env,
                workdir=str(place.workdir),
                may_gain_privileges=tools.may_gain_privileges,
            )
            try:
                pid = await self._fork(fork, outputs)
                state = await asyncio.to_thread(tools.ledger.add, self.ref, pid=pid, group=place.group)
                self._trainer = ProcessId(pid, state.start_ticks)
                yield outputs, self._trainer, fork
            finally:
                async with beside(self._hold_on()):
                    await self._reap(place)
                    await self._tidy(name)

    async def _fork(self, fork: Fork, outputs: OutputPipes) -> int:
        stdout_fd, stderr_fd = outputs.writes
        pid = await self._tools.warm.fork(
            fork, sock=self._link.theirs, stdout_fd=stdout_fd, stderr_fd=stderr_fd, extra_fd=self._stalls.file.fd
        )
        outputs.give_away()
        self._link.give_away()
        return pid

    async def _prepare(self) -> OpenedStream:
        """Side by side: the shards of the dataset, and a fresh deadline for the leases."""
        async with asyncio.TaskGroup() as tasks:
            opened = tasks.create_task(self._answers.open_stream())
            tasks.create_task(through_outages(self._keeper.renew))
        return opened.result()

    async def _unless_killed(self, work: Coroutine[Any, Any, A]) -> A | None:
        """The work's result, or None if the attempt is to be killed before it is done."""
        async with asyncio.TaskGroup() as tasks:
            working, killed = tasks.create_task(work), tasks.create_task(self._kill.wait())
            await asyncio.wait({working, killed}, return_when=asyncio.FIRST_COMPLETED)
            await end(working, killed)
        return None if working.cancelled() else working.result()

    async def _serve(self, outputs: OutputPipes, trainer: ProcessId, writing: Coroutine[Any, Any, None]) -> None:
        """Answer the trainer until it has exited, or must be killed, and its checkpoint is written."""
        helpers = (
            writing,
            self._keeper.run(),
            self._deadlines.run(),
            self._limit_time(),
            self._stalls.run(trainer),
        )
        async with asyncio.TaskGroup() as tasks:
            answering = tasks.create_task(self._answers.serve())
            helping = [tasks.create_task(work) for work in helpers]
            reading = [tasks.create_task(self._output.forward(fd, name)) for fd, name in outputs.take_reads()]
            self._end.exit_code = await self._unless_killed(self._tools.warm.wait_exit(attempt_name(self.ref)))
            if self._end.exit_code is not None:
                await asyncio.wait({answering}, timeout=_LAST_FRAMES_S)
                await asyncio.wait(reading, timeout=_LAST_OUTPUT_S)
            if not self._end.is_fenced:
                await self._writers.finish(trainer)
            await end(answering, *helping, *reading)

    async def _reap(self, place: Premises) -> None:
        """Kill whatever the attempt has left, and wait until it is gone."""
        self._end.memory_bytes = place.memory_bytes
        self._end.oom_kills = await asyncio.to_thread(place.oom_kills)
        if self._trainer is None:
            await asyncio.to_thread(place.clear, deadline_s=self._tools.reap_s)
        report = await asyncio.to_thread(self._tools.ledger.reap, self.ref, deadline_s=self._tools.reap_s)
        if not report.is_gone:
            self._end.stuck_pids = report.stuck
            self._claim.event("attempt.stuck", {"pids": list(report.stuck)}, severity="error")
        if report.leaked and self._end.exit_code is not None:
            named = [{"pid": one.pid, "command": one.command} for one in report.leaked[:_MAX_LEAKED]]
            told = {"count": len(report.leaked), "processes": named}
            self._claim.event("attempt.leaked", told, severity="warning")
        elif self._kill.is_set() and report.is_gone:
            self._end.exit_code = await self._exit_of_killed()

    async def _tidy(self, name: str) -> None:
        """Remove the fresh working directory, and say what was in it."""
        left = await asyncio.to_thread(self._tools.workdirs.remove, name)
        if left.num_files:
            told = {"files": left.num_files, "names": list(left.names)}
            self._claim.event("attempt.workdir_removed", told, severity="warning")

    async def _hold_on(self) -> None:
        """Keep the leases of a trainer that has ended until that is written: else the job would be placed again.

        What was lost meanwhile is found when the end is to be written.
        """
        if not self._end.is_fenced:
            with contextlib.suppress(LeaseLost):
                await self._keeper.run()

    async def _exit_of_killed(self) -> int | None:
        """How a trainer ended that was not waited for; None if that is not known."""
        try:
            async with asyncio.timeout(_KILLED_S):
                return await self._tools.warm.wait_exit(attempt_name(self.ref))
        except (TimeoutError, TrainerLost, RunnerLost):
            return None

    async def _heed_record(self) -> None:
        """Find in the record, as often as leases are renewed, what nobody could tell: that the attempt is to end."""
        while True:
            await asyncio.sleep(self._tools.context.common.lease_ttl_s / 3)
            with contextlib.suppress(TransientError):
                record = await self._claim.look()
                if record is None:
                    raise LeaseLost(f"the record of job {self.ref.job!r} does not name the attempt any more")
                await self._heed(record)

    async def _heed(self, record: JobRecord) -> None:
        grace_s = record.spec.stop_grace_s
        if record.cancel_requested:
            await self.stop(Stop(reason="cancelled"), grace_s=grace_s)
        elif record.preempted_by is not None:
            await self.stop(Stop(reason="preempted"), grace_s=grace_s)

    async def _limit_time(self) -> None:
        limit_s = self._record.spec.time_limit_s
        if limit_s is None:
            return
        await asyncio.sleep(limit_s)
        self._end.is_timed_out = True
        await self.stop(Stop(reason="shutdown"), grace_s=self._record.spec.stop_grace_s)

    async def _new_deadline(self, deadline_s: float) -> None:
        await self._deadlines.heed(deadline_s)
        await self._writers.heed(deadline_s)

    def _is_waiting(self) -> bool:
        """Whether the trainer waits for railbus: for an answer, or for leases that could not be renewed."""
        return self._answers.is_owing or clock.boottime_s() >= self._keeper.deadline_s

    def _hung(self, stacks: str) -> None:
        self._end.failure = no_progress(self._record.spec.stall_s, stacks)
        self._kill.set()

    def _fenced(self) -> None:
        """The record no longer names this attempt; the trainer knows, and has a moment to end."""
        self._end.is_fenced = True
        asyncio.get_running_loop().call_later(_REFUSED_GRACE_S, self._kill.set)

    # --- the end -----------------------------------------------------------------------------------------------------

    async def _conclude(self) -> None:
        """Write the end into the record and give the leases back; a fenced attempt writes nothing."""
        async with beside(self._hold_on()):
            stuck = await self._write_end()
        if stuck is None:
            return
        if stuck:
            await through_outages(lambda: self._tools.clearing.mark(self.ref, stuck))
        await self._keeper.release()

    async def _write_end(self) -> list[str] | None:
        """The devices that are not to be granted yet, once the end is in the record; None if it is not to be."""
        cause, error = await self._end.verdict(
            self._answers.ended,
            failure=self._answers.failure,
            output=self._output.tail,
            rules=self._tools.log_rules,
        )
        if cause == "lease_lost":
            told = {"error": error.to_map()} if error is not None else {}
            self._claim.event("attempt.fenced", told, severity="warning")
            return None
        gpus = [device.id for device in self._request.devices if device.kind == "gpu"]
        checked = await self._tools.clearing.check(self.ref, gpus)
        cause, error = blamed(cause, error, checked)
        ended = Ended(self.ref.lease_epoch, str(self._record.host), cause, error, self._end.exit_code)
        try:
            applied = await self._claim.apply(ended)
        except OVER as exc:
            self._claim.event("attempt.fenced", {"error": exc.to_wire()}, severity="warning")
            return None
        self._tell_end(applied)
        if self._end.stuck_pids:
            return [device.id for device in self._request.devices]
        return unclear(checked, gpus)

    def _tell_end(self, applied: Applied) -> None:
        ended = self._answers.ended
        self._claim.tell(applied, {} if ended is None else {"metrics": ended.metrics})

    def _plan(self, opened: OpenedStream) -> Plan:
        common = self._tools.context.common
        return Plan(
            job=self.ref.job,
            spec=self._record.spec,
            attempt=self._record.attempt,
            lease_epoch=self.ref.lease_epoch,
            host=common.host,
            producer=self._producer,
            root=str(common.root.resolve()),
            devices=self._request.devices,
            stream=opened,
            entrypoint_dirs=tuple(str(path) for path in self._tools.entrypoint_dirs),
            checkpoint=self._record.checkpoint,
            deadline_boottime_s=self._keeper.deadline_s,
            trace=self._claim.trace,
        )


def _first(group: BaseExceptionGroup[RailbusError]) -> RailbusError:
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    assert isinstance(error, RailbusError)  # noqa: S101 - `except*` has sorted them
    return error

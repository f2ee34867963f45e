"""The process that writes an attempt's checkpoints, as its runner sees it.

It is forked when the trainer asks for it, beside the trainer and not below it: when the trainer has ended, however it
ended, the writer may bring to its end what it is writing, and commit it. One at a time; a trainer that has lost its
writer may ask for another.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
from collections.abc import Callable
from typing import Final

from railbus_runner import processes
from railbus_runner.commits import Commits
from railbus_runner.deadlines import DeadlineTeller
from railbus_runner.frames import Commit, Events, Fork, Plan, Recorded, WriterOpened, WriterRefused
from railbus_runner.link import TrainerLink
from railbus_runner.processes import ProcessId
from railbus_runner.reaping import AttemptLedger
from railbus_runner.warm_process import WarmProcess
from railbus_shared.contracts.devices import AttemptRef
from railbus_shared.contracts.jobs import ErrorBody
from railbus_shared.errors import BadMessage, TrainerLost
from railbus_shared.waiting import end, is_set_within

logger = logging.getLogger(__name__)

WRITER_GRACE_S: Final = 10.0
"""For what is being written when the trainer has ended; about a second for each GB of state is what it takes."""
_LOG_FD: Final = 2


class Writers:
    """Of one attempt.

    Attributes:
        is_awaited: whether the trainer waits for its writer.
    """

    def __init__(
        self,
        trainer: TrainerLink,
        commits: Commits,
        *,
        ref: AttemptRef,
        warm: WarmProcess,
        ledger: AttemptLedger,
        forward: Callable[[Events], None],
    ) -> None:
        self.is_awaited = False
        self._trainer = trainer
        self._commits = commits
        self._ref = ref
        self._warm = warm
        self._ledger = ledger
        self._forward = forward
        self._asked = asyncio.Event()
        self._gone = asyncio.Event()  # there is no writer
        self._gone.set()
        self._is_over = False
        self._deadline_s = 0.0
        self._teller: DeadlineTeller | None = None
        self._process: ProcessId | None = None
        self._to_trainer: socket.socket | None = None

    def open(self) -> None:
        """The trainer wants a writer."""
        if not self._is_over:
            self._asked.set()

    async def heed(self, deadline_s: float) -> None:
        """There is a new deadline, on CLOCK_BOOTTIME; never waits."""
        self._deadline_s = deadline_s
        if self._teller is not None:
            await self._teller.heed(deadline_s)

    async def run(self, trainer: Fork, plan: Plan) -> None:
        """Fork and serve writers until cancelled, each as its trainer was forked and with the plan of its trainer."""
        fork = trainer.changed(role="writer", workdir="")
        while True:
            await self._asked.wait()
            self._asked.clear()
            self._gone.clear()
            try:
                await self._see_through(fork, plan)
            finally:
                self._teller, self._process, self._to_trainer = None, None, None
                self._warm.forget(fork.process)
                self._gone.set()

    async def tell_recorded(self) -> None:
        """The trainer has lost its writer: tell it what the writer has committed, once nothing can come any more."""
        if self._process is not None:
            await asyncio.to_thread(processes.kill_exactly, self._process)
        await self._gone.wait()
        await self._trainer.send(Recorded(checkpoint=self._commits.recorded))

    async def finish(self, trainer: ProcessId) -> None:
        """The trainer has ended, or must now: let a writer that is at work write its checkpoint, for a grace."""
        self._is_over = True
        if self._gone.is_set():
            return
        await asyncio.to_thread(processes.kill_exactly, trainer)
        if self._to_trainer is not None:
            self._to_trainer.shutdown(socket.SHUT_RDWR)  # forks of the trainer's may hold its end open
        if not await is_set_within(self._gone, WRITER_GRACE_S):
            logger.warning("a writer is ended with its work undone", extra={"attempt": self._ref.job})

    async def _see_through(self, fork: Fork, plan: Plan) -> None:
        """One writer, from its fork to its end."""
        ours, theirs = socket.socketpair()
        with contextlib.closing(TrainerLink()) as link, ours, theirs:
            try:
                pid = await self._warm.fork(
                    fork, sock=link.theirs, stdout_fd=_LOG_FD, stderr_fd=_LOG_FD, extra_fd=theirs.fileno()
                )
            except TrainerLost as exc:
                await self._trainer.send(WriterRefused(error=ErrorBody.parse(exc.to_wire())))
                return
            link.give_away()
            theirs.close()
            await self._introduce(pid, plan, link, ours)
            await self._serve(link)
            status = await self._warm.wait_exit(fork.process)
            if status:
                logger.warning("a writer has ended", extra={"attempt": fork.attempt, "status": status})

    async def _introduce(self, pid: int, plan: Plan, link: TrainerLink, to_trainer: socket.socket) -> None:
        """Remember a writer that was just forked, and bring it and its trainer together."""
        self._process = ProcessId(pid, processes.start_ticks(pid) or 0)
        await asyncio.to_thread(self._ledger.add_writer, self._ref, pid=pid)
        self._teller, self._to_trainer = DeadlineTeller(link), to_trainer
        producer = f"{plan.producer}-w{os.urandom(2).hex()}"  # as `Forwarding` knows them
        await link.send(plan.changed(producer=producer, deadline_boottime_s=self._deadline_s))
        if self._is_over:
            to_trainer.shutdown(socket.SHUT_RDWR)
        else:
            await self._trainer.send(WriterOpened(), descriptor=to_trainer.fileno())

    async def _serve(self, link: TrainerLink) -> None:
        """Hear a writer until it closes its end, and until all it has asked for is answered."""
        teller = self._teller or DeadlineTeller(link)
        async with contextlib.aclosing(link.frames()) as frames, asyncio.TaskGroup() as tasks:
            telling = tasks.create_task(teller.run())
            try:
                async for frame in frames:
                    match frame:
                        case Events():
                            self._forward(frame)
                        case Commit():
                            tasks.create_task(self._commits.commit(frame, link))
                        case _:
                            logger.warning("a writer sent what it may not", extra={"frame": frame.f})
            except BadMessage:
                logger.exception("a writer sent what is no frame")
            await end(telling)

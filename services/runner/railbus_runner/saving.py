"""Checkpoints that somebody waits for: orders to the trainer, and which committed checkpoint is the answer.

An order is obeyed at the end of a step; the trainer then says which one (`saving`). The first checkpoint of that step
or a later one that the job record names answers it: it holds nothing older than the order.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from railbus_runner.frames import Save, Saving
from railbus_shared.contracts.artifacts import CheckpointMeta
from railbus_shared.contracts.jobs import CheckpointRef
from railbus_shared.contracts.saving import SavedCheckpoint
from railbus_shared.errors import Conflict, RailbusError, RequestTimeout, error_from_wire


@dataclass(eq=False)
class _Waiter:
    number: int
    answer: asyncio.Future[CheckpointMeta] = field(repr=False)
    step: int | None = None
    """At which the checkpoint was begun, once it was."""


class SaveRequests:
    """Those that wait for a checkpoint of one attempt."""

    def __init__(self, job: str, send: Callable[[Save], Awaitable[bool]]) -> None:
        self._job = job
        self._send = send
        self._number = 0
        self._news = asyncio.Event()
        self._waiters: list[_Waiter] = []
        self._newest: CheckpointMeta | None = None
        self._over: RailbusError | None = None

    async def ask(self, *, timeout_s: float) -> SavedCheckpoint:
        """Have a checkpoint written; returns once the job record names it.

        Raises RequestTimeout, Conflict where nothing is tracked or the attempt ends before, and what the trainer could
        not write it for, such as StorageFull.
        """
        if self._over is not None:
            raise self._over
        began_s = time.monotonic()
        self._number += 1
        waiter = _Waiter(self._number, asyncio.get_running_loop().create_future())
        self._waiters.append(waiter)
        self._news.set()
        try:
            async with asyncio.timeout(timeout_s):
                meta = await waiter.answer
        except TimeoutError:
            raise _late(self._job, waiter.step, timeout_s) from None
        finally:
            self._waiters.remove(waiter)
        return _saved(meta, seconds=time.monotonic() - began_s)

    async def run(self) -> None:
        """Pass orders on until cancelled, apart from those who ask: one who gives up must not leave half a frame."""
        while True:
            await self._news.wait()
            self._news.clear()
            await self._send(Save(number=self._number))

    def heed(self, told: Saving) -> None:
        """The trainer has begun the checkpoint, or cannot write it."""
        for waiter in self._waiters:
            if waiter.number <= told.number and not waiter.answer.done():
                waiter.step = told.step
                if told.error is not None:
                    waiter.answer.set_exception(error_from_wire(told.error.to_map()))
        self._settle()

    def committed(self, meta: CheckpointMeta) -> None:
        """The job record names this checkpoint; that may be heard before the trainer's word that it has begun."""
        self._newest = meta
        self._settle()

    def _settle(self) -> None:
        for waiter in self._waiters:
            if self._newest is None or waiter.step is None or waiter.answer.done():
                continue
            if self._newest.step >= waiter.step:
                waiter.answer.set_result(self._newest)

    def close(self) -> None:
        """The attempt is over."""
        self._over = Conflict(
            f"job {self._job!r} ended its attempt before the checkpoint was written",
            hint="`railbus job` shows how it ended, and its last checkpoint",
        )
        for waiter in self._waiters:
            if not waiter.answer.done():
                waiter.answer.set_exception(self._over)


def _late(job: str, step: int | None, timeout_s: float) -> RequestTimeout:
    if step is None:
        return RequestTimeout(
            f"job {job!r} took no step within {timeout_s:g} s, so no checkpoint was begun",
            hint="it is still written at the next step; wait longer with --timeout, or see `railbus logs` for a hang",
        )
    return RequestTimeout(
        f"the checkpoint of step {step} of job {job!r} is not durable after {timeout_s:g} s",
        hint="it is still being written; wait longer with --timeout, or see `railbus checkpoints`",
    )


def _saved(meta: CheckpointMeta, *, seconds: float) -> SavedCheckpoint:
    return SavedCheckpoint(
        job=meta.job,
        model=meta.model,
        checkpoint=CheckpointRef(number=meta.number, step=meta.step, sha256=meta.files[0].sha256),
        bytes=sum(file.bytes for file in meta.files),
        seconds=round(seconds, 3),
    )

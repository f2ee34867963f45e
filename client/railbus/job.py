"""A job that was submitted: what is known of it, and what can be asked of it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import TYPE_CHECKING, Final, Self

from railbus.asking import Asker, somebody
from railbus.ending import ended
from railbus.following import events_of
from railbus_shared.contracts.jobs import JobRecord, JobState
from railbus_shared.contracts.requests import CancelJob, HoldJob, JobRef, RetryJob, SetPriority
from railbus_shared.contracts.saving import CheckpointJob, SavedCheckpoint
from railbus_shared.contracts.waiting import Why
from railbus_shared.errors import RequestTimeout

if TYPE_CHECKING:
    from railbus_shared.contracts.model import Contract

CHECKPOINT_S: Final = 60.0
_CHECKPOINT_MORE_S: Final = 10.0
"""More than the services are given, whose own word that it was not enough says more than silence."""


class Job:
    """A handle on one job. Every method asks anew; `record` is what the last of them was told."""

    def __init__(self, asker: Asker, record: JobRecord) -> None:
        self._asker = asker
        self.record = record

    def __repr__(self) -> str:
        return f"<Job {self.id} {self.state}>"

    @property
    def id(self) -> str:
        """The job's id."""
        return self.record.id

    @property
    def state(self) -> JobState:
        """Its state when it was last asked for."""
        return self.record.state

    async def refresh(self) -> Self:
        """Ask for its record; returns itself."""
        return await self._told("get", JobRef(id=self.id))

    async def wait(self, *, timeout_s: float | None = None) -> JobRecord:
        """Wait for its end and return its record, whatever the end; raises RequestTimeout."""
        limit = asyncio.timeout(timeout_s)
        try:
            async with limit:
                self.record = (await ended(self._asker, [self.id]))[self.id]
        except TimeoutError:
            if not limit.expired():
                raise
            raise RequestTimeout(
                f"job {self.id!r} has not ended within {timeout_s} s", hint="wait longer, or cancel it"
            ) from None
        return self.record

    def events(self) -> AsyncGenerator[dict[str, object], None]:
        """Its events of every area (job, train, checkpoint, …) from its beginning, until the one that ends it."""
        return events_of(self._asker, self.id)

    async def why(self) -> Why:
        """Why it is where it is: what it waits for, who has that, when it may start."""
        return await self._asker.ask("jobs", "why", JobRef(id=self.id), Why)

    async def cancel(self, *, now: bool = False) -> Self:
        """Ask it to end, `now` without the grace in which it writes a checkpoint; it may still run for a while."""
        return await self._told("cancel", CancelJob(id=self.id, by=somebody(), now=now))

    async def hold(self, *, held: bool = True) -> Self:
        """Keep it from being placed while it waits; `held=False` lets it go."""
        return await self._told("hold", HoldJob(id=self.id, held=held, by=somebody()))

    async def set_priority(self, priority: int) -> Self:
        """Give it another priority while it waits, -100 to 100."""
        return await self._told("priority", SetPriority.parse({"id": self.id, "priority": priority}))

    async def retry(self, *, from_scratch: bool = False) -> Job:
        """A new job like this one, which has ended; it begins from its last checkpoint, or `from_scratch`."""
        request = RetryJob(id=self.id, from_scratch=from_scratch)
        return Job(self._asker, await self._asker.ask("jobs", "retry", request, JobRecord, timeout_s=15.0))

    async def checkpoint(self, *, timeout_s: float = CHECKPOINT_S) -> SavedCheckpoint:
        """Have it write a checkpoint at its next step; returns once that is durable.

        Raises Conflict if it does not run or tracks nothing, RequestTimeout, StorageFull.
        """
        return await checkpoint_now(self._asker, self.id, timeout_s=timeout_s)

    async def _told(self, verb: str, request: Contract) -> Self:
        self.record = await self._asker.ask("jobs", verb, request, JobRecord)
        return self


async def checkpoint_now(asker: Asker, job: str, *, timeout_s: float) -> SavedCheckpoint:
    """Have a running job write a checkpoint, and wait until it is durable."""
    request = CheckpointJob.parse({"id": job, "timeout_s": timeout_s})
    return await asker.ask("jobs", "checkpoint", request, SavedCheckpoint, timeout_s=timeout_s + _CHECKPOINT_MORE_S)

"""The events of one job, from its beginning to its end.

The last of them may come late: whoever is killed between writing that a job has ended and telling it tells nothing, and
a device_manager does so instead, where one runs. So the job's record is looked at as well, and what is told until
nothing more comes for a little while is the whole story.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from typing import Final

from railbus.asking import FINAL_EVENTS, Asker
from railbus_shared.bus.follow import follow
from railbus_shared.contracts.jobs import JobRecord
from railbus_shared.contracts.requests import JobRef
from railbus_shared.errors import JobNotFound, RailbusError, TransientError
from railbus_shared.waiting import beside, is_set_within

_LAST_EVENTS_S: Final = 10.0
"""How long nothing more may be heard of a job whose record says already that it has ended; time for a device_manager to
tell the end in another's place."""
_LOOK_S: Final = 3.0
_MAX_WAITING: Final = 1000

Event = dict[str, object]


async def events_of(asker: Asker, job: str, *, after: int = 0) -> AsyncGenerator[Event, None]:
    """A job's events of every area, until the one that ends it, or until its record has ended without one.

    Those that the stream has behind the sequence `after`; the job's end must be among them.
    Raises BusUnavailable, NoResponder or RequestTimeout if the first subscription does not succeed.
    """
    story = _Story(asker, job, after)
    async with beside(story.hear()), beside(story.watch_record()):
        while (told := await story.queue.get()) is not None:
            if isinstance(told, RailbusError):
                raise told
            yield told


class _Story:
    """Two tasks that fill one queue: events, then None for the end, or the error that ends it."""

    def __init__(self, asker: Asker, job: str, after: int) -> None:
        self.queue: asyncio.Queue[Event | RailbusError | None] = asyncio.Queue(_MAX_WAITING)
        self._asker = asker
        self._job = job
        self._after = after
        self._is_told = asyncio.Event()
        self._num_heard = 0

    async def hear(self) -> None:
        """Put every event into the queue."""
        subject = self._asker.bus.subjects.event("*", self._job, ">")
        try:
            async with contextlib.aclosing(follow(self._asker.bus, subject, after=self._after)) as events:
                async for event in events:
                    self._num_heard += 1
                    await self.queue.put(event)
                    if event.get("type") in FINAL_EVENTS:
                        break
        except RailbusError as exc:
            await self.queue.put(exc)
        self._is_told.set()
        await self.queue.put(None)

    async def watch_record(self) -> None:
        """End the story where the record has ended and no event says so.

        Not while more is heard, or while what was heard waits for who listens: there may be much of it.
        """
        while not await self._has_ended():
            if await is_set_within(self._is_told, _LOOK_S):
                return
        before = -1
        while before != self._num_heard or not self.queue.empty():
            before = self._num_heard
            if await is_set_within(self._is_told, _LAST_EVENTS_S):
                return
        await self.queue.put(None)

    async def _has_ended(self) -> bool:
        """Not while there is no record: the job may have been published a moment ago, or nobody is there to ask."""
        with contextlib.suppress(JobNotFound, TransientError):
            return (await self._asker.ask("jobs", "get", JobRef.parse({"id": self._job}), JobRecord)).is_final
        return False

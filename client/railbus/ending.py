"""Waiting for jobs to end: told by their events, and made sure of by their records, which alone count."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Collection
from typing import Final

from railbus.asking import FINAL_EVENTS, Asker
from railbus_shared import clock
from railbus_shared.bus.follow import follow
from railbus_shared.contracts.jobs import JobRecord
from railbus_shared.contracts.requests import JobRef
from railbus_shared.errors import TransientError
from railbus_shared.waiting import beside, is_set_within

_LOOK_S: Final = 3.0
"""Between two looks at the record of a single job; each further hundred of jobs makes it longer by as much."""
_RETRY_S: Final = 0.5
PATIENCE_S: Final = 300.0
"""How long nobody may answer before the wait is given up."""
_AT_ONCE: Final = 16


async def ended(
    asker: Asker,
    jobs: Collection[str],
    *,
    on_end: Callable[[JobRecord], None] = lambda _: None,
    patience_s: float = PATIENCE_S,
) -> dict[str, JobRecord]:
    """Wait until all jobs have ended; returns their records by id, in the order of `jobs`.

    `on_end` is told each as it ends. Raises JobNotFound, and TransientError once nobody has answered for `patience_s`.
    """
    hints = _Hints()
    found: dict[str, JobRecord] = {}
    async with beside(hints.listen(asker, jobs)):
        pending, heard_s = dict.fromkeys(jobs), clock.boottime_s()
        asked: Collection[str] = list(pending)
        while pending:
            try:
                for record in await _ended_of(asker, asked):
                    found[record.id] = record
                    del pending[record.id]
                    on_end(record)
                heard_s = clock.boottime_s()
            except TransientError:
                if clock.boottime_s() - heard_s > patience_s:
                    raise
                await asyncio.sleep(_RETRY_S)
            asked = await hints.next(pending) if pending else ()
    return {job: found[job] for job in jobs}


class _Hints:
    """Which jobs have probably ended. A hint that is missed costs time, no more: records are looked at anyway."""

    def __init__(self) -> None:
        self._ended: set[str] = set()
        self._woken = asyncio.Event()

    async def listen(self, asker: Asker, jobs: Collection[str]) -> None:
        """Hear of ends; what happened before is found by the first look."""
        only = next(iter(jobs)) if len(jobs) == 1 else "*"
        subject = asker.bus.subjects.event("job", only, ">")
        wanted = frozenset(jobs)
        while True:
            with contextlib.suppress(TransientError):
                async with contextlib.aclosing(follow(asker.bus, subject, since="new")) as events:
                    async for event in events:
                        self._hear(event, wanted)
            await asyncio.sleep(_RETRY_S)

    def _hear(self, event: dict[str, object], wanted: frozenset[str]) -> None:
        job = event.get("job")
        if event.get("type") in FINAL_EVENTS and isinstance(job, str) and job in wanted:
            self._ended.add(job)
            self._woken.set()

    async def next(self, pending: Collection[str]) -> list[str]:
        """The jobs to look at: those of which an end was heard; all that are left once it was quiet for a while."""
        is_heard = await is_set_within(self._woken, _LOOK_S * (1 + len(pending) / 100))
        self._woken.clear()
        heard, self._ended = self._ended, set()
        return [job for job in pending if job in heard] if is_heard else list(pending)


async def _ended_of(asker: Asker, jobs: Collection[str]) -> list[JobRecord]:
    """Records of those that have ended."""
    records: list[JobRecord] = []
    names = list(jobs)
    for first in range(0, len(names), _AT_ONCE):
        asking = (
            asker.ask("jobs", "get", JobRef.parse({"id": job}), JobRecord) for job in names[first : first + _AT_ONCE]
        )
        records += await asyncio.gather(*asking)
    return [record for record in records if record.is_final]

"""Ends of jobs that stand in their records and perhaps nowhere else.

Whoever ends a job writes the record and tells the end then, and tells nothing if it is killed in between. So the placer
looks, a little later, whether the end of each job is in the stream of events, and tells it from the record where it is
not. The event has one key, whoever tells it: one who was only slow doubles nothing.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from typing import Final, NamedTuple

from railbus_device_manager.known import KnownJobs
from railbus_shared import clock
from railbus_shared.bus.connection import Bus
from railbus_shared.bus.contents import Contents, contents
from railbus_shared.contracts.jobs import JobRecord, JobState
from railbus_shared.effects import tell_end
from railbus_shared.errors import TransientError
from railbus_shared.telemetry import LearningTelemetry

logger = logging.getLogger(__name__)

_ON_ITS_WAY_S: Final = 5.0
"""How long an event may take behind the record; who is killed within it is noticed that much later."""
_LOOK_S: Final = 1.0
_FEW: Final = 128
"""Of so many jobs each is asked for; of more, as when a placer begins, all that the stream has."""


class Ended(NamedTuple):
    """A job whose end is to be looked for."""

    due_s: float
    """When, on the clock of this process."""
    ended_ns: int
    """When it ended, by the clock of whoever ended it."""
    state: JobState


class UntoldEnds:
    """Jobs that have ended, until their ends are known to be told."""

    def __init__(self, bus: Bus, telemetry: LearningTelemetry, known: KnownJobs) -> None:
        self._bus = bus
        self._telemetry = telemetry
        self._known = known
        self._expected: dict[str, Ended] = {}
        self._looked_s = 0.0

    def expect(self, record: JobRecord, *, now: float) -> None:
        """The job has ended, so that somebody is to tell it."""
        if record.ended_at is not None:
            self._expected[record.id] = Ended(now + _ON_ITS_WAY_S, clock.parse_rfc3339(record.ended_at), record.state)

    def take_due(self, now: float) -> dict[str, Ended]:
        """The jobs that are to be looked at now; they are the caller's from then on."""
        if now - self._looked_s < _LOOK_S:
            return {}
        self._looked_s = now
        due = {job: ended for job, ended in self._expected.items() if ended.due_s <= now}
        for job in due:
            del self._expected[job]
        return due

    async def look(self, jobs: Mapping[str, Ended]) -> None:
        """Tell the ends that nobody has told; what cannot be seen now is looked for again.

        Of what is older than the stream's oldest message nobody can say any more whether it was told.
        """
        try:
            found = await self._told(jobs)
        except TransientError as exc:
            logger.info("ends not looked for", extra={"problem": str(exc)})
            self._expected.update(jobs)
            return
        told = frozenset[str]().union(*(one.subjects for one in found))
        since_ns = min((one.first_ns for one in found if one.first_ns is not None), default=None)
        for job, ended in jobs.items():
            if since_ns is not None and ended.ended_ns >= since_ns and self._subject(job, ended) not in told:
                logger.warning("an end was not told", extra={"job": job})
                tell_end(self._telemetry, self._known.held(job))

    async def _told(self, jobs: Mapping[str, Ended]) -> list[Contents]:
        """What the stream holds of these ends, and maybe of others."""
        subjects = self._bus.subjects
        if len(jobs) <= _FEW:
            patterns = [self._subject(job, ended) for job, ended in jobs.items()]
        else:
            patterns = [subjects.event("job", "*", state) for state in sorted({ended.state for ended in jobs.values()})]
        return await asyncio.gather(*(contents(self._bus, subjects.events_stream, pattern) for pattern in patterns))

    def _subject(self, job: str, ended: Ended) -> str:
        return self._bus.subjects.event("job", job, ended.state)

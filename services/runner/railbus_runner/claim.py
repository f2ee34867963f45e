"""An attempt's claim on its job: what it may still write into the job record, and events that name it.

The record names the attempt by host and lease epoch. Once it no longer does, `lifecycle.decide` refuses every change
with StaleLeaseEpoch and nothing is written.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import Final, TypeVar

from railbus_shared import lifecycle, tracing
from railbus_shared.contracts.devices import AttemptRef
from railbus_shared.contracts.events import Severity
from railbus_shared.contracts.jobs import JobRecord
from railbus_shared.effects import tell
from railbus_shared.errors import Conflict, JobNotFound, StaleLeaseEpoch, TransientError
from railbus_shared.happenings import Happening
from railbus_shared.lifecycle import Decision
from railbus_shared.records import Applied, JobRecords
from railbus_shared.telemetry import About, LearningTelemetry

logger = logging.getLogger(__name__)

_RETRY_S: Final = 0.5

OVER: Final = (StaleLeaseEpoch, JobNotFound, Conflict)
"""What is raised when the attempt may not write its job's record any more."""

A = TypeVar("A")


class Claim:
    """One attempt of one job on one host."""

    def __init__(
        self, ref: AttemptRef, record: JobRecord, *, records: JobRecords, telemetry: LearningTelemetry
    ) -> None:
        self.ref = ref
        self.record = record
        """As it was when the attempt began to run."""
        self.trace = tracing.of_attempt(record.trace, ref.lease_epoch)
        """The attempt's span, as a `traceparent`; None for a job of which nobody knows one."""
        self._records = records
        self._telemetry = telemetry

    async def holds(self) -> bool:
        """Whether the record still names this attempt."""
        return await self.look() is not None

    async def look(self) -> JobRecord | None:
        """The record as it is now, or None if it does not name this attempt any more; raises TransientError."""
        try:
            record = (await self._records.get(self.ref.job)).record
            lifecycle.check_names(record, lease_epoch=self.ref.lease_epoch, host=self.record.host)
        except (StaleLeaseEpoch, JobNotFound):
            return None
        return record

    async def apply(self, happening: Happening) -> Applied:
        """Change the record, however long NATS is away; raises one of `OVER` if the attempt is over."""
        unknown: list[Decision] = []
        return await through_outages(lambda: self._records.apply(self.ref.job, happening, unknown=unknown))

    def tell(self, applied: Applied, more: Mapping[str, object], *, step: int | None = None) -> None:
        """Record the facts that a change asks for, with what else is known of them."""
        tell(self._telemetry, applied, more, step=step)

    def event(
        self, what: str, data: Mapping[str, object], *, severity: Severity = "info", step: int | None = None
    ) -> None:
        """Record a fact about the attempt."""
        about = About(self.ref.job, self.record.attempt, self.ref.lease_epoch, step, self.trace)
        self._telemetry.record(what, data, about=about, severity=severity)


async def through_outages(ask: Callable[[], Awaitable[A]]) -> A:
    """Ask again while NATS or a service is away; the trainer waits meanwhile, or trains on."""
    while True:
        try:
            return await ask()
        except TransientError as exc:
            logger.warning("to be asked again", extra={"problem": str(exc)})
            await asyncio.sleep(_RETRY_S)

"""An attempt's claim on its job: what it may still write into the job record, and events that name it.

The record names the attempt by host and lease epoch. Once it no longer does, every change is refused with
StaleLeaseEpoch and nothing is written.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import Final, TypeVar

from railbus_shared.contracts.devices import AttemptRef
from railbus_shared.contracts.events import Severity
from railbus_shared.contracts.jobs import JobRecord
from railbus_shared.errors import JobNotFound, StaleLeaseEpoch, TransientError
from railbus_shared.records import JobRecords
from railbus_shared.telemetry import About, LearningTelemetry

logger = logging.getLogger(__name__)

_RETRY_S: Final = 0.5

A = TypeVar("A")


class Claim:
    """One attempt of one job on one host."""

    def __init__(
        self, ref: AttemptRef, record: JobRecord, *, records: JobRecords, telemetry: LearningTelemetry
    ) -> None:
        self.ref = ref
        self.record = record
        """As it was when the attempt began to run."""
        self._records = records
        self._telemetry = telemetry

    async def holds(self) -> bool:
        """Whether the record still names this attempt."""
        try:
            self._check((await self._records.get(self.ref.job)).record)
        except (StaleLeaseEpoch, JobNotFound):
            return False
        return True

    async def change(self, change: Callable[[JobRecord], JobRecord]) -> JobRecord:
        """Change the record by compare-and-set, however long NATS is away.

        Raises StaleLeaseEpoch or JobNotFound if the record does not name this attempt any more.
        """

        def checked(record: JobRecord) -> JobRecord:
            self._check(record)
            return change(record)

        return await through_outages(lambda: self._records.change(self.ref.job, checked))

    def event(
        self, what: str, data: Mapping[str, object], *, severity: Severity = "info", step: int | None = None
    ) -> None:
        """Record a fact about the attempt."""
        about = About(self.ref.job, self.record.attempt, self.ref.lease_epoch, step)
        self._telemetry.record(what, data, about=about, severity=severity)

    def _check(self, record: JobRecord) -> None:
        mine = (
            record.state in {"running", "checkpointing"}
            and record.lease_epoch == self.ref.lease_epoch
            and record.host == self.record.host
        )
        if not mine:
            raise StaleLeaseEpoch(
                f"job {record.id!r} is {record.state} with lease epoch {record.lease_epoch}, "
                f"so the attempt with epoch {self.ref.lease_epoch} is over",
                hint="the attempt ends; nothing of it counts any more",
            )


async def through_outages(ask: Callable[[], Awaitable[A]]) -> A:
    """Ask again while NATS or a service is away; the trainer waits meanwhile, or trains on."""
    while True:
        try:
            return await ask()
        except TransientError as exc:
            logger.warning("to be asked again", extra={"problem": str(exc)})
            await asyncio.sleep(_RETRY_S)

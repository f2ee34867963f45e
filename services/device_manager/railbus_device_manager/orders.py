"""What a runner is told about a job that it has: to stop its trainer, or to have it write a checkpoint."""

from __future__ import annotations

import logging
from typing import Final

from railbus_shared.bus.connection import Bus
from railbus_shared.contracts.jobs import JobRecord
from railbus_shared.contracts.requests import StopAttempt
from railbus_shared.contracts.saving import SaveAttempt, SavedCheckpoint
from railbus_shared.effects import tell
from railbus_shared.errors import RailbusError
from railbus_shared.happenings import StopTrainer
from railbus_shared.records import Applied
from railbus_shared.telemetry import LearningTelemetry

_ANSWER_S: Final = 5.0
"""More than the time that a runner is given: its own word that it was not enough says more than silence."""

logger = logging.getLogger(__name__)


class Orders:
    """What a device_manager does once a record is written; starting trainers and leases are the placer's."""

    def __init__(self, bus: Bus, telemetry: LearningTelemetry) -> None:
        self._bus = bus
        self._telemetry = telemetry

    async def carry_out(self, applied: Applied) -> None:
        """Tell and order; an order that is lost is found in the record by the runner."""
        tell(self._telemetry, applied)
        for effect in applied.decision.effects:
            if isinstance(effect, StopTrainer):
                await self._stop(applied.record, effect)

    async def save(self, record: JobRecord, *, timeout_s: float) -> SavedCheckpoint:
        """Have the runner of a record's attempt see to a checkpoint; raises what it answers."""
        order = SaveAttempt(job=record.id, lease_epoch=record.lease_epoch, timeout_s=timeout_s)
        subject = self._bus.subjects.runner(str(record.host), "save")
        return SavedCheckpoint.parse(await self._bus.request(subject, order.to_map(), timeout_s=timeout_s + _ANSWER_S))

    async def _stop(self, record: JobRecord, stop: StopTrainer) -> None:
        order = StopAttempt(
            job=record.id, lease_epoch=record.lease_epoch, grace_s=stop.grace_s, reason=stop.reason
        )  # fmt: skip
        try:
            await self._bus.request(self._bus.subjects.runner(str(record.host), "stop"), order.to_map())
        except RailbusError as exc:
            logger.info("runner not told to stop; it reads the record", extra={"job": record.id, "problem": str(exc)})

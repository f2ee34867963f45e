"""What the processes of an attempt tell is passed on, as far as it is theirs to tell.

Training code can write to the channel of its trainer whatever it likes. It has no key of the bus; what it says must not
count as said by a service, nor by another attempt.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Final

from railbus_runner.frames import Events
from railbus_runner.tools import Tools
from railbus_shared.catalogue import may_be_told_by_trainers
from railbus_shared.contracts.devices import AttemptRef
from railbus_shared.contracts.jobs import JobRecord
from railbus_shared.contracts.model import JsonMap

logger = logging.getLogger(__name__)

_SOURCES: Final = frozenset({"trainer", "writer"})


class Forwarding:
    """Of one attempt: `forwarding(frame)`."""

    def __init__(self, ref: AttemptRef, record: JobRecord, tools: Tools, *, producer: str) -> None:
        """`producer` is the trainer's; those of its ranks and writers begin with it."""
        self._ref = ref
        self._telemetry = tools.context.telemetry
        self._measures = tools.measures
        self._producer = producer
        self._about: JsonMap = {
            "host": tools.context.common.host,
            "job": ref.job,
            "attempt": record.attempt,
            "lease_epoch": ref.lease_epoch,
        }
        self._has_refused = False

    def __call__(self, frame: Events) -> None:
        events = [event for event in frame.events if self._may_tell(event)]
        if len(events) < len(frame.events):
            self._tell_refused(frame.events)
        self._telemetry.forward(events)
        self._measures.stepped(self._ref, events)

    def _may_tell(self, event: JsonMap) -> bool:
        kind, producer = event.get("type"), event.get("producer")
        return (
            isinstance(kind, str)
            and may_be_told_by_trainers(kind)
            and isinstance(producer, str)
            and producer.startswith(self._producer)
            and event.get("source") in _SOURCES
            and all(event.get(name) == value for name, value in self._about.items())
        )

    def _tell_refused(self, events: Sequence[JsonMap]) -> None:
        """Once: there may be any number of them."""
        if not self._has_refused:
            kinds = sorted({str(event.get("type"))[:64] for event in events if not self._may_tell(event)})[:5]
            logger.warning("a trainer tells what it may not", extra={"types": kinds})
            self._has_refused = True

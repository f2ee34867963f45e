"""What a user may ask of a running railbus: one request, its answer as a contract, or the error that was answered."""

from __future__ import annotations

import getpass
import re
from typing import Final, TypeVar

from railbus_shared.bus.connection import Bus
from railbus_shared.bus.repeating import request_repeatedly
from railbus_shared.contracts.model import Contract

A = TypeVar("A", bound=Contract)

FINAL_EVENTS: Final = frozenset({"job.succeeded", "job.failed", "job.cancelled"})
_ANSWER_S: Final = 10.0
_REPEATABLE: Final = frozenset(
    {
        *(("jobs", verb) for verb in ("get", "list", "why", "dry_run", "cancel", "hold", "priority")),
        *(("devices", verb) for verb in ("list", "drain")),
        *(("data", verb) for verb in ("list", "describe")),
    }
)
"""What is the same when it is asked twice, and costs little."""
_NOT_IN_ID: Final = re.compile(r"[^a-z0-9_-]+")


class Asker:
    """A connection on which requests are made."""

    def __init__(self, bus: Bus) -> None:
        self.bus = bus

    async def ask(self, area: str, verb: str, request: Contract, answer: type[A], *, timeout_s: float = _ANSWER_S) -> A:
        """Ask `<area>.<verb>`; raises what was answered, NoResponder, RequestTimeout or BusUnavailable."""
        return answer.parse(await self._answer(area, verb, request, timeout_s=timeout_s))

    async def tell(self, area: str, verb: str, request: Contract) -> None:
        """Ask for something whose answer says nothing that is needed; raises like `ask`."""
        await self._answer(area, verb, request, timeout_s=_ANSWER_S)

    async def _answer(self, area: str, verb: str, request: Contract, *, timeout_s: float) -> dict[str, object]:
        subject = self.bus.subjects.request(area, verb)
        if (area, verb) in _REPEATABLE:
            return await request_repeatedly(self.bus, subject, request.to_map(), timeout_s=timeout_s)
        return await self.bus.request(subject, request.to_map(), timeout_s=timeout_s)


def somebody() -> str:
    """Who asks, as an id for records: the name of the user of this process."""
    try:
        name = getpass.getuser()
    except (OSError, KeyError):  # a process whose user number has no name
        name = ""
    return _NOT_IN_ID.sub("-", name.lower()).strip("-_")[:40] or "somebody"

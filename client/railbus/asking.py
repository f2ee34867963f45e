"""What a user may ask of a running railbus: one request, its answer as a contract, or the error that was answered."""

from __future__ import annotations

import getpass
import re
from typing import Final, TypeVar

from railbus_shared.bus.connection import Bus
from railbus_shared.contracts.model import Contract

A = TypeVar("A", bound=Contract)

FINAL_EVENTS: Final = frozenset({"job.succeeded", "job.failed", "job.cancelled"})
_ANSWER_S: Final = 10.0
_NOT_IN_ID: Final = re.compile(r"[^a-z0-9_-]+")


class Asker:
    """A connection on which requests are made."""

    def __init__(self, bus: Bus) -> None:
        self.bus = bus

    async def ask(self, area: str, verb: str, request: Contract, answer: type[A], *, timeout_s: float = _ANSWER_S) -> A:
        """Ask `<area>.<verb>`; raises what was answered, NoResponder, RequestTimeout or BusUnavailable."""
        subject = self.bus.subjects.request(area, verb)
        return answer.parse(await self.bus.request(subject, request.to_map(), timeout_s=timeout_s))

    async def tell(self, area: str, verb: str, request: Contract) -> None:
        """Ask for something whose answer says nothing that is needed; raises like `ask`."""
        await self.bus.request(self.bus.subjects.request(area, verb), request.to_map(), timeout_s=_ANSWER_S)


def somebody() -> str:
    """Who asks, as an id for records: the name of the user of this process."""
    try:
        name = getpass.getuser()
    except (OSError, KeyError):  # a process whose user number has no name
        name = ""
    return _NOT_IN_ID.sub("-", name.lower()).strip("-_")[:40] or "somebody"

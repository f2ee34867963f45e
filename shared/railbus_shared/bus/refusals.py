"""What the server does not let a key do. It says so beside the request, whose answer would be waited for in vain."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator
from typing import Final

from railbus_shared.errors import NotAuthorized

_REFUSED: Final = re.compile(r'permissions violation for publish to "([^"]+)"', re.IGNORECASE)


class Refusals:
    """Of one connection."""

    def __init__(self) -> None:
        self._waiting: dict[str, set[asyncio.Timeout]] = {}

    @contextlib.asynccontextmanager
    async def ending(self, subject: str) -> AsyncIterator[None]:
        """Around what is published there and waits for an answer; raises NotAuthorized as soon as it is refused."""
        name = subject.lower()  # as nats-py hands it on
        waiting, until_refused = self._waiting.setdefault(name, set()), asyncio.timeout(None)
        waiting.add(until_refused)
        try:
            async with until_refused:
                yield
        except TimeoutError as exc:
            if not until_refused.expired():
                raise
            raise NotAuthorized(
                f"this key may not ask {subject!r}", hint="`railbus keys list` shows its role; another one may"
            ) from exc
        finally:
            waiting.discard(until_refused)
            if not waiting:
                self._waiting.pop(name, None)

    def heard(self, problem: str) -> None:
        """End what waits for the subject that an error of the connection names, if it names one."""
        refused = _REFUSED.search(problem)
        for waiting in tuple(self._waiting.get(refused[1].lower(), ())) if refused else ():
            if not waiting.expired():
                waiting.reschedule(0)

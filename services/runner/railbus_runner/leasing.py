"""Keeping the leases of one attempt: renewed at a third of their life, and given up the moment they are not ours.

A deadline is counted from before the renewal was sent, so the holder never believes in a lease for longer than the
server does. When NATS was away for longer than the leases live, they have lapsed together; the attempt goes on if its
job record still names it and nobody else was granted the devices since.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Final, Literal

from railbus_shared import clock, leases
from railbus_shared.bus.bucket import Bucket
from railbus_shared.contracts.devices import HeldLease
from railbus_shared.errors import LeaseLost, TransientError

logger = logging.getLogger(__name__)

_RETRY_S: Final = 0.5

NewDeadline = Callable[[float], Awaitable[None]]
"""Told the deadline, on CLOCK_BOOTTIME, whenever it has moved."""

Outcome = Literal["ok", "unknown", "lost"]
"""Of a renewal; `unknown` where NATS did not answer."""


class LeaseKeeper:
    """The leases of one attempt."""

    def __init__(
        self,
        bucket: Bucket,
        held: Sequence[HeldLease],
        *,
        ttl_s: int,
        still_mine: Callable[[], Awaitable[bool]],
        new_deadline: NewDeadline,
        tell: Callable[[Outcome], None] = lambda _: None,
    ) -> None:
        """`tell` is told the outcome of each renewal."""
        self._bucket = bucket
        self._held = tuple(held)
        self._ttl_s = ttl_s
        self._still_mine = still_mine
        self._new_deadline = new_deadline
        self._tell = tell
        self.deadline_s = 0.0

    async def renew(self) -> None:
        """Renew once; raises LeaseLost if the attempt is no longer the job's, TransientError if nothing is known."""
        began = clock.boottime_s()
        try:
            self._held = await leases.renew(self._bucket, self._held, ttl_s=self._ttl_s)
        except LeaseLost:
            if not await self._still_mine():
                self._tell("lost")
                raise
            began = clock.boottime_s()
            self._held = await leases.regrant(self._bucket, self._held, ttl_s=self._ttl_s)
            logger.warning("leases had lapsed and were taken up again")
        self.deadline_s = began + self._ttl_s
        self._tell("ok")
        await self._new_deadline(self.deadline_s)

    async def run(self) -> None:
        """Renew until cancelled; raises LeaseLost."""
        while True:
            await asyncio.sleep(self._ttl_s / 3)
            while not await self._renewed():  # noqa: ASYNC110 - the store tells nobody when it is back
                await asyncio.sleep(_RETRY_S)

    async def _renewed(self) -> bool:
        try:
            await self.renew()
        except TransientError as exc:
            logger.warning("leases not renewed", extra={"problem": str(exc)})
            self._tell("unknown")
            return False
        return True

    async def release(self) -> None:
        """Give the leases back; those that cannot be reached expire by themselves."""
        try:
            await leases.release(self._bucket, self._held)
        except TransientError as exc:
            logger.info("leases left to expire", extra={"problem": str(exc)})

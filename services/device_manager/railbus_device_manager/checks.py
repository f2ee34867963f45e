"""What can be said of a job at once: that no runner and no dataloader could ever do it.

Good news is believed for a second, so that a flood of jobs asks little; bad news is made sure of before it refuses.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Final

from railbus_device_manager.submissions import check_entrypoint
from railbus_device_manager.wishes import Wish, wish
from railbus_shared import clock
from railbus_shared.bus.connection import Bus
from railbus_shared.bus.repeating import request_repeatedly
from railbus_shared.contracts.jobs import JobSpec
from railbus_shared.errors import RailbusError, TransientError

_BELIEVED_S: Final = 1.0
_AT_ONCE: Final = 16
_DESCRIBED_S: Final = 5.0
_MAX_REMEMBERED: Final = 1000

OfferedEntrypoints = Callable[[float], Awaitable[frozenset[str] | None]]
"""Entrypoints that some runner offers, as of at most so many seconds ago; None if no runner is known."""


class Checks:
    """Looks at what jobs name."""

    def __init__(self, bus: Bus, *, offered: OfferedEntrypoints, check_fits: Callable[[JobSpec], None]) -> None:
        """`check_fits` raises for a job that no host could ever run, by what was last read."""
        self._bus = bus
        self._offered = offered
        self._check_fits = check_fits
        self._good_until_s: dict[str, float] = {}
        """By dataset."""

    async def check(self, spec: JobSpec) -> None:
        """Raises what the job is to be refused for, if for anything."""
        (refusal,) = await self.refusals([spec])
        if refusal is not None:
            raise refusal

    async def refusals(self, specs: Sequence[JobSpec]) -> list[RailbusError | None]:
        """What each job is to be refused for, if for anything."""
        datasets = await self._datasets({spec.dataset for spec in specs})
        found = self._judged(specs, await self._offered(_BELIEVED_S))
        if any(found):
            found = self._judged(specs, await self._offered(0.0))
        return [refusal or datasets[spec.dataset] for spec, refusal in zip(specs, found, strict=True)]

    def _judged(self, specs: Sequence[JobSpec], offered: frozenset[str] | None) -> list[RailbusError | None]:
        """What can be told without asking anyone; once for all jobs of one wish, for it takes a look at all devices."""
        known: dict[tuple[Wish, bool], RailbusError | None] = {}
        for spec in specs:
            kind = wish(spec), spec.wait_for_hosts
            if kind not in known:
                known[kind] = self._judge(spec, offered)
        return [known[wish(spec), spec.wait_for_hosts] for spec in specs]

    def _judge(self, spec: JobSpec, offered: frozenset[str] | None) -> RailbusError | None:
        try:
            if offered is not None:
                check_entrypoint(spec.entrypoint, offered)
            self._check_fits(spec)
        except RailbusError as exc:
            return exc
        return None

    async def _datasets(self, names: set[str]) -> Mapping[str, RailbusError | None]:
        slots = asyncio.Semaphore(_AT_ONCE)

        async def described(name: str) -> RailbusError | None:
            async with slots:
                return await self._describe(name)

        found = await asyncio.gather(*(described(name) for name in names))
        return dict(zip(names, found, strict=True))

    async def _describe(self, dataset: str) -> RailbusError | None:
        if self._good_until_s.get(dataset, 0.0) > clock.boottime_s():
            return None
        try:
            subject = self._bus.subjects.request("data", "describe")
            await request_repeatedly(self._bus, subject, {"dataset": dataset}, timeout_s=_DESCRIBED_S)
        except TransientError:
            return None  # no dataloader answers now; the job waits, and its runner will look again
        except RailbusError as exc:
            return exc
        if len(self._good_until_s) >= _MAX_REMEMBERED:
            self._good_until_s.clear()
        self._good_until_s[dataset] = clock.boottime_s() + _BELIEVED_S
        return None

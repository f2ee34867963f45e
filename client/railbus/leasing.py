"""Devices leased by hand, for a notebook or a command that railbus does not start.

A lease lives as long as it is renewed. `DeviceLease` is renewed in the background until its block ends, and released
then; a process that is killed stops renewing, and its devices come free when the time-to-live has passed.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Final

from railbus.asking import Asker, somebody
from railbus_shared import clock
from railbus_shared.contracts.devices import DeviceInfo, HeldLease
from railbus_shared.contracts.jobs import DevicePreference
from railbus_shared.contracts.requests import DeviceList, HeldLeases, LeaseDevices, Nothing
from railbus_shared.errors import InvalidField, LeaseLost, NoFreeDevice, RailbusError, TransientError
from railbus_shared.waiting import beside

logger = logging.getLogger(__name__)

TTL_S: Final = 30
_ASK_AGAIN_S: Final = 1.0
_THREAD_VARIABLES: Final = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


class DeviceLease:
    """Devices that are held, and whether they still are."""

    def __init__(self, devices: Sequence[DeviceInfo], held: Sequence[HeldLease], *, renewed_s: float) -> None:
        self.devices = tuple(devices)
        self._held = tuple(held)
        self._renewed_s = renewed_s
        """When the last renewal that succeeded was asked for, on the clock of `clock.boottime_s`."""
        self._loss: LeaseLost | None = None
        self._is_lost = asyncio.Event()

    def __repr__(self) -> str:
        return f"<DeviceLease {self.holder} of {', '.join(device.id for device in self.devices)}>"

    @property
    def holder(self) -> str:
        """The name under which `railbus devices` shows it."""
        return self._held[0].lease.holder

    @property
    def cores(self) -> frozenset[int]:
        """CPU numbers of the leased slots, for `os.sched_setaffinity`; empty where only GPUs are leased."""
        return frozenset(core for device in self.devices for core in device.cores if device.kind == "cpu")

    @property
    def environment(self) -> dict[str, str]:
        """Variables under which a new process sees these devices and no others."""
        uuids = [device.uuid for device in self.devices if device.kind == "gpu"]
        threads = {name: str(len(self.cores)) for name in _THREAD_VARIABLES} if self.cores else {}
        return {"CUDA_VISIBLE_DEVICES": ",".join(uuids), **threads}

    def check(self) -> None:
        """Raises LeaseLost once the devices may be somebody else's."""
        if self._loss is None:
            return
        raise LeaseLost(self._loss.message, hint=self._loss.hint, details=self._loss.details)

    async def lost(self) -> None:
        """Returns once the lease is lost; for whoever must then stop what uses the devices."""
        await self._is_lost.wait()

    async def keep(self, asker: Asker, *, ttl_s: int) -> None:
        """Renew at a third of its life, until it is lost or this is cancelled."""
        while self._loss is None:
            await asyncio.sleep(ttl_s / 3)
            asked_s = clock.boottime_s()
            try:
                request = HeldLeases(leases=self._held, ttl_s=ttl_s)
                answer = await asker.ask("devices", "renew", request, HeldLeases, timeout_s=max(1.0, ttl_s / 3))
            except TransientError as exc:
                if clock.boottime_s() - self._renewed_s >= ttl_s:
                    self._lose(f"the lease of {self._names()} could not be renewed in its life of {ttl_s} s: {exc}")
            except RailbusError as exc:
                self._lose(exc.message)
            else:
                self._held, self._renewed_s = answer.leases, asked_s

    async def release(self, asker: Asker) -> None:
        """Give the devices back; what cannot be given back now lapses by itself, which is said in the log."""
        if self._loss is not None:
            return
        try:
            await asker.ask("devices", "release", HeldLeases(leases=self._held), Nothing, timeout_s=5.0)
        except RailbusError as exc:
            logger.warning("lease not released; it lapses", extra={"holder": self.holder, "problem": str(exc)})

    def _lose(self, why: str) -> None:
        self._loss = LeaseLost(why, hint="stop using the devices, and lease anew")
        self._is_lost.set()
        logger.error("lease lost", extra={"holder": self.holder, "problem": why})

    def _names(self) -> str:
        return ", ".join(repr(device.id) for device in self.devices)


@contextlib.asynccontextmanager
async def leased(
    asker: Asker, devices: DevicePreference, *, host: str | None, holder: str | None, ttl_s: int, wait_s: float
) -> AsyncIterator[DeviceLease]:
    """Lease, keep and release; raises NoFreeDevice, and LeaseLost at the end if it was lost in between."""
    fields = {"holder": holder or new_holder(), "devices": devices, "host": host, "ttl_s": ttl_s}
    request = LeaseDevices.parse(fields)
    lease = await _granted(asker, request, wait_s=wait_s)
    try:
        async with beside(lease.keep(asker, ttl_s=ttl_s)):
            yield lease
    finally:
        await lease.release(asker)
    lease.check()


async def _granted(asker: Asker, request: LeaseDevices, *, wait_s: float) -> DeviceLease:
    give_up_s = clock.boottime_s() + wait_s
    while True:
        known = {
            one.device.id: one.device for one in (await asker.ask("devices", "list", Nothing(), DeviceList)).devices
        }
        asked_s = clock.boottime_s()
        try:
            granted = await asker.ask("devices", "lease", request, HeldLeases)
        except NoFreeDevice:
            if asked_s + _ASK_AGAIN_S > give_up_s:
                raise
            await asyncio.sleep(_ASK_AGAIN_S)
            continue
        names = dict.fromkeys(one.lease.device for one in granted.leases)  # a shared GPU has a lease for each share
        devices = [known[name] for name in names if name in known]
        return DeviceLease(devices, granted.leases, renewed_s=asked_s)


def preference(*, gpus: int, cpus: int) -> DevicePreference:
    """What `lease(gpus=…)` or `lease(cpus=…)` asks for; raises InvalidField unless it is exactly one of them."""
    if (gpus > 0) == (cpus > 0):
        raise InvalidField(
            field="gpus",
            value=gpus,
            problem="either GPUs or CPU slots are leased at once",
            hint="give gpus=1 or cpus=1; two leases may be held beside each other",
        )
    wanted: Mapping[str, object] = {"kind": "gpu" if gpus else "cpu", "count": gpus or cpus}
    return DevicePreference.parse(wanted)


def new_holder() -> str:
    """A name for a lease that nobody named: who holds it, and from which process."""
    return f"{somebody()}-{os.getpid()}-{secrets.token_hex(2)}"

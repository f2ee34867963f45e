"""This host's devices, as its device_manager keeps them: read at every heartbeat, judged, reported, cordoned.

Out: the host's report and its cordons, events of faults and leaks, `runner.<host>.stop` for what runs on a device that
broke. In: `devices.<host>.check`, by which the runner asks, once the processes of an attempt are gone, whether its
memory is back and its GPUs still work. A host without GPUs asks who uses its devices only while
somebody reads its metrics.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Final

from railbus_device_manager.inventory import Inventory, Reading
from railbus_device_manager.manager import DeviceManager
from railbus_device_manager.reports import Reports, with_cordons
from railbus_device_manager.states import device_state
from railbus_device_manager.watch import DeviceWatch, Findings, is_clear
from railbus_shared import clock
from railbus_shared.bus.endpoints import AnyEndpoint, Endpoint
from railbus_shared.contracts.checks import CheckDevices, CheckedDevice, CheckedDevices
from railbus_shared.contracts.devices import Cordon, DeviceInfo, HostReport
from railbus_shared.contracts.requests import DeviceState, StopAttempt
from railbus_shared.errors import RailbusError, TransientError
from railbus_shared.service import Context
from railbus_shared.telemetry import About

logger = logging.getLogger(__name__)

_CLEARING_S: Final = 2.0
"""How long a runner that asks waits for memory; what takes longer is left to a reclaim mark."""
_CLEARING_PERIOD_S: Final = 0.1  # the driver tells nobody when memory is back


class HostDevices:
    """The devices of one host."""

    def __init__(
        self,
        context: Context,
        inventory: Inventory,
        reports: Reports,
        manager: DeviceManager,
        *,
        tolerates_strangers: bool = False,
    ) -> None:
        self._context = context
        self._host = context.common.host
        self._inventory = inventory
        self._reports = reports
        self._manager = manager
        self._watch = DeviceWatch(self._host, tolerates_strangers=tolerates_strangers)
        self._looking = asyncio.Lock()
        self.problem = "devices not read yet"
        """What keeps them from being read; empty if nothing does."""
        self.shown: tuple[DeviceInfo, ...] = ()
        """The devices as they were reported last."""
        self.is_watched = False
        """Set by whoever looks at `states`: who has the devices is then read again at the next heartbeat."""

    def endpoints(self) -> list[AnyEndpoint]:
        request, own = self._context.bus.subjects.request, f"devices.{self._host}"
        return [Endpoint("check-devices", request(own, "check"), CheckDevices, self._check, may_wait=True)]

    async def run(self) -> None:
        """Look and report at every heartbeat, until cancelled."""
        while True:
            try:
                await self._look()
            except TransientError as exc:
                logger.warning("not reported", extra={"problem": str(exc)})
            except RailbusError as exc:
                self.problem = str(exc)
                logger.error("devices cannot be read", extra={"problem": str(exc)})  # noqa: TRY400 - it says it all
            await asyncio.sleep(self._context.common.heartbeat_s)

    def states(self) -> list[DeviceState]:
        """Who has each device, as far as has been heard; what expires is not."""
        facts, host = self._manager.facts, self._manager.facts.hosts.get(self._host)
        named = facts.named()
        return [
            device_state(
                device,
                draining=host is not None and host.draining,
                leases=facts.leases_on(device.id),
                mark=facts.marks.get(device.id),
                named=named.get(device.id, ()),
            )
            for device in self.shown
        ]

    async def _look(self) -> tuple[DeviceInfo, ...]:
        """Read, judge, act and report; the devices as reported. One look at a time."""
        async with self._looking:
            reading = await self._read()
            if self.is_watched or any(device.kind == "gpu" for device in reading.devices):
                self.is_watched = False
                await self._reports.refresh()
            use = self._manager.use_of(self._host)
            found = self._watch.look(reading, use, now=clock.boottime_s(), at=clock.now())
            await self._act(found)
            report = HostReport(host=self._host, devices=tuple(found.devices), reported_at=clock.now())
            ttl_s = max(1, round(5 * self._context.common.heartbeat_s))
            await self._reports.devices.put(self._host, report.to_map(), ttl_s=ttl_s)
            self.shown = with_cordons(report, self._manager.facts.cordons).devices
            return self.shown

    async def _read(self) -> Reading:
        reading = await asyncio.to_thread(self._inventory.read)
        self.problem = ""
        return reading

    async def _act(self, found: Findings) -> None:
        """Write the cordons first: what is told or ended must not be granted again meanwhile."""
        for cordon in found.cordons:
            await self._reports.devices.put(f"{cordon.device}.cordon", cordon.to_map())
        for device in found.lifted:
            await self._reports.devices.remove(f"{device}.cordon")
        if found.cordons or found.lifted:
            await self._reports.refresh()
        for told in found.told:
            self._context.telemetry.record(told.what, told.data, about=About(told.job), severity=told.severity)
        for order in found.stops:
            await self._stop(order)

    async def _stop(self, order: StopAttempt) -> None:
        """Have an attempt ended; whoever does not hear it is told again at the next look."""
        subject = self._context.bus.subjects.runner(self._host, "stop")
        try:
            await self._context.bus.request(subject, order.to_map())
        except RailbusError as exc:
            logger.info("runner not told of a fault", extra={"job": order.job, "problem": str(exc)})

    # --- requests ----------------------------------------------------------------------------------------------------

    async def _check(self, request: CheckDevices) -> CheckedDevices:
        """Look at once, and again for a while if memory is not back yet."""
        until_s = clock.boottime_s() + _CLEARING_S
        while True:
            devices = {device.id: device for device in await self._look()}
            checked = [self._checked(name, devices.get(name), request) for name in request.devices]
            if all(one.clear or one.fault for one in checked) or clock.boottime_s() > until_s:
                return CheckedDevices(devices=tuple(checked))
            await asyncio.sleep(_CLEARING_PERIOD_S)

    def _checked(self, name: str, device: DeviceInfo | None, request: CheckDevices) -> CheckedDevice:
        cordon = self._manager.facts.cordons.get(name)
        fault = _fault(cordon)
        others = [lease for lease in self._manager.facts.leases_on(name) if lease.holder != request.job]
        return CheckedDevice(device=name, fault=fault, clear=device is None or bool(others) or is_clear(device))


def _fault(cordon: Cordon | None) -> str:
    return cordon.reason if cordon is not None and cordon.cause == "fault" else ""

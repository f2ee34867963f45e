"""The device_manager: this host's devices, everyone's submissions, and, on one host at a time, the placing of jobs.

Events in: `<prefix>.jobs.submit`. Requests: `jobs.submit`, those of `job_requests`, and
`devices.list|lease|renew|release|drain`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Mapping
from typing import Final

from railbus_device_manager.choosing import choose
from railbus_device_manager.cpu import HostCpus
from railbus_device_manager.inventory import Inventory
from railbus_device_manager.job_requests import JobRequests
from railbus_device_manager.manager import DeviceManager
from railbus_device_manager.nvml import NvmlGpus
from railbus_device_manager.orders import Orders
from railbus_device_manager.placer import Placer
from railbus_device_manager.reports import Reports
from railbus_device_manager.settings import Settings
from railbus_device_manager.submissions import Submissions
from railbus_shared import clock, leases
from railbus_shared.bus.bucket import Bucket
from railbus_shared.bus.consume import consume
from railbus_shared.bus.endpoints import AnyEndpoint, Endpoint
from railbus_shared.contracts.devices import HostReport
from railbus_shared.contracts.jobs import JobSpec
from railbus_shared.contracts.requests import (
    DeviceList,
    DrainHost,
    HeldLeases,
    LeaseDevices,
    Nothing,
)
from railbus_shared.errors import RailbusError, TransientError
from railbus_shared.records import JobRecords
from railbus_shared.service import Context, Description
from railbus_shared.topology import job_consumer
from railbus_shared.waiting import end

logger = logging.getLogger(__name__)

DESCRIPTION: Final = Description("device_manager", "Devices, leases, submissions and placement.")


class DeviceManagerService:
    """One host's device_manager."""

    def __init__(self, context: Context, settings: Settings) -> None:
        self._context = context
        self._settings = settings
        common, bus = context.common, context.bus
        self._host = common.host
        self._inventory = Inventory(
            common.host_id,
            cpus=HostCpus(common.host_id, cpu_slots=settings.cpu_slots),
            gpus=NvmlGpus(common.host_id),
            labels=settings.labels,
        )
        self._scan_problem = "devices not read yet"
        self._manager = DeviceManager()
        self._reports = Reports(bus, self._manager.facts)
        self._records = JobRecords(Bucket(bus, bus.subjects.jobs))
        self._placer = Placer(bus, self._manager, self._reports, context.telemetry, lease_ttl_s=common.lease_ttl_s)
        self._submissions = Submissions(
            bus, self._records, context.telemetry, offered=self._offered, accepted=self._placer.accept
        )
        self._job_requests = JobRequests(
            self._records, self._placer, self._reports, self._submissions, Orders(bus, context.telemetry)
        )

    def endpoints(self) -> list[AnyEndpoint]:
        request = self._context.bus.subjects.request
        return [
            Endpoint("submit", request("jobs", "submit"), JobSpec, self._submissions.submit),
            *self._job_requests.endpoints(self._context.bus.subjects),
            Endpoint("list-devices", request("devices", "list"), Nothing, self._list_devices),
            Endpoint("lease", request("devices", "lease"), LeaseDevices, self._lease),
            Endpoint("renew", request("devices", "renew"), HeldLeases, self._renew),
            Endpoint("release", request("devices", "release"), HeldLeases, self._release),
            Endpoint("drain", request("devices", "drain"), DrainHost, self._drain),
        ]

    async def run(self) -> None:
        """Report this host, take submissions and place jobs, until told to stop."""
        bus = self._context.bus
        bus.on_connection(lambda connected: self._placer.reconnected() if connected else None)
        async with asyncio.TaskGroup() as tasks:
            background = [
                tasks.create_task(self._report()),
                tasks.create_task(self._placer.watch_records()),
                tasks.create_task(self._placer.run(period_s=self._settings.place_s)),
            ]
            await consume(bus, job_consumer(bus.subjects), self._submissions.take, stopping=self._context.stopping)
            await end(*background)

    async def checks(self) -> Mapping[str, str]:
        return {"devices": self._scan_problem}

    # --- this host ---------------------------------------------------------------------------------------------------

    async def _report(self) -> None:
        """Say at every heartbeat what devices this host has."""
        while True:
            period_s = self._context.common.heartbeat_s
            try:
                devices = await asyncio.to_thread(self._inventory.scan)
                self._scan_problem = ""
                report = HostReport(host=self._host, devices=tuple(devices), reported_at=clock.now())
                await self._reports.devices.put(self._host, report.to_map(), ttl_s=max(1, round(5 * period_s)))
            except TransientError as exc:
                logger.warning("not reported", extra={"problem": str(exc)})
            except RailbusError as exc:
                self._scan_problem = str(exc)
                logger.error("devices cannot be read", extra={"problem": str(exc)})  # noqa: TRY400 - it says it all
            await asyncio.sleep(period_s)

    async def _offered(self) -> frozenset[str] | None:
        """Entrypoints that some runner offers, looked at anew."""
        with contextlib.suppress(TransientError):
            await self._reports.refresh()
        runners = self._manager.facts.runners.values()
        return frozenset(name for runner in runners for name in runner.entrypoints) if runners else None

    # --- devices -----------------------------------------------------------------------------------------------------

    async def _list_devices(self, _: Nothing) -> DeviceList:
        await self._reports.refresh()
        return DeviceList(
            devices=tuple(self._manager.device_states()),
            hosts=tuple(self._manager.facts.hosts.values()),
            runners=tuple(self._manager.facts.runners.values()),
        )

    async def _lease(self, request: LeaseDevices) -> HeldLeases:
        await self._reports.refresh()
        devices = choose(request.devices, self._manager.device_states())
        held = await leases.grant(
            self._reports.leases, devices, holder=request.holder, lease_epoch=0, ttl_s=request.ttl_s
        )
        for one in held:
            self._context.telemetry.event("device.leased", device=one.lease.device, holder=request.holder)
        return HeldLeases(leases=held, ttl_s=request.ttl_s)

    async def _renew(self, request: HeldLeases) -> HeldLeases:
        held = await leases.renew(self._reports.leases, request.leases, ttl_s=request.ttl_s)
        return HeldLeases(leases=held, ttl_s=request.ttl_s)

    async def _release(self, request: HeldLeases) -> Nothing:
        await leases.release(self._reports.leases, request.leases)
        for one in request.leases:
            self._context.telemetry.event("device.released", device=one.lease.device, holder=one.lease.holder)
        self._placer.nudge()
        return Nothing()

    async def _drain(self, request: DrainHost) -> Nothing:
        key = f"{request.host}.drain"
        if request.draining:
            await self._reports.devices.put(key, {"host": request.host})
        else:
            await self._reports.devices.remove(key)
        self._context.telemetry.event("host.drained" if request.draining else "host.undrained", host_id=request.host)
        self._placer.nudge()
        return Nothing()

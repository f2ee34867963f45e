"""The device_manager: this host's devices, everyone's submissions, and, on one host at a time, the placing of jobs.

Events in: `<prefix>.jobs.submit`. Requests: `jobs.submit`, and those of `job_requests`, `device_requests` and
`host_devices`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Mapping
from typing import Final

from railbus_device_manager.checks import Checks
from railbus_device_manager.cluster import Policy
from railbus_device_manager.cpu import HostCpus
from railbus_device_manager.device_requests import DeviceRequests
from railbus_device_manager.explaining import Explaining
from railbus_device_manager.fitting import check_fits
from railbus_device_manager.host_devices import HostDevices
from railbus_device_manager.inventory import GpuSource, Inventory
from railbus_device_manager.job_requests import JobRequests
from railbus_device_manager.ledger import Ledger
from railbus_device_manager.manager import ClusterFacts, DeviceManager
from railbus_device_manager.measures import Measures, Shown
from railbus_device_manager.nvml import NvmlGpus
from railbus_device_manager.orders import Orders
from railbus_device_manager.placer import Placer
from railbus_device_manager.reports import Reports
from railbus_device_manager.settings import Settings
from railbus_device_manager.submissions import Submissions
from railbus_shared import clock
from railbus_shared.bus.bucket import Bucket
from railbus_shared.bus.consume import consume
from railbus_shared.bus.endpoints import AnyEndpoint, Endpoint
from railbus_shared.contracts.jobs import JobSpec
from railbus_shared.errors import TransientError
from railbus_shared.records import JobRecords
from railbus_shared.service import Context, Description
from railbus_shared.topology import job_consumer
from railbus_shared.waiting import end

logger = logging.getLogger(__name__)

DESCRIPTION: Final = Description("device_manager", "Devices, leases, submissions and placement.")
_SUBMISSIONS_AT_ONCE: Final = 128
_REPORT_LIVES: Final = 5
"""Heartbeats after which a report is forgotten that was not renewed."""


def policy(settings: Settings) -> Policy:
    """What the operator decided about the queue."""
    return Policy(
        quotas=settings.quotas,
        weights=settings.fair_share_weights,
        preempts=settings.preempt,
        preempt_after_s=settings.preempt_after_s,
    )


def _facts(settings: Settings) -> ClusterFacts:
    wall_offset_s = clock.now_ns() / clock.NS_PER_S - clock.boottime_s()
    return ClusterFacts(ledger=Ledger(half_life_s=settings.fair_share_half_life_s, wall_offset_s=wall_offset_s))


class DeviceManagerService:
    """One host's device_manager."""

    def __init__(self, context: Context, settings: Settings, *, gpus: GpuSource | None = None) -> None:
        """`gpus` are read instead of NVML's, where they are given."""
        self._context = context
        self._settings = settings
        common, bus = context.common, context.bus
        inventory = Inventory(
            common.host_id,
            cpus=HostCpus(common.host_id, cpu_slots=settings.cpu_slots),
            gpus=gpus or NvmlGpus(common.host_id),
            labels=settings.labels,
            gpu_shares=settings.gpu_shares,
        )
        self._manager = DeviceManager(_facts(settings), policy(settings))
        self._began_s = clock.boottime_s()
        self._reports = Reports(bus, self._manager.facts, lease_ttl_s=common.lease_ttl_s)
        self._host_devices = HostDevices(
            context, inventory, self._reports, self._manager, tolerates_strangers=settings.tolerate_strangers
        )
        self._records = JobRecords(Bucket(bus, bus.subjects.jobs))
        measures = Measures.of(context.metrics)
        context.telemetry.heard = measures.heard
        self._placer = Placer(
            bus,
            self._manager,
            self._reports,
            context.telemetry,
            lease_ttl_s=common.lease_ttl_s,
            placed=measures.placed,
        )
        self._shown = Shown(bus, self._manager.facts, self._placer, self._host_devices)
        self._shown.join(context.metrics)
        checks = Checks(bus, offered=self._offered, check_fits=self._check_fits)
        self._submissions = Submissions(
            bus, self._records, context.telemetry, refusals=checks.refusals, accepted=self._placer.accept
        )
        self._explaining = Explaining(self._manager, self._records, self._reports, check=checks.check)
        self._job_requests = JobRequests(
            self._records, self._placer, self._reports, self._submissions, Orders(bus, context.telemetry)
        )
        self._devices = DeviceRequests(
            context, self._manager, self._reports, records=self._records, changed=self._placer.nudge
        )

    def endpoints(self) -> list[AnyEndpoint]:
        request = self._context.bus.subjects.request
        return [
            Endpoint("submit", request("jobs", "submit"), JobSpec, self._submissions.submit),
            *self._job_requests.endpoints(self._context.bus.subjects),
            *self._explaining.endpoints(self._context.bus.subjects),
            *self._devices.endpoints(),
            *self._host_devices.endpoints(),
        ]

    async def run(self) -> None:
        """Report this host, take submissions and place jobs, until told to stop."""
        bus = self._context.bus
        bus.on_connection(lambda connected: self._placer.reconnected() if connected else None)
        async with asyncio.TaskGroup() as tasks:
            background = [
                tasks.create_task(self._host_devices.run()),
                tasks.create_task(self._shown.run()),
                tasks.create_task(self._placer.watch_records()),
                tasks.create_task(self._reports.watch_leases(self._placer.nudge)),
                tasks.create_task(self._reports.watch_devices(self._placer.nudge)),
                tasks.create_task(self._placer.run(period_s=self._settings.place_s)),
            ]
            await consume(
                bus,
                job_consumer(bus.subjects),
                self._submissions.take,
                stopping=self._context.stopping,
                batch=_SUBMISSIONS_AT_ONCE,
            )
            await end(*background)

    async def checks(self) -> Mapping[str, str]:
        return {"devices": self._host_devices.problem}

    async def _offered(self, believed_s: float) -> frozenset[str] | None:
        """Entrypoints that some runner offers, looked at anew unless that was done so many seconds ago."""
        with contextlib.suppress(TransientError):
            await self._reports.refresh(older_than_s=believed_s)
        runners = self._manager.facts.runners.values()
        return frozenset(name for runner in runners for name in runner.entrypoints) if runners else None

    def _check_fits(self, spec: JobSpec) -> None:
        """Refuse what no host has; not before every host that is there has had time to report."""
        has_heard_all = clock.boottime_s() - self._began_s >= _REPORT_LIVES * self._context.common.heartbeat_s
        if has_heard_all and not spec.wait_for_hosts:
            check_fits(spec, self._manager.facts.known_devices(), self._manager.facts.runners)

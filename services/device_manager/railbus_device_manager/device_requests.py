"""What people ask of devices: to list them, to lease some by hand, to cordon one, to drain a host.

Requests: `devices.list|lease|renew|release|cordon|drain`. A lease by hand takes devices that are free now, before the
queue where it is quicker; it is never taken away again before it ends.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

from railbus_device_manager.choosing import choose
from railbus_device_manager.manager import DeviceManager
from railbus_device_manager.reports import Reports
from railbus_device_manager.sharing import shares_needed
from railbus_device_manager.submissions import OWN_ID
from railbus_shared import clock, leases
from railbus_shared.bus.endpoints import AnyEndpoint, Endpoint
from railbus_shared.contracts.devices import Cordon, HeldLease
from railbus_shared.contracts.requests import (
    CordonDevice,
    DeviceList,
    DeviceState,
    DrainedHost,
    DrainHost,
    HeldLeases,
    LeaseDevices,
    Nothing,
    RevokeLease,
)
from railbus_shared.errors import InvalidField, JobNotFound, LeaseLost, NotFound
from railbus_shared.records import JobRecords
from railbus_shared.service import Context
from railbus_shared.telemetry import About


class DeviceRequests:
    """Answers about devices."""

    def __init__(
        self,
        context: Context,
        manager: DeviceManager,
        reports: Reports,
        *,
        records: JobRecords,
        changed: Callable[[], None],
    ) -> None:
        """`changed` is called when a device may have become free."""
        self._context = context
        self._manager = manager
        self._reports = reports
        self._records = records
        self._changed = changed

    def endpoints(self) -> list[AnyEndpoint]:
        request = self._context.bus.subjects.request
        return [
            Endpoint("list-devices", request("devices", "list"), Nothing, self._list),
            Endpoint("lease", request("devices", "lease"), LeaseDevices, self._lease),
            Endpoint("renew", request("devices", "renew"), HeldLeases, self._renew),
            Endpoint("release", request("devices", "release"), HeldLeases, self._release),
            Endpoint("revoke", request("devices", "revoke"), RevokeLease, self._revoke),
            Endpoint("cordon", request("devices", "cordon"), CordonDevice, self._cordon),
            Endpoint("drain", request("devices", "drain"), DrainHost, self._drain),
        ]

    async def _list(self, _: Nothing) -> DeviceList:
        await self._reports.refresh()
        return DeviceList(
            devices=tuple(self._manager.device_states()),
            hosts=tuple(self._manager.facts.hosts.values()),
            runners=tuple(self._manager.facts.runners.values()),
        )

    # --- leases by hand ----------------------------------------------------------------------------------------------

    async def _lease(self, request: LeaseDevices) -> HeldLeases:
        await self._check_holder(request.holder)
        await self._reports.refresh()
        states = [one for one in self._manager.device_states() if request.host in {None, one.device.host}]
        devices = choose(request.devices, states)
        shares = shares_needed(devices[0], request.devices) if request.devices.sharing == "fraction" else None
        held = await leases.grant(
            self._reports.leases, devices, holder=request.holder, lease_epoch=0, ttl_s=request.ttl_s, shares=shares
        )
        for device in devices:
            self._context.telemetry.event("device.leased", device=device.id, holder=request.holder)
        return HeldLeases(leases=held, ttl_s=request.ttl_s)

    async def _check_holder(self, holder: str) -> None:
        """A lease of somebody who is called as a job is would pass for the job's."""
        if not OWN_ID.match(holder):
            try:
                await self._records.get(holder)
            except JobNotFound:
                return
        raise InvalidField(field="holder", value=holder, problem="this is a job's id", hint="use a name of your own")

    async def _renew(self, request: HeldLeases) -> HeldLeases:
        _check_by_hand(request)
        held = await leases.by_hand(self._reports.leases, request.leases)
        held = await leases.renew(self._reports.leases, held, ttl_s=request.ttl_s)
        return HeldLeases(leases=held, ttl_s=request.ttl_s)

    async def _release(self, request: HeldLeases) -> Nothing:
        _check_by_hand(request)
        held: list[HeldLease] = []
        for one in request.leases:
            with contextlib.suppress(LeaseLost):  # it has ended before
                held += await leases.by_hand(self._reports.leases, [one])
        await leases.release(self._reports.leases, held)
        for device, holder in {(one.lease.device, one.lease.holder): None for one in held}:
            self._context.telemetry.event("device.released", device=device, holder=holder)
        self._changed()
        return Nothing()

    async def _revoke(self, request: RevokeLease) -> Nothing:
        """End what somebody holds by hand; who still uses it learns that at the next renewal."""
        ended = await leases.revoke(self._reports.leases, request.holder)
        if not ended:
            raise NotFound(
                f"field 'holder' has value {request.holder!r}: nothing is held by hand under this name",
                hint="`railbus lease list` shows who holds what; a job's devices come free with `railbus cancel`",
                details={"field": "holder", "value": request.holder},
            )
        for device in dict.fromkeys(lease.device for lease in ended):
            self._context.telemetry.event("device.released", device=device, holder=request.holder, revoked=True)
        self._changed()
        return Nothing()

    # --- taking devices out of service -------------------------------------------------------------------------------

    async def _cordon(self, request: CordonDevice) -> DeviceState:
        """Keep a device from being granted, or lift that; what runs on it goes on."""
        await self._reports.refresh()
        self._state(request.device)
        key = f"{request.device}.cordon"
        data = {"device": request.device, "reason": request.reason, "by": request.by}
        if request.cordoned:
            cordon = Cordon(
                device=request.device,
                reason=request.reason or f"cordoned by {request.by}",
                by=request.by,
                cordoned_at=clock.now(),
            )
            await self._reports.devices.put(key, cordon.to_map())
            self._context.telemetry.record("device.cordoned", {**data, "cause": cordon.cause}, about=About())
        else:
            await self._reports.devices.remove(key)
            self._context.telemetry.record("device.uncordoned", data, about=About())
        await self._reports.refresh()
        self._changed()
        return self._state(request.device)

    def _state(self, device: str) -> DeviceState:
        for state in self._manager.device_states():
            if state.device.id == device:
                return state
        raise NotFound(
            f"field 'device' has value {device!r}: no host that is known has it",
            hint="`railbus devices` lists them; one whose host is away can be cordoned once it is back",
            details={"field": "device", "value": device},
        )

    async def _drain(self, request: DrainHost) -> DrainedHost:
        """Have a host take no new jobs, or take them again; what runs there goes on, and is named."""
        key = f"{request.host}.drain"
        running = sorted(
            job.id for job in self._manager.facts.jobs.values() if job.is_active and job.host == request.host
        )
        if request.draining != (await self._reports.devices.get(key) is not None):  # else only asked how far it is
            if request.draining:
                await self._reports.devices.put(key, {"host": request.host})
            else:
                await self._reports.devices.remove(key)
            what = "host.drained" if request.draining else "host.undrained"
            self._context.telemetry.event(what, host_id=request.host, jobs=running)
            self._changed()
        return DrainedHost(host=request.host, draining=request.draining, jobs=tuple(running))


def _check_by_hand(request: HeldLeases) -> None:
    """A job's leases are its runner's; raises InvalidField for one."""
    for one in request.leases:
        if one.lease.lease_epoch:
            raise InvalidField(
                field="leases",
                value=one.lease.holder,
                problem="this lease is a job's, and its runner renews it",
                hint="cancel the job to free its devices",
            )

"""Devices for a lease by hand: those that are free now, or none."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

from railbus_device_manager.sharing import has_room
from railbus_device_manager.wishes import fits
from railbus_shared.contracts.devices import DeviceInfo
from railbus_shared.contracts.jobs import DevicePreference
from railbus_shared.contracts.requests import DeviceState
from railbus_shared.errors import NoFreeDevice


def choose(wanted: DevicePreference, states: Iterable[DeviceState]) -> tuple[DeviceInfo, ...]:
    """Free devices of one host that meet the preference, the first kind that can; raises NoFreeDevice."""
    by_kind: dict[tuple[str, str], list[DeviceInfo]] = defaultdict(list)
    for state in states:
        if has_room(state, wanted) and fits(state.device, wanted):
            by_kind[state.device.kind, state.device.host].append(state.device)
    for kind in wanted.kind:
        for (found, _), devices in sorted(by_kind.items()):
            if found == kind and len(devices) >= wanted.count:
                return tuple(devices[: wanted.count])
    raise NoFreeDevice(
        f"no host has {wanted.count} free {' or '.join(wanted.kind)} devices as wanted", hint="see `railbus devices`"
    )

"""GPUs that several jobs share by memory: how many shares a job needs, and how many a device has to give."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

from railbus_shared.contracts.devices import DeviceInfo, Lease
from railbus_shared.contracts.jobs import DevicePreference
from railbus_shared.contracts.requests import DeviceState

_ROUNDING: Final = 1e-9  # 0.3 × 10 is a little more than 3


def shares_needed(device: DeviceInfo, wanted: DevicePreference) -> int:
    """All of them, or for a job that shares as many as hold its fraction of the memory; 1 of what is not shared."""
    if wanted.fraction is None:
        return device.shares
    return max(1, math.ceil(wanted.fraction * device.shares - _ROUNDING))


def has_room(state: DeviceState, wanted: DevicePreference) -> bool:
    """Whether a job could have the device, or its part of it, now."""
    if state.state != "free":
        return False
    return state.device.shares == 1 or state.free_shares >= shares_needed(state.device, wanted)


def free_shares(device: DeviceInfo, leases: Sequence[Lease]) -> int:
    """Shares of a device that nobody has; none of one that somebody has leased under another division."""
    if any(lease.shares != device.shares for lease in leases):
        return 0
    return device.shares - len(leases)


def division(leases: Sequence[Lease], *, wanted: int) -> int:
    """Into how many shares a GPU is divided: as it was when what is leased of it was granted, else as the setting says.

    Two divisions have different keys, which compare-and-set could not hold apart.
    """
    return leases[0].shares if leases else wanted

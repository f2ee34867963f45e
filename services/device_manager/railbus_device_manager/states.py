"""Who has a device, and whether it may be granted: one word for each device."""

from __future__ import annotations

from collections.abc import Sequence

from railbus_device_manager.sharing import free_shares
from railbus_shared.contracts.devices import DeviceInfo, Lease, ReclaimMark
from railbus_shared.contracts.jobs import JobRecord
from railbus_shared.contracts.requests import DeviceState, RetiredWord


def device_state(
    device: DeviceInfo,
    *,
    draining: bool,
    leases: Sequence[Lease],
    mark: ReclaimMark | None,
    named: Sequence[JobRecord],
) -> DeviceState:
    """Leased, else reclaiming, else cordoned, else unhealthy, else draining, else free.

    `named` are the active records that name the device. One without a live lease on it keeps it from being granted, as
    a mark does. A device on which processes compute although nobody has it is reclaiming without a holder. One that is
    shared is leased once no share is left. `retired` says of every one whether it is granted to nobody afterwards.
    """
    free = free_shares(device, leases)
    holders = tuple(dict.fromkeys(lease.holder for lease in leases)) if leases else ()
    shown = holders if device.shares > 1 else ()
    word = _retired(device, draining=draining)
    if leases and free == 0:
        return DeviceState(device=device, state="leased", holder=leases[0].holder, holders=shown, retired=word)
    lapsed = next((record.id for record in named if record.id not in holders), None)
    if lapsed is not None or mark is not None:
        holder = lapsed or (mark.job if mark is not None else None)
        return DeviceState(device=device, state="reclaiming", holder=holder, holders=shown, retired=word)
    if word is not None:
        return DeviceState(device=device, state=word, holders=shown, retired=word)
    if device.compute_pids and not leases:
        return DeviceState(device=device, state="reclaiming", holders=shown)
    return DeviceState(device=device, state="free", holders=shown, free_shares=free if device.shares > 1 else 0)


def _retired(device: DeviceInfo, *, draining: bool) -> RetiredWord | None:
    if device.cordoned:
        return "cordoned"
    if not device.healthy:
        return "unhealthy"
    return "draining" if draining else None

"""Leases: created once by compare-and-set, several all or nothing, with a time-to-live; renewed and ended by revision.

A renewal that finds another revision has lost its lease; it can never bring a lapsed one back to life. Every write
states the time-to-live anew, for a write without one would make the lease immortal.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from railbus_shared import clock
from railbus_shared.bus.bucket import Bucket, Write, nonce
from railbus_shared.contracts.devices import DeviceInfo, HeldLease, Lease
from railbus_shared.errors import LeaseLost, NoFreeDevice, RequestTimeout, RevisionConflict

_MAX_TRIES: Final = 3


async def grant(
    bucket: Bucket, devices: Sequence[DeviceInfo], *, holder: str, lease_epoch: int, ttl_s: int
) -> tuple[HeldLease, ...]:
    """Lease all devices or none.

    Raises NoFreeDevice if any of them is taken, RequestTimeout or BusUnavailable if nothing is known.
    """
    word = nonce()
    leases = [
        Lease(device=d.id, host=d.host, holder=holder, lease_epoch=lease_epoch, nonce=word, granted_at=clock.now())
        for d in devices
    ]
    try:
        changes = [
            Write(lease.device, lease.to_map(), await _free_revision(bucket, lease.device), ttl_s) for lease in leases
        ]
        revisions = await bucket.write_all(changes)
    except RevisionConflict as exc:
        raise NoFreeDevice(
            f"a device of {', '.join(repr(d.id) for d in devices)} was taken in the meantime", hint="ask again"
        ) from exc
    except RequestTimeout as exc:
        try:
            return await _mine(bucket, leases)
        except LeaseLost:
            raise exc from None  # it may yet be stored, and lapses then by itself
    return tuple(HeldLease(lease=lease, revision=rev) for lease, rev in zip(leases, revisions, strict=True))


async def renew(bucket: Bucket, held: Sequence[HeldLease], *, ttl_s: int) -> tuple[HeldLease, ...]:
    """Give all leases their full life again, all or none.

    Raises LeaseLost, and RequestTimeout or BusUnavailable if nothing is known. Only an acknowledged write counts as a
    renewal: that a lease is still there does not tell for how long.
    """
    for _ in range(_MAX_TRIES):
        changes = [Write(h.lease.device, h.lease.to_map(), h.revision, ttl_s) for h in held]
        try:
            revisions = await bucket.write_all(changes)
        except (RevisionConflict, RequestTimeout):  # an earlier write of ours may have been stored after all
            held = await _mine(bucket, [h.lease for h in held])
            continue
        return tuple(HeldLease(lease=h.lease, revision=rev) for h, rev in zip(held, revisions, strict=True))
    raise RequestTimeout(f"the lease on {_devices(held)} could not be renewed", hint="try again")


async def regrant(bucket: Bucket, held: Sequence[HeldLease], *, ttl_s: int) -> tuple[HeldLease, ...]:
    """Lease again what has lapsed and was granted to nobody since; raises LeaseLost.

    For a holder whose job record still names it, after NATS was away for longer than the leases lived.
    """
    try:
        changes = [
            Write(h.lease.device, h.lease.to_map(), await _free_revision(bucket, h.lease.device, nonce_of=h), ttl_s)
            for h in held
        ]
        revisions = await bucket.write_all(changes)
    except (RevisionConflict, NoFreeDevice) as exc:
        raise _lost(held) from exc
    except RequestTimeout:
        return await renew(bucket, await _mine(bucket, [h.lease for h in held]), ttl_s=ttl_s)
    return tuple(HeldLease(lease=h.lease, revision=rev) for h, rev in zip(held, revisions, strict=True))


async def release(bucket: Bucket, held: Sequence[HeldLease]) -> None:
    """End leases; one that is no longer the holder's is left alone."""
    for one in held:
        entry = await bucket.get(one.lease.device)
        if entry is None or entry.value is None or Lease.parse(entry.value).nonce != one.lease.nonce:
            continue
        try:
            await bucket.write(Write(one.lease.device, None, entry.revision))
        except RevisionConflict:
            continue  # it lapsed between the look and the write, which is what was wanted


async def _free_revision(bucket: Bucket, device: str, *, nonce_of: HeldLease | None = None) -> int:
    """The revision on which a lease of the device can be written; raises NoFreeDevice if someone has it."""
    entry = await bucket.get_with_deleted(device)
    if entry is None:
        return 0
    if entry.value is None:
        if nonce_of is not None and entry.revision > nonce_of.revision:
            raise NoFreeDevice(f"the lease on {device!r} was ended, by its holder or by a later one")
        return entry.revision
    lease = Lease.parse(entry.value)
    if nonce_of is not None and lease.nonce == nonce_of.lease.nonce:
        return entry.revision
    raise NoFreeDevice(f"device {device!r} is leased to {lease.holder!r}", hint="see `railbus devices`")


async def _mine(bucket: Bucket, leases: Sequence[Lease]) -> tuple[HeldLease, ...]:
    """After a lost acknowledgement: the leases as they stand, if all of them are ours; raises LeaseLost."""
    held: list[HeldLease] = []
    for lease in leases:
        entry = await bucket.get(lease.device)
        if entry is None or entry.value is None or Lease.parse(entry.value).nonce != lease.nonce:
            raise _lost([HeldLease(lease=one, revision=0) for one in leases])
        held.append(HeldLease(lease=lease, revision=entry.revision))
    return tuple(held)


def _lost(held: Sequence[HeldLease]) -> LeaseLost:
    return LeaseLost(f"the lease on {_devices(held)} has expired or is someone else's", hint="stop using the devices")


def _devices(held: Sequence[HeldLease]) -> str:
    return ", ".join(repr(h.lease.device) for h in held)

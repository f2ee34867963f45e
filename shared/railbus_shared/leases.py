"""Leases: created once by compare-and-set, several all or nothing, with a time-to-live; renewed and ended by revision.

A renewal that finds another revision has lost its lease; it can never bring a lapsed one back to life. Every write
states the time-to-live anew, for a write without one would make the lease immortal.

A GPU that is shared has a key for each of its shares. A part of it is some of the keys, the whole of it is all of them
in one batch, so compare-and-set keeps the one from being granted beside the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from railbus_shared import clock
from railbus_shared.bus.bucket import Bucket, Write, nonce
from railbus_shared.contracts.devices import DeviceInfo, HeldLease, Lease, lease_key
from railbus_shared.errors import LeaseLost, NoFreeDevice, RequestTimeout, RevisionConflict, WireError

_MAX_TRIES: Final = 3


async def grant(
    bucket: Bucket,
    devices: Sequence[DeviceInfo],
    *,
    holder: str,
    lease_epoch: int,
    ttl_s: int,
    shares: int | None = None,
) -> tuple[HeldLease, ...]:
    """Lease all devices or none: each as a whole, or `shares` of the shares of each.

    Raises NoFreeDevice if any of them is taken, RequestTimeout or BusUnavailable if nothing is known.
    """
    word, now = nonce(), clock.now()
    leases: list[Lease] = []
    changes: list[Write] = []
    for device in devices:
        for share, revision in await _free_keys(bucket, device, shares):
            lease = Lease(
                device=device.id,
                host=device.host,
                holder=holder,
                lease_epoch=lease_epoch,
                share=share,
                shares=device.shares,
                nonce=word,
                granted_at=now,
            )
            leases.append(lease)
            changes.append(Write(lease.key, lease.to_map(), revision, ttl_s))
    try:
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


async def _free_keys(bucket: Bucket, device: DeviceInfo, wanted: int | None) -> list[tuple[int, int]]:
    """Shares that can be leased, with the revisions of their keys; raises NoFreeDevice if they are too few.

    A mark is looked at here as well: whoever asks may have read it before it was put.
    """
    try:
        is_marked = await bucket.get(reclaim_key(device.id)) is not None
    except WireError:  # who put it meant something
        is_marked = True
    if is_marked:
        raise NoFreeDevice(f"device {device.id!r} is being reclaimed", hint="see `railbus devices`")
    if device.shares == 1:
        return [(0, await _free_revision(bucket, lease_key(device.id, 0)))]
    found: list[tuple[int, int]] = []
    taken: NoFreeDevice | None = None
    needed = device.shares if wanted is None else wanted
    for share in range(1, device.shares + 1):
        try:
            found.append((share, await _free_revision(bucket, lease_key(device.id, share))))
        except NoFreeDevice as exc:
            taken = exc
        if len(found) == needed:
            return found
    raise taken or NoFreeDevice(
        f"device {device.id!r} has {device.shares} shares, not {needed}", hint="see `railbus devices`"
    )


async def leases_of(bucket: Bucket, *, holder: str, lease_epoch: int) -> list[HeldLease]:
    """Every live lease of one attempt, whatever devices and shares; one request."""
    wanted = {"holder": holder, "lease_epoch": lease_epoch}
    return [
        HeldLease(lease=Lease.parse(entry.value), revision=entry.revision)
        for key, entry in (await bucket.snapshot()).items()
        if entry.value is not None and is_lease_key(key) and wanted.items() <= entry.value.items()
    ]


def reclaim_key(device: str) -> str:
    """Of the mark that keeps a device from being granted."""
    return f"{device}.reclaim"


def is_lease_key(key: str) -> bool:
    """Whether a key of the bucket is a lease, of a device or of a share, and not a mark."""
    _, dot, suffix = key.partition(".")
    return not dot or suffix.isdecimal()


async def renew(bucket: Bucket, held: Sequence[HeldLease], *, ttl_s: int) -> tuple[HeldLease, ...]:
    """Give all leases their full life again, all or none.

    Raises LeaseLost, and RequestTimeout or BusUnavailable if nothing is known. Only an acknowledged write counts as a
    renewal: that a lease is still there does not tell for how long.
    """
    for _ in range(_MAX_TRIES):
        changes = [Write(h.lease.key, h.lease.to_map(), h.revision, ttl_s) for h in held]
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
            Write(h.lease.key, h.lease.to_map(), await _free_revision(bucket, h.lease.key, nonce_of=h), ttl_s)
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
        entry = await bucket.get(one.lease.key)
        if entry is None or entry.value is None or Lease.parse(entry.value).nonce != one.lease.nonce:
            continue
        try:
            await bucket.write(Write(one.lease.key, None, entry.revision))
        except RevisionConflict:
            continue  # it lapsed between the look and the write, which is what was wanted


async def by_hand(bucket: Bucket, held: Sequence[HeldLease]) -> tuple[HeldLease, ...]:
    """The same leases as the store has them, for it alone says what they are; raises LeaseLost if one is not there.

    One of a job's is not: whoever says it was granted by hand would get it.
    """
    found: list[HeldLease] = []
    for one in held:
        entry = await bucket.get(one.lease.key)
        stored = Lease.parse(entry.value) if entry is not None and entry.value is not None else None
        if entry is None or stored is None or (stored.nonce, stored.lease_epoch) != (one.lease.nonce, 0):
            raise _lost(held)
        found.append(HeldLease(lease=stored, revision=entry.revision))
    return tuple(found)


async def revoke(bucket: Bucket, holder: str) -> tuple[Lease, ...]:
    """End what is held by hand under this name; returns the leases that were. A job's leases are left alone."""
    ended: dict[str, Lease] = {}
    for _ in range(_MAX_TRIES):
        missed = False
        for held in await leases_of(bucket, holder=holder, lease_epoch=0):
            try:
                await bucket.write(Write(held.lease.key, None, held.revision))
                ended[held.lease.key] = held.lease
            except RevisionConflict:
                missed = True  # renewed in between
        if not missed:
            break
    return tuple(ended.values())


async def _free_revision(bucket: Bucket, key: str, *, nonce_of: HeldLease | None = None) -> int:
    """The revision on which a lease can be written; raises NoFreeDevice if someone has it, or it cannot be read."""
    try:
        entry = await bucket.get_with_deleted(key)
        held = Lease.parse(entry.value) if entry is not None and entry.value is not None else None
    except WireError as exc:
        raise NoFreeDevice(f"the lease on {key!r} cannot be read: {exc.message}", hint="end what wrote it") from exc
    if entry is None:
        return 0
    if held is None:
        if nonce_of is not None and entry.revision > nonce_of.revision:
            raise NoFreeDevice(f"the lease on {key!r} was ended, by its holder or by a later one")
        return entry.revision
    if nonce_of is not None and held.nonce == nonce_of.lease.nonce:
        return entry.revision
    raise NoFreeDevice(f"device {held.device!r} is leased to {held.holder!r}", hint="see `railbus devices`")


async def _mine(bucket: Bucket, leases: Sequence[Lease]) -> tuple[HeldLease, ...]:
    """After a lost acknowledgement: the leases as they stand, if all of them are ours; raises LeaseLost."""
    held: list[HeldLease] = []
    for lease in leases:
        entry = await bucket.get(lease.key)
        if entry is None or entry.value is None or Lease.parse(entry.value).nonce != lease.nonce:
            raise _lost([HeldLease(lease=one, revision=0) for one in leases])
        held.append(HeldLease(lease=lease, revision=entry.revision))
    return tuple(held)


def _lost(held: Sequence[HeldLease]) -> LeaseLost:
    return LeaseLost(f"the lease on {_devices(held)} has expired or is someone else's", hint="stop using the devices")


def _devices(held: Sequence[HeldLease]) -> str:
    return ", ".join(dict.fromkeys(repr(h.lease.device) for h in held))

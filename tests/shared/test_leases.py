"""Leases on a real server: one holder at a time, all or nothing, and no answer that the store does not bear out."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence

import pytest

from railbus_shared import leases
from railbus_shared.bus import connection
from railbus_shared.bus.bucket import Bucket, Write
from railbus_shared.bus.connection import Bus, Outgoing
from railbus_shared.contracts.devices import DeviceInfo, HeldLease, Lease
from railbus_shared.errors import LeaseLost, NoFreeDevice, TransientError
from railbus_shared.settings import CommonSettings
from servers import Server
from until import until


def _devices(*numbers: int) -> list[DeviceInfo]:
    return [DeviceInfo(id=f"h-cpu{n}", host="h", kind="cpu", name="cpu", index=n, memory_bytes=1) for n in numbers]


async def _grant(bucket: Bucket, *numbers: int, holder: str = "j-1", ttl_s: int = 60) -> tuple[HeldLease, ...]:
    return await leases.grant(bucket, _devices(*numbers), holder=holder, lease_epoch=1, ttl_s=ttl_s)


async def _holders(bucket: Bucket) -> dict[str, str]:
    found = await bucket.snapshot()
    return {key: Lease.parse(entry.value or {}).holder for key, entry in found.items()}


@pytest.fixture
def bucket(bus: Bus) -> Bucket:
    return Bucket(bus, bus.subjects.leases)


async def test_a_lease_is_granted_renewed_released_and_granted_again(bucket: Bucket) -> None:
    held = await _grant(bucket, 0, 1)
    assert await _holders(bucket) == {"h-cpu0": "j-1", "h-cpu1": "j-1"}
    with pytest.raises(NoFreeDevice, match="'h-cpu1' is leased to 'j-1'"):
        await _grant(bucket, 1, holder="j-2")
    renewed = await leases.renew(bucket, held, ttl_s=60)
    assert [one.lease for one in renewed] == [one.lease for one in held]
    assert all(new.revision > old.revision for new, old in zip(renewed, held, strict=True))
    await leases.release(bucket, renewed)
    assert await _holders(bucket) == {}
    await _grant(bucket, 0, holder="j-2")
    assert await _holders(bucket) == {"h-cpu0": "j-2"}


async def test_several_devices_are_leased_all_or_none(bucket: Bucket) -> None:
    await _grant(bucket, 1)
    with pytest.raises(NoFreeDevice):
        await _grant(bucket, 0, 1, 2, holder="j-2")
    assert await _holders(bucket) == {"h-cpu1": "j-1"}
    with pytest.raises(ValueError, match="at least one"):
        await _grant(bucket)


async def test_a_device_that_is_being_reclaimed_is_not_leased_whoever_has_not_heard_of_it(bucket: Bucket) -> None:
    await bucket.put(leases.reclaim_key("h-cpu1"), {"v": 1})
    with pytest.raises(NoFreeDevice, match="'h-cpu1' is being reclaimed"):
        await _grant(bucket, 0, 1)
    await _grant(bucket, 0)
    await bucket.remove(leases.reclaim_key("h-cpu1"))
    await _grant(bucket, 1)
    assert await _holders(bucket) == {"h-cpu0": "j-1", "h-cpu1": "j-1"}


async def test_a_release_leaves_the_leases_of_others_alone(bucket: Bucket) -> None:
    held = await _grant(bucket, 0)
    await leases.release(bucket, held)
    await _grant(bucket, 0, holder="j-2")
    await leases.release(bucket, held)
    assert await _holders(bucket) == {"h-cpu0": "j-2"}


async def test_eight_racing_claimers_never_lease_a_device_twice(
    common: CommonSettings, bus: Bus, bucket: Bucket
) -> None:
    granted: list[tuple[str, HeldLease]] = []

    async def claim(number: int) -> None:
        choice = random.Random(number)
        async with Bus.open(common, name=f"claimer{number}") as own:
            mine = Bucket(own, own.subjects.leases)
            order = list(range(20))
            choice.shuffle(order)
            for device in order:
                wanted = [device] if choice.random() < 0.7 else [device, (device + 7) % 20]
                try:
                    leased = await _grant(mine, *wanted, holder=f"j-{number}")
                except NoFreeDevice:
                    continue
                granted.extend((f"j-{number}", held) for held in leased)

    await asyncio.gather(*(claim(number) for number in range(8)))
    assert sorted(held.lease.device for _, held in granted) == sorted(f"h-cpu{n}" for n in range(20))
    assert await _holders(bucket) == {held.lease.device: holder for holder, held in granted}
    for holder, held in granted:
        entry = await bucket.get(held.lease.device)
        assert entry is not None
        assert entry.revision == held.revision, holder


# --- shares ----------------------------------------------------------------------------------------------------------


def _gpu(shares: int, number: int = 0) -> DeviceInfo:
    return _devices(number)[0].changed(id=f"h-gpu{number}", kind="gpu", shares=shares)


async def _part(bucket: Bucket, holder: str, shares: int | None, *, of: int = 4) -> tuple[HeldLease, ...]:
    return await leases.grant(bucket, [_gpu(of)], holder=holder, lease_epoch=1, ttl_s=60, shares=shares)


async def test_parts_of_a_gpu_are_leased_side_by_side_and_the_whole_only_alone(bucket: Bucket) -> None:
    one = await _part(bucket, "j-1", 1)
    three = await _part(bucket, "j-2", 3)
    assert await _holders(bucket) == {"h-gpu0.1": "j-1", **{f"h-gpu0.{n}": "j-2" for n in (2, 3, 4)}}
    for shares in (1, None):
        with pytest.raises(NoFreeDevice, match="'h-gpu0' is leased to"):
            await _part(bucket, "j-3", shares)
    await leases.release(bucket, three)
    with pytest.raises(NoFreeDevice):
        await _part(bucket, "j-3", None)
    assert await _holders(bucket) == {"h-gpu0.1": "j-1"}
    await leases.release(bucket, one)
    whole = await _part(bucket, "j-3", None)
    assert [held.lease.share for held in whole] == [1, 2, 3, 4]
    with pytest.raises(NoFreeDevice):
        await _part(bucket, "j-1", 1)


async def test_more_shares_than_a_gpu_has_are_never_granted(bucket: Bucket) -> None:
    with pytest.raises(NoFreeDevice, match="has 4 shares, not 5"):
        await _part(bucket, "j-1", 5)
    assert await _holders(bucket) == {}


async def test_leases_of_shares_are_renewed_taken_up_again_and_found_together(bucket: Bucket) -> None:
    held = await leases.grant(bucket, [_gpu(3, 0), _gpu(3, 1)], holder="j-1", lease_epoch=7, ttl_s=60)
    held = await leases.renew(bucket, held, ttl_s=1)
    for one in held:
        await _until_gone(bucket, one.lease.key)
    again = await leases.regrant(bucket, held, ttl_s=60)
    await _part(bucket, "j-2", 1, of=8)
    await bucket.put("h-gpu0.reclaim", {"v": 1})
    found = await leases.leases_of(bucket, holder="j-1", lease_epoch=7)
    assert {one.lease.key: one.revision for one in found} == {one.lease.key: one.revision for one in again}
    assert await leases.leases_of(bucket, holder="j-1", lease_epoch=6) == []


async def test_racing_for_parts_and_the_whole_never_gives_more_than_there_is(common: CommonSettings, bus: Bus) -> None:
    """Eight claimers want a quarter, half or all of one GPU; the store's history tells who had what at every moment."""
    granted: list[HeldLease] = []

    async def claim(number: int) -> None:
        choice = random.Random(number)
        async with Bus.open(common, name=f"claimer{number}") as own:
            mine = Bucket(own, own.subjects.leases)
            for _ in range(12):
                try:
                    held = await _part(mine, f"j-{number}", choice.choice((1, 2, None)))
                except NoFreeDevice:
                    continue
                granted.extend(held)
                holders = (await _holders(mine)).values()
                assert len(held) < 4 or set(holders) == {f"j-{number}"}
                await leases.release(mine, held)

    await asyncio.gather(*(claim(number) for number in range(8)))
    assert granted
    assert len({(held.lease.key, held.revision) for held in granted}) == len(granted)


async def _until_gone(bucket: Bucket, device: str) -> None:
    async def gone() -> bool:
        return await bucket.get(device) is None

    await until(gone)


async def test_an_expired_lease_cannot_be_renewed_but_be_taken_up_again_if_nobody_has_it(bucket: Bucket) -> None:
    held = await _grant(bucket, 0, 1, ttl_s=1)
    await _until_gone(bucket, "h-cpu0")
    await _until_gone(bucket, "h-cpu1")
    with pytest.raises(LeaseLost):
        await leases.renew(bucket, held, ttl_s=60)
    assert await _holders(bucket) == {}
    again = await leases.regrant(bucket, held, ttl_s=60)
    assert [one.lease for one in again] == [one.lease for one in held]
    assert await _holders(bucket) == {"h-cpu0": "j-1", "h-cpu1": "j-1"}
    await leases.renew(bucket, again, ttl_s=60)


async def test_a_lease_that_others_have_or_had_since_is_not_taken_up_again(bucket: Bucket) -> None:
    held = await _grant(bucket, 0, 1, ttl_s=1)
    await _until_gone(bucket, "h-cpu0")
    await _until_gone(bucket, "h-cpu1")
    other = await _grant(bucket, 1, holder="j-2")
    with pytest.raises(LeaseLost):
        await leases.regrant(bucket, held, ttl_s=60)
    assert await _holders(bucket) == {"h-cpu1": "j-2"}
    await leases.release(bucket, other)
    with pytest.raises(LeaseLost):
        await leases.regrant(bucket, held, ttl_s=60)
    assert await _holders(bucket) == {}


async def test_a_renewal_with_an_old_revision_finds_its_own_newer_one(bucket: Bucket) -> None:
    held = await _grant(bucket, 0, 1)
    newer = await leases.renew(bucket, held, ttl_s=60)  # as if its acknowledgement had been lost
    newest = await leases.renew(bucket, held, ttl_s=60)
    assert all(new.revision > old.revision for new, old in zip(newest, newer, strict=True))


async def test_renewal_keeps_a_lease_and_keeps_it_mortal(bucket: Bucket) -> None:
    held = await _grant(bucket, 0, ttl_s=3)
    held = await leases.renew(bucket, held, ttl_s=60)
    await _grant(bucket, 1, ttl_s=3)  # ends after the other would have
    await _until_gone(bucket, "h-cpu1")
    assert await bucket.get("h-cpu0") is not None
    await leases.renew(bucket, held, ttl_s=1)
    await _until_gone(bucket, "h-cpu0")


class _Unheard(Bucket):
    """Whose first write is acknowledged only after it has been given up."""

    def __init__(self, bus: Bus, server: Server) -> None:
        super().__init__(bus, bus.subjects.leases)
        self._server = server
        self.num_writes = 0

    async def write_all(self, changes: Sequence[Write]) -> list[int]:
        self.num_writes += 1
        if self.num_writes > 1:
            return await super().write_all(changes)
        self._server.pause()
        try:
            with pytest.MonkeyPatch.context() as impatient:
                impatient.setattr(connection, "_PUBLISH_TIMEOUT_S", 0.5)
                return await super().write_all(changes)
        finally:
            self._server.resume()


@pytest.mark.parametrize("devices", [(0,), (0, 1)])
async def test_a_grant_whose_acknowledgement_is_lost_ends_in_an_answer_that_is_true(
    bus: Bus, server: Server, devices: tuple[int, ...]
) -> None:
    bucket = _Unheard(bus, server)
    try:
        held = await _grant(bucket, *devices)
    except TransientError:
        held = ()  # nothing is known, and the lease lapses by itself if it has been stored
    assert bucket.num_writes == 1
    found = await bucket.snapshot()
    assert all(found[one.lease.device].revision == one.revision for one in held)
    if held:
        await leases.renew(bucket, held, ttl_s=60)


async def test_a_renewal_whose_acknowledgement_is_lost_ends_in_an_answer_that_is_true(
    bus: Bus, bucket: Bucket, server: Server
) -> None:
    held = await _grant(bucket, 0, 1)
    unheard = _Unheard(bus, server)
    renewed = await leases.renew(unheard, held, ttl_s=60)
    assert unheard.num_writes > 1
    found = await bucket.snapshot()
    assert [found[one.lease.device].revision for one in renewed] == [one.revision for one in renewed]
    assert all(new.revision > old.revision for new, old in zip(renewed, held, strict=True))
    await leases.renew(bucket, renewed, ttl_s=60)


async def test_what_is_held_by_hand_can_be_revoked_by_its_name_and_jobs_leases_cannot(bucket: Bucket) -> None:
    by_hand = await leases.grant(bucket, _devices(0, 1), holder="ann", lease_epoch=0, ttl_s=60)
    await leases.grant(bucket, _devices(2), holder="ben", lease_epoch=0, ttl_s=60)
    await _grant(bucket, 3, holder="j-1")
    assert {one.device for one in await leases.revoke(bucket, "ann")} == {"h-cpu0", "h-cpu1"}
    assert await leases.revoke(bucket, "ann") == await leases.revoke(bucket, "j-1") == ()
    assert await _holders(bucket) == {"h-cpu2": "ben", "h-cpu3": "j-1"}
    with pytest.raises(LeaseLost):
        await leases.renew(bucket, by_hand, ttl_s=60)


@pytest.mark.parametrize(
    ("key", "data", "problem"),
    [
        ("h-cpu0", b"\xc1", "cannot be read"),
        ("h-cpu0", b'{"device": 7}', "cannot be read"),
        ("h-cpu0.reclaim", b"\xc1", "being reclaimed"),
    ],
)
async def test_a_device_with_a_lease_or_mark_that_cannot_be_read_is_granted_to_nobody(
    bus: Bus, bucket: Bucket, key: str, data: bytes, problem: str
) -> None:
    await bus.publish(Outgoing(f"$KV.railbus_leases.{key}", data, ""))
    with pytest.raises(NoFreeDevice, match=problem):
        await _grant(bucket, 0)
    assert await leases.leases_of(bucket, holder="j-1", lease_epoch=1) == []
    await _grant(bucket, 1)

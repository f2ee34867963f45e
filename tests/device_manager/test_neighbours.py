"""Which devices of a host a job gets: NVLink, then one NUMA node; shares of one GPU; several hosts; quotas."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster_for_tests import device, job, place, runner
from railbus_device_manager.cluster import Cluster, Holder, Policy
from railbus_device_manager.placement import Placement, decide
from railbus_shared.contracts.devices import DeviceInfo
from railbus_shared.contracts.jobs import JobRecord
from railbus_shared.contracts.requests import DeviceState


def gpu(name: str, *, linked: str = "", node: int | None = None, shares: int = 1) -> DeviceInfo:
    """`linked` are the indexes of the GPUs of the host that this one reaches over NVLink."""
    host = name.partition("-")[0]
    return device(name).changed(
        uuid=f"GPU-{name}",
        nvlink_peers=tuple(f"GPU-{host}-gpu{index}" for index in linked),
        numa_node=node,
        shares=shares,
    )


def cluster(*devices: DeviceInfo, leased: str = "", policy: Policy | None = None) -> Cluster:
    """Free devices, but those whose indexes are `leased`."""
    states = tuple(
        DeviceState(
            device=one,
            state="leased" if str(one.index) in leased else "free",
            holder="x" if str(one.index) in leased else None,
            free_shares=one.shares if one.shares > 1 else 0,
        )
        for one in devices
    )
    hosts = {one.host for one in devices}
    return Cluster(states, {host: runner(host) for host in hosts}, policy=policy or Policy())


def given_to(waiting: JobRecord, on: Cluster) -> str:
    """Indexes of the devices that a job gets."""
    return "".join(name[-1] for placement in place([waiting], on) for name in placement.device_ids)


# Two pairs and a set of four, as on a host with eight GPUs.
LINKED = [gpu(f"a-gpu{n}", linked=peers) for n, peers in enumerate(["1", "0", "3", "2", "567", "467", "457", "456"])]
NODES = [gpu(f"a-gpu{n}", node=n % 2) for n in range(4)]


@pytest.mark.parametrize(
    ("devices", "leased", "count", "expected"),
    [
        (LINKED, "", 2, "01"),
        (LINKED, "0", 2, "23"),
        (LINKED, "02", 2, "45"),
        (LINKED, "", 4, "4567"),
        (LINKED, "", 3, "456"),
        (LINKED, "", 8, "01234567"),
        # a single one is taken where it breaks the smallest set
        (LINKED, "1", 1, "0"),
        (LINKED, "", 1, "0"),
        (LINKED, "023", 1, "1"),
        # no set is large enough
        (LINKED, "04", 5, "12356"),
        (NODES, "", 2, "02"),
        (NODES, "0", 2, "13"),
        (NODES, "01", 2, "23"),
        (NODES, "", 3, "012"),
    ],
)
def test_devices_that_belong_together_are_given_together(
    devices: list[DeviceInfo], leased: str, count: int, expected: str
) -> None:
    assert given_to(job("j-1", kind="gpu", count=count), cluster(*devices, leased=leased)) == expected


@given(st.sets(st.integers(0, 7)), st.integers(1, 8))
def test_whatever_is_leased_a_job_gets_as_many_as_it_wants_or_none(leased: set[int], count: int) -> None:
    taken = "".join(map(str, leased))
    found = given_to(job("j-1", kind="gpu", count=count), cluster(*LINKED, leased=taken))
    assert len(found) == (count if 8 - len(leased) >= count else 0)
    assert len(set(found)) == len(found)
    assert not set(found) & set(taken)


# --- shares ----------------------------------------------------------------------------------------------------------


def part(number: int, fraction: float) -> JobRecord:
    return job(f"j-{number}", kind="gpu", sharing="fraction", fraction=fraction)


def shared(*free: int, shares: int = 4) -> Cluster:
    """GPUs of host `a` with so many free shares each."""
    states = tuple(
        DeviceState(
            device=gpu(f"a-gpu{index}", shares=shares),
            state="free" if left else "leased",
            holder=None if left else "x",
            holders=() if left == shares else ("x",),
            free_shares=left,
        )
        for index, left in enumerate(free)
    )
    return Cluster(states, {"a": runner("a")})


@pytest.mark.parametrize(
    ("free", "fraction", "expected"),
    [
        # rounded up to whole shares
        ((4, 4), 0.25, ("a-gpu0", 1)),
        ((4, 4), 0.26, ("a-gpu0", 2)),
        ((4, 4), 1.0, ("a-gpu0", 4)),
        # the GPU with the fewest free shares that are enough
        ((4, 2), 0.5, ("a-gpu1", 2)),
        ((3, 2), 0.75, ("a-gpu0", 3)),
        ((1, 0), 0.5, None),
        ((0, 0), 0.25, None),
    ],
)
def test_a_job_that_shares_gets_the_gpu_that_it_fills_best(
    free: tuple[int, ...], fraction: float, expected: tuple[str, int] | None
) -> None:
    placements = place([part(1, fraction)], shared(*free))
    assert [(one.device_ids, one.shares) for one in placements] == ([((expected[0],), expected[1])] if expected else [])


def test_jobs_that_share_fill_one_gpu_before_the_next_and_one_that_does_not_takes_a_whole_one() -> None:
    queue = [part(1, 0.5), part(2, 0.25), part(3, 0.5), job("j-4", kind="gpu")]
    placements = place(queue, shared(4, 4, 4))
    assert [(one.job_id, one.device_ids[0], one.shares) for one in placements] == [
        ("j-1", "a-gpu0", 2),
        ("j-2", "a-gpu0", 1),
        ("j-3", "a-gpu1", 2),
        ("j-4", "a-gpu2", 4),
    ]


def test_a_gpu_of_which_a_part_is_taken_is_not_given_as_a_whole() -> None:
    assert place([job("j-1", kind="gpu")], shared(3)) == []


def test_a_gpu_that_is_not_shared_is_not_given_in_parts() -> None:
    assert place([part(1, 0.5)], cluster(gpu("a-gpu0"))) == []


def test_a_job_that_waits_for_a_part_keeps_the_rest_from_those_behind_it() -> None:
    decision = decide([part(1, 0.75), part(2, 0.5)], shared(2))
    assert decision.placements == []
    assert decision.kept_for == {"a-gpu0": "j-1"}


def test_a_part_is_expected_when_enough_of_those_who_share_have_ended() -> None:
    holders = {
        name: Holder(record=part(number, 0.25).changed(id=name), owner="", units=0.25, ends_at=ends_at)
        for number, (name, ends_at) in enumerate({"x": 10.0, "y": 20.0, "z": 30.0}.items(), start=5)
    }
    state = DeviceState(device=gpu("a-gpu0", shares=4), state="free", holders=("x", "y", "z"), free_shares=1)
    on = Cluster((state,), {"a": runner("a")}, holders=holders)
    assert decide([part(1, 0.75)], on).expected == {"j-1": 20.0}
    assert decide([job("j-1", kind="gpu")], on).expected == {"j-1": 30.0}


# --- several hosts ---------------------------------------------------------------------------------------------------

THREE_HOSTS = [
    gpu(f"{host}-gpu{index}") for host, number in {"a": 1, "b": 3, "c": 2}.items() for index in range(number)
]


@pytest.mark.parametrize(
    ("count", "hosts"),
    [(1, ()), (3, ()), (4, ("b", "a")), (5, ("b", "c")), (6, ("b", "c", "a"))],
)
def test_a_job_that_may_spread_has_one_host_if_it_can_and_else_as_few_as_it_can(
    count: int, hosts: tuple[str, ...]
) -> None:
    on = dataclasses.replace(cluster(*THREE_HOSTS), spreads=True)
    (found,) = place([job("j-1", kind="gpu", count=count, same_host=False)], on)
    assert len(found.device_ids) == len(set(found.device_ids)) == count
    assert found.hosts == hosts


def test_a_job_is_spread_only_where_that_is_allowed() -> None:
    apart = job("j-1", kind="gpu", count=4, same_host=False)
    assert place([apart], cluster(*THREE_HOSTS)) == []
    on = dataclasses.replace(cluster(*THREE_HOSTS), spreads=True)
    assert place([job("j-1", kind="gpu", count=4)], on) == []
    assert isinstance(place([apart], on)[0], Placement)


# --- quotas ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("quotas", "expected"),
    [
        ({}, [1, 2, 3, 4]),
        ({"ann": 2}, [1, 2, 4]),
        ({"ann": 1}, [1, 4]),
        ({"ann": 0}, [4]),
        ({"*": 1}, [1, 4]),
        ({"*": 0, "ann": 2}, [1, 2]),
    ],
)
def test_an_owners_jobs_hold_no_more_than_his_quota(quotas: dict[str, float], expected: list[int]) -> None:
    queue = [*(job(f"j-{number}", kind="gpu", owner="ann") for number in (1, 2, 3)), job("j-4", kind="gpu")]
    on = cluster(*(gpu(f"a-gpu{index}") for index in range(8)), policy=Policy(quotas=quotas))
    assert sorted(int(one.job_id[2:]) for one in place(queue, on)) == expected


def test_a_job_over_its_owners_quota_keeps_nothing_from_others() -> None:
    on = cluster(gpu("a-gpu0"), gpu("a-gpu1"), leased="1", policy=Policy(quotas={"ann": 1}))
    queue = [job("j-1", kind="gpu", owner="ann", count=2), job("j-2", kind="gpu", owner="bob")]
    assert [one.job_id for one in place(queue, on)] == ["j-2"]

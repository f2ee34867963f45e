"""Who makes room for whom: as few as can be, of strictly lower priority, and only where the job then starts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster_for_tests import device, job, runner
from railbus_device_manager.cluster import Cluster, Holder, Policy
from railbus_device_manager.placement import decide
from railbus_shared.contracts.jobs import JobRecord
from railbus_shared.contracts.requests import DeviceState

HOUR_S = 3600.0


def running(number: int, priority: int = 0, *, unsaved_s: float = 0, can: bool = True, by: str | None = None) -> Holder:
    record = job(f"j-{number}", priority=priority).changed(state="running", lease_epoch=number, preempted_by=by)
    return Holder(record=record, owner="", units=1, can_be_preempted=can and by is None, unsaved_s=unsaved_s)


def cluster(
    devices: Mapping[str, Holder | None],
    *,
    policy: Policy | None = None,
    cleared_for: Mapping[str, str] | None = None,
    waited_s: float = HOUR_S,
) -> Cluster:
    """Devices and who holds them, None for a free one; every job has waited for `waited_s`."""
    states = tuple(
        DeviceState(
            device=device(name), state="leased" if holder else "free", holder=holder.record.id if holder else None
        )
        for name, holder in devices.items()
    )
    return Cluster(
        states,
        {host: runner(host) for host in {state.device.host for state in states}},
        now=HOUR_S,
        policy=policy or Policy(),
        holders={holder.record.id: holder for holder in devices.values() if holder},
        cleared_for=cleared_for or {},
        queued_since={f"j-{number}": HOUR_S - waited_s for number in range(1, 100)},
    )


def victims(*queue: JobRecord, on: Cluster) -> list[str]:
    decision = decide(queue, on)
    by = {str(one.by) for one in decision.preemptions}
    assert by <= {one.id for one in queue}
    for one in decision.preemptions:
        assert one.lease_epoch == on.holders[one.job_id].record.lease_epoch
    return sorted(one.job_id for one in decision.preemptions)


HIGH = job("j-1", priority=5, kind="gpu")
TWO = job("j-1", priority=5, kind="gpu", count=2)


@pytest.mark.parametrize(
    ("waiting", "devices", "expected"),
    [
        (HIGH, {"a-gpu0": running(50)}, ["j-50"]),
        # not of the same priority, nor one that may not be preempted, nor where a device is free
        (HIGH, {"a-gpu0": running(50, 5)}, []),
        (HIGH, {"a-gpu0": running(50, can=False)}, []),
        (HIGH, {"a-gpu0": running(50), "a-gpu1": None}, []),
        # the lowest priority, then what loses least, then the fewest
        (HIGH, {"a-gpu0": running(50, 2), "a-gpu1": running(51, 1)}, ["j-51"]),
        (HIGH, {"a-gpu0": running(50, unsaved_s=9), "a-gpu1": running(51, unsaved_s=8)}, ["j-51"]),
        (HIGH, {"a-gpu0": running(50, 2, unsaved_s=1), "b-gpu0": running(51, 1, unsaved_s=99)}, ["j-51"]),
        # as many as are lacking, on one host
        (TWO, {"a-gpu0": running(50), "a-gpu1": running(51)}, ["j-50", "j-51"]),
        (TWO, {"a-gpu0": running(50), "a-gpu1": None}, ["j-50"]),
        (TWO, {"a-gpu0": running(50), "b-gpu0": running(51)}, []),
        (TWO, {"a-gpu0": running(50), "a-gpu1": running(51, 5)}, []),
        (TWO, {"a-gpu0": running(50), "a-gpu1": running(51), "b-gpu0": running(52), "b-gpu1": None}, ["j-52"]),
    ],
)
def test_a_job_takes_the_devices_that_cost_least_and_only_if_it_then_starts(
    waiting: JobRecord, devices: dict[str, Holder | None], expected: list[str]
) -> None:
    assert victims(waiting, on=cluster(devices)) == expected


def test_one_victim_with_two_devices_is_enough_for_a_job_that_wants_two() -> None:
    wide, one, two = running(50), running(51), running(52)
    devices = {"a-gpu0": one, "a-gpu1": wide, "a-gpu2": wide, "a-gpu3": two}
    assert victims(TWO, on=cluster(devices)) == ["j-50"]


def test_two_jobs_do_not_take_the_same_device_and_the_rest_of_a_victim_serves_the_next() -> None:
    wide = running(50)
    queue = [HIGH, job("j-2", priority=5, kind="gpu"), job("j-3", priority=5, kind="gpu")]
    on = cluster({"a-gpu0": wide, "a-gpu1": wide, "a-gpu2": running(51)})
    assert victims(*queue, on=on) == ["j-50", "j-51"]


@pytest.mark.parametrize(
    ("policy", "waited_s", "expected"),
    [
        (Policy(preempts=False), HOUR_S, []),
        (Policy(preempt_after_s=60), 59, []),
        (Policy(preempt_after_s=60), 60, ["j-50"]),
    ],
)
def test_an_operator_decides_whether_and_after_how_long(policy: Policy, waited_s: float, expected: list[str]) -> None:
    assert victims(HIGH, on=cluster({"a-gpu0": running(50)}, policy=policy, waited_s=waited_s)) == expected


def test_nobody_is_told_to_make_room_for_a_job_that_others_are_making_room_for() -> None:
    leaving = running(50, by="j-1")
    on = cluster({"a-gpu0": leaving, "a-gpu1": running(51)}, cleared_for={"a-gpu0": "j-1"})
    assert victims(HIGH, on=on) == []


def test_devices_that_were_cleared_for_a_job_are_its_own_also_before_those_whose_turn_is_earlier() -> None:
    on = cluster({"a-gpu0": None, "a-gpu1": running(51, 9)}, cleared_for={"a-gpu0": "j-2"})
    queue = [HIGH, job("j-2", priority=5, kind="gpu"), job("j-3", kind="gpu")]
    assert [placement.job_id for placement in decide(queue, on).placements] == ["j-2"]


def test_a_free_device_beside_those_that_are_being_cleared_stays_for_the_job() -> None:
    on = cluster({"a-gpu0": running(50, by="j-1"), "a-gpu1": None}, cleared_for={"a-gpu0": "j-1"})
    decision = decide([TWO, job("j-2", kind="gpu")], on)
    assert decision.placements == []
    assert decision.kept_for == {"a-gpu1": "j-1"}


def test_what_a_victim_leaves_beyond_the_need_is_open_to_others() -> None:
    on = cluster({"a-gpu0": None, "a-gpu1": None}, cleared_for={"a-gpu0": "j-1", "a-gpu1": "j-1"})
    queue = [HIGH, job("j-2", kind="gpu")]
    assert {placement.job_id for placement in decide(queue, on).placements} == {"j-1", "j-2"}


def test_a_job_that_shares_makes_nobody_leave() -> None:
    shares = job("j-1", priority=5, kind="gpu", sharing="fraction", fraction=0.5)
    assert victims(shares, on=cluster({"a-gpu0": running(50)})) == []


def test_only_some_jobs_are_given_room_in_one_pass() -> None:
    devices: dict[str, Holder | None] = {f"a-gpu{number}": running(50 + number) for number in range(6)}
    queue = [job(f"j-{number}", priority=5, kind="gpu") for number in range(1, 7)]
    assert len(victims(*queue, on=cluster(devices, policy=Policy(rooms=2)))) == 2


@st.composite
def holdings(draw: st.DrawFn) -> dict[str, Holder | None]:
    devices = [f"{host}-gpu{index}" for host in "ab" for index in range(4)]
    held: dict[str, Holder | None] = {}
    number = 50
    while devices:
        width = draw(st.integers(1, 3))
        mine = [name for name in devices[:width] if name[0] == devices[0][0]]
        holder = running(number, draw(st.integers(0, 6)), unsaved_s=draw(st.floats(0, 9)), can=draw(st.booleans()))
        held.update(dict.fromkeys(mine, holder if draw(st.integers(0, 4)) else None))
        devices, number = devices[len(mine) :], number + 1
    return held


@given(holdings(), st.lists(st.tuples(st.integers(0, 6), st.integers(1, 4)), max_size=5))
def test_every_victim_is_lower_needed_and_asked_once_and_its_place_is_kept(
    devices: dict[str, Holder | None], wanted: list[tuple[int, int]]
) -> None:
    queue = [job(f"j-{n}", priority=p, kind="gpu", count=count) for n, (p, count) in enumerate(wanted, start=1)]
    on = cluster(devices)
    decision = decide(queue, on)
    by_id = {one.id: one for one in queue}
    asked = [one.job_id for one in decision.preemptions]
    assert len(asked) == len(set(asked))
    for one in decision.preemptions:
        assert on.holders[one.job_id].can_be_preempted
        assert on.holders[one.job_id].record.priority < by_id[one.by].priority
    for name in {one.by for one in decision.preemptions}:
        kept = [slot for slot in on.slots if decision.keeper.get(slot.number) == name]
        assert len(kept) == by_id[name].spec.devices.count
        assert len({slot.host for slot in kept}) == 1
        assert all(slot.free or set(slot.holders) <= set(asked) for slot in kept)
        own = {one.job_id for one in decision.preemptions if one.by == name}
        assert all(any(victim in slot.holders for slot in kept) for victim in own)


@pytest.mark.parametrize("word", ["draining", "cordoned", "unhealthy"])
def test_nobody_makes_room_on_a_device_that_would_not_be_granted_afterwards(word: str) -> None:
    made = cluster({"a-gpu0": running(50), "b-gpu0": running(51, 1)})
    retired, kept = made.devices[0].changed(retired=word), made.devices[1]
    assert victims(HIGH, on=replace(made, devices=(retired,), pools={})) == []
    assert victims(HIGH, on=replace(made, devices=(retired, kept), pools={})) == ["j-51"]

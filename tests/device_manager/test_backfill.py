"""Backfilling on a virtual clock, with run times that are exactly the time limits: the head is never delayed."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster_for_tests import device, job, runner
from railbus_device_manager.cluster import Cluster, Holder, Policy
from railbus_device_manager.placement import decide
from railbus_shared.contracts.jobs import JobRecord
from railbus_shared.contracts.requests import DeviceState

HOSTS = {"a": 2, "b": 3, "c": 4}


@dataclass
class Clock:
    """Devices, who has them until when, and who waits."""

    devices: list[str]
    queue: list[JobRecord] = field(default_factory=list)
    held: dict[str, tuple[JobRecord, float]] = field(default_factory=dict)
    """By device: the job and its end."""
    now: float = 0.0
    started_at: dict[str, float] = field(default_factory=dict)
    run_s: dict[str, float] = field(default_factory=dict)
    """Of jobs without a time limit."""

    def cluster(self) -> Cluster:
        holders = {
            record.id: Holder(
                record=record,
                owner="",
                units=record.spec.devices.count,
                ends_at=end if record.spec.time_limit_s is not None else float("inf"),
                is_certain=record.spec.time_limit_s is not None,
            )
            for record, end in self.held.values()
        }
        states = [
            DeviceState(
                device=device(name),
                state="leased" if name in self.held else "free",
                holder=self.held[name][0].id if name in self.held else None,
            )
            for name in self.devices
        ]
        hosts = {state.device.host for state in states}
        return Cluster(tuple(states), {host: runner(host) for host in hosts}, now=self.now, holders=holders)

    def step(self) -> None:
        """Start what placement starts now."""
        by_id = {waiting.id: waiting for waiting in self.queue}
        for placement in decide(self.queue, self.cluster()).placements:
            started = by_id[placement.job_id]
            self.queue.remove(started)
            self.started_at[started.id] = self.now
            end = self.now + (started.spec.time_limit_s or self.run_s.get(started.id, 1.0))
            for name in placement.device_ids:
                assert name not in self.held
                self.held[name] = (started, end)

    def run(self) -> dict[str, float]:
        """When each job started; all have in the end."""
        self.step()
        while self.queue:
            assert self.held, "nothing runs, and jobs wait"
            self.now = min(end for _, end in self.held.values())
            self.held = {name: one for name, one in self.held.items() if one[1] > self.now}
            self.step()
        return self.started_at


def cluster_of(hosts: Mapping[str, int], held: Sequence[tuple[str, float]], queue: Sequence[JobRecord]) -> Clock:
    """`held` are devices and the ends of those who have them."""
    names = [f"{host}-gpu{index}" for host, number in hosts.items() for index in range(number)]
    holders = {
        name: (job(f"j-{1000 + number}", time_limit_s=end).changed(state="running"), end)
        for number, (name, end) in enumerate(held)
    }
    return Clock(names, list(queue), holders)


def waiting(number: int, count: int, limit_s: float | None) -> JobRecord:
    return job(f"j-{number}", kind="gpu", count=count, time_limit_s=limit_s)


# --- tables ----------------------------------------------------------------------------------------------------------

TWO_OF_THREE_BUSY = [("a-gpu1", 10.0), ("a-gpu2", 20.0)]


@pytest.mark.parametrize(
    ("head", "behind", "held", "starts"),
    [
        # the head wants all three at 20: what ends by then may use the free one
        (waiting(1, 3, 5), waiting(2, 1, 20), TWO_OF_THREE_BUSY, True),
        (waiting(1, 3, 5), waiting(2, 1, 20.1), TWO_OF_THREE_BUSY, False),
        (waiting(1, 3, 5), waiting(2, 1, None), TWO_OF_THREE_BUSY, False),
        # it wants two at 10: the third is certain to be free before, so the free one is needed
        (waiting(1, 2, 5), waiting(2, 1, 10), TWO_OF_THREE_BUSY, True),
        (waiting(1, 2, 5), waiting(2, 1, 11), TWO_OF_THREE_BUSY, False),
        # both become free together, and two are enough: nobody needs the one that is free
        (waiting(1, 2, 5), waiting(2, 1, None), [("a-gpu1", 10.0), ("a-gpu2", 10.0)], True),
    ],
)
def test_a_device_that_is_kept_is_given_until_it_is_needed(
    head: JobRecord, behind: JobRecord, held: list[tuple[str, float]], *, starts: bool
) -> None:
    clock = cluster_of({"a": 3}, held, [head, behind])
    clock.step()
    assert (behind.id in clock.started_at) == starts


def test_a_job_waits_for_the_host_where_it_will_start_first_not_for_the_one_where_it_lacks_least() -> None:
    held = [("a-gpu0", 50.0), ("b-gpu0", 5.0), ("b-gpu1", 6.0)]
    clock = cluster_of({"a": 2, "b": 2}, held, [waiting(1, 2, 5), waiting(2, 1, None)])
    clock.step()
    assert clock.started_at == {"j-2": 0.0}  # on the free device of a
    assert clock.run()["j-1"] == 6.0


def test_a_holder_that_outlives_its_expected_end_lets_nobody_in_by_time() -> None:
    clock = cluster_of({"a": 2}, [("a-gpu1", 10.0)], [waiting(1, 2, 5), waiting(2, 1, 1)])
    clock.now = 12.0
    clock.step()
    assert clock.started_at == {}


# --- properties ------------------------------------------------------------------------------------------------------

LIMITS = st.sampled_from([1.0, 2.0, 3.0, 5.0, 8.0])


@st.composite
def clocks(draw: st.DrawFn, *, unknown: bool) -> Clock:
    limits = st.none() | LIMITS if unknown else LIMITS
    names = [f"{host}-gpu{index}" for host, number in HOSTS.items() for index in range(number)]
    held = [(name, draw(LIMITS)) for name in names if draw(st.booleans())]
    head = waiting(0, draw(st.integers(1, 4)), draw(LIMITS))
    behind = [waiting(number, draw(st.integers(1, 4)), draw(limits)) for number in range(1, draw(st.integers(1, 8)))]
    made = cluster_of(HOSTS, held, [head, *behind])
    made.run_s = {one.id: draw(st.floats(0.5, 20)) for one in behind}
    return made


def alone(clock: Clock) -> Clock:
    return Clock(clock.devices, clock.queue[:1], dict(clock.held))


@settings(max_examples=200)
@given(clocks(unknown=True))
def test_the_head_starts_no_later_with_backfilling_than_without_anyone_behind_it(clock: Clock) -> None:
    without = alone(clock).run()["j-0"]
    assert clock.run()["j-0"] <= without


@settings(max_examples=100)
@given(clocks(unknown=False))
def test_every_job_starts_by_the_time_that_is_foreseen_when_it_becomes_the_head(clock: Clock) -> None:
    foreseen: dict[str, float] = {}
    clock.step()
    while clock.queue:
        head = clock.queue[0]
        if head.id not in foreseen:
            foreseen[head.id] = decide([head], clock.cluster()).expected[head.id]
        clock.now = min(end for _, end in clock.held.values())
        clock.held = {name: one for name, one in clock.held.items() if one[1] > clock.now}
        clock.step()
    assert all(clock.started_at[name] <= at for name, at in foreseen.items())


@settings(max_examples=100)
@given(clocks(unknown=True))
def test_no_device_idles_that_a_waiting_job_could_have_without_delaying_the_head(clock: Clock) -> None:
    """Of jobs for one device: a free one that nobody keeps is never left over."""
    clock.queue = [clock.queue[0], *(waiting(number, 1, None) for number in range(1, 5))]
    decision = decide(clock.queue, clock.cluster())
    placed = {placement.job_id for placement in decision.placements}
    free = set(clock.devices) - clock.held.keys() - decision.taken.keys() - decision.kept_for.keys()
    assert not free or len(placed) >= len(clock.queue) - 1


def test_without_known_ends_several_waiting_jobs_keep_devices_and_with_them_the_head_alone_does() -> None:
    busy = [("a-gpu0", 9.0), ("b-gpu0", 9.0)]
    queue = [waiting(1, 2, None), waiting(2, 2, None), waiting(3, 1, None)]
    known = cluster_of({"a": 2, "b": 2}, busy, queue)
    assert set(decide(queue, known.cluster()).kept_for.values()) == {"j-1"}
    unknown = cluster_of({"a": 2, "b": 2}, busy, queue)
    unknown.held = {
        name: (record.changed(spec=record.spec.changed(time_limit_s=None)), end)
        for name, (record, end) in unknown.held.items()
    }
    assert set(decide(queue, unknown.cluster()).kept_for.values()) == {"j-1", "j-2"}


def test_how_many_jobs_keep_devices_has_a_limit() -> None:
    hosts = {f"h{number}": 2 for number in range(20)}
    states = tuple(
        DeviceState(device=device(f"{host}-gpu{index}"), state=("leased", "free")[index], holder=("x", None)[index])
        for host in hosts
        for index in range(2)
    )
    cluster = Cluster(states, {host: runner(host) for host in hosts}, policy=Policy(reservations=3))
    queue = [waiting(number, 2, None) for number in range(1, 11)]
    assert len(set(decide(queue, cluster).kept_for.values())) == 3


def test_an_end_that_is_only_expected_is_not_relied_on_where_a_free_device_can_be_kept() -> None:
    """Two of three devices are needed: one is free, two will be, and nobody guarantees that."""
    clock = cluster_of({"a": 3}, [("a-gpu1", 10.0), ("a-gpu2", 10.0)], [waiting(1, 2, 5), waiting(2, 1, None)])
    certain = clock.cluster()
    guessed = {name: dataclasses.replace(holder, is_certain=False) for name, holder in certain.holders.items()}
    assert decide(clock.queue, certain).kept_for == {}
    assert decide(clock.queue, dataclasses.replace(certain, holders=guessed)).kept_for == {"a-gpu0": "j-1"}

"""Placement: tables of small clusters, and properties that hold for any cluster and queue."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster_for_tests import GIB, can_ever, device, job, place, reason, runner
from railbus_device_manager.lacks import size
from railbus_device_manager.placement import Cluster, decide, pools_for, waits_for
from railbus_shared.contracts.devices import RunnerReport
from railbus_shared.contracts.jobs import JobRecord
from railbus_shared.contracts.requests import DeviceState

FREE = "free"


def on(device_id: str, state: str = FREE, *, gib: float = 16, holder: str | None = None, **labels: str) -> DeviceState:
    found = device(device_id, gib=gib, labels=labels, healthy=state != "unhealthy")
    return DeviceState.model_validate({"device": found, "state": state, "holder": holder})


def haunted(device_id: str) -> DeviceState:
    """A GPU on which strangers compute."""
    return DeviceState(device=device(device_id).changed(compute_pids=(4711,)), state="reclaiming")


def cluster(*states: DeviceState, runners: Mapping[str, RunnerReport] | None = None) -> Cluster:
    """Devices, on hosts whose runners are ready unless `runners` says otherwise."""
    hosts = {state.device.host for state in states}
    return Cluster(states, {host: runner(host) for host in hosts} if runners is None else runners)


def placed(queue: Sequence[JobRecord], on_cluster: Cluster) -> dict[str, tuple[str, ...]]:
    return {placement.job_id: tuple(placement.device_ids) for placement in place(queue, on_cluster)}


# --- order -----------------------------------------------------------------------------------------------------------


def test_the_highest_priority_goes_first_and_the_oldest_within_one() -> None:
    queue = [job("j-3"), job("j-2", priority=5), job("j-1"), job("j-4", priority=5)]
    one = cluster(on("a-gpu0"))
    started = []
    while queue:
        (placement,) = place(queue, one)
        started.append(placement.job_id)
        queue = [waiting for waiting in queue if waiting.id != placement.job_id]
    assert started == ["j-2", "j-4", "j-1", "j-3"]


# --- kinds -----------------------------------------------------------------------------------------------------------

GPU_THEN_CPU = job("j-1")
CPU_THEN_GPU = job("j-1", kind=["cpu", "gpu"])


@pytest.mark.parametrize(
    ("waiting", "states", "expected"),
    [
        (GPU_THEN_CPU, [on("a-cpu0"), on("a-gpu0")], ("a-gpu0",)),
        (GPU_THEN_CPU, [on("a-cpu0")], ("a-cpu0",)),
        (CPU_THEN_GPU, [on("a-cpu0"), on("a-gpu0")], ("a-cpu0",)),
        (CPU_THEN_GPU, [on("a-gpu0")], ("a-gpu0",)),
        # a gpu that is only busy is waited for
        (GPU_THEN_CPU, [on("a-cpu0"), on("a-gpu0", "leased")], None),
        (GPU_THEN_CPU, [on("a-cpu0"), on("a-gpu0", "reclaiming")], None),
        # one that is out of order is not
        (GPU_THEN_CPU, [on("a-cpu0"), on("a-gpu0", "unhealthy")], ("a-cpu0",)),
        (GPU_THEN_CPU, [on("a-cpu0"), on("b-gpu0", "draining")], ("a-cpu0",)),
        # nor one that is too small, or one of too few
        (job("j-1", min_memory_bytes=8 * GIB), [on("a-cpu0"), on("a-gpu0", "leased", gib=4)], ("a-cpu0",)),
        (job("j-1", count=2), [on("a-cpu0"), on("a-cpu1"), on("a-gpu0"), on("b-gpu0")], ("a-cpu0", "a-cpu1")),
        (job("j-1", kind="gpu"), [on("a-cpu0")], None),
        (job("j-1", kind="cpu"), [on("a-gpu0")], None),
    ],
)
def test_a_later_kind_is_taken_only_where_no_host_has_the_earlier_one(
    waiting: JobRecord, states: list[DeviceState], expected: tuple[str, ...] | None
) -> None:
    assert placed([waiting], cluster(*states)).get(waiting.id) == expected


# --- fit -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wanted", "states", "expected"),
    [
        # the smallest that is large enough
        ({"min_memory_bytes": 10 * GIB}, [on("a-gpu0", gib=80), on("b-gpu0", gib=16)], ("b-gpu0",)),
        ({"min_memory_bytes": 20 * GIB}, [on("a-gpu0", gib=80), on("b-gpu0", gib=16)], ("a-gpu0",)),
        ({"min_memory_bytes": 10 * GIB}, [on("a-gpu0", gib=80), on("a-gpu1", gib=16)], ("a-gpu1",)),
        ({"min_memory_bytes": 16 * GIB}, [on("a-gpu0", gib=16)], ("a-gpu0",)),
        ({"min_memory_bytes": 16 * GIB + 1}, [on("a-gpu0", gib=16)], None),
        # the host where the fewest are left over
        ({}, [on("a-gpu0"), on("a-gpu1"), on("b-gpu0")], ("b-gpu0",)),
        ({"count": 2}, [on(f"a-gpu{n}") for n in range(4)] + [on("b-gpu0"), on("b-gpu1")], ("b-gpu0", "b-gpu1")),
        # all or nothing, and on one host
        ({"count": 2}, [on("a-gpu0"), on("b-gpu0")], None),
        ({"count": 2}, [on("a-gpu0"), on("a-gpu1", "leased"), on("b-gpu0"), on("b-gpu1")], ("b-gpu0", "b-gpu1")),
        # labels: all of them
        ({"labels": {"x": "1"}}, [on("a-gpu0"), on("b-gpu0", x="1", y="2")], ("b-gpu0",)),
        ({"labels": {"x": "1", "y": "1"}}, [on("b-gpu0", x="1", y="2")], None),
        ({}, [on("a-gpu0", "leased")], None),
        ({}, [on("a-gpu0", "reclaiming")], None),
        ({}, [on("a-gpu0", "draining")], None),
        ({}, [on("a-gpu0", "unhealthy")], None),
        ({}, [], None),
    ],
)
def test_a_job_gets_the_devices_that_fit_it_best(
    wanted: dict[str, object], states: list[DeviceState], expected: tuple[str, ...] | None
) -> None:
    assert placed([job("j-1", wanted)], cluster(*states)).get("j-1") == expected


@pytest.mark.parametrize(
    ("runners", "is_placed"),
    [
        ({"a": runner("a")}, True),
        ({"a": runner("a", ready=False)}, False),
        ({"a": runner("a", entrypoints=("regressor",))}, False),
        ({}, False),
        ({"b": runner("b")}, False),
    ],
)
def test_a_host_takes_part_only_with_a_ready_runner_that_offers_the_entrypoint(
    runners: dict[str, RunnerReport], is_placed: bool
) -> None:
    assert bool(placed([job("j-1")], cluster(on("a-gpu0"), runners=runners))) == is_placed


def test_a_gpu_of_a_host_that_does_not_offer_the_entrypoint_is_not_waited_for() -> None:
    runners = {"a": runner("a", entrypoints=("regressor",)), "b": runner("b")}
    assert placed([job("j-1")], cluster(on("a-gpu0"), on("b-cpu0"), runners=runners)) == {"j-1": ("b-cpu0",)}


# --- backfill --------------------------------------------------------------------------------------------------------

BIG = job("j-1", kind="gpu", count=2)
SMALL = job("j-2", kind="gpu")


@pytest.mark.parametrize(
    ("queue", "states", "expected"),
    [
        # the free device of the host where the large job lacks one is kept for it
        ([BIG, SMALL], [on("a-gpu0"), on("a-gpu1", "leased")], {}),
        # a device that it does not need is not
        ([BIG, SMALL], [on("a-gpu0"), on("a-gpu1", "leased"), on("b-gpu0")], {"j-2": ("b-gpu0",)}),
        ([BIG, job("j-2", kind="cpu")], [on("a-gpu0"), on("a-gpu1", "leased"), on("a-cpu0")], {"j-2": ("a-cpu0",)}),
        # it keeps on the host where it lacks the fewest
        (
            [job("j-1", count=3), SMALL],
            [
                *(on("a-gpu0"), on("a-gpu1", "leased"), on("a-gpu2", "leased")),
                *(on("b-gpu0"), on("b-gpu1"), on("b-gpu2", "leased")),
            ],
            {"j-2": ("a-gpu0",)},
        ),
        # what no device could ever satisfy keeps nothing
        ([job("j-1", count=4), SMALL], [on("a-gpu0"), on("a-gpu1", "leased")], {"j-2": ("a-gpu0",)}),
        ([BIG, SMALL], [on("a-gpu0"), on("a-gpu1", "unhealthy")], {"j-2": ("a-gpu0",)}),
        # a smaller job of higher priority delays the large one
        ([BIG, job("j-2", priority=1)], [on("a-gpu0"), on("a-gpu1", "leased")], {"j-2": ("a-gpu0",)}),
        # every waiting job keeps devices, not only the first
        (
            [BIG, job("j-2", kind="cpu", count=2), job("j-3", kind="cpu")],
            [on("a-gpu0", "leased"), on("a-gpu1", "leased"), on("a-cpu0"), on("a-cpu1", "leased")],
            {},
        ),
    ],
)
def test_jobs_behind_a_waiting_one_take_only_what_it_does_not_need(
    queue: list[JobRecord], states: list[DeviceState], expected: dict[str, tuple[str, ...]]
) -> None:
    assert placed(queue, cluster(*states)) == expected


def test_a_job_keeps_devices_where_a_runner_is_ready_rather_than_where_more_are_free() -> None:
    states = [on("a-gpu0"), on("a-gpu1"), on("b-gpu0"), on("b-gpu1", "leased")]
    decision = decide([BIG, SMALL], cluster(*states, runners={"a": runner("a", ready=False), "b": runner("b")}))
    assert decision.kept_for == {"b-gpu0": "j-1"}
    assert decision.placements == []


def test_a_job_keeps_no_more_devices_than_it_wants() -> None:
    waiting_for_runner = cluster(*(on(f"a-gpu{index}") for index in range(3)), runners={"a": runner("a", ready=False)})
    assert decide([BIG], waiting_for_runner).kept_for == {"a-gpu0": "j-1", "a-gpu1": "j-1"}


def test_jobs_whose_wishes_differ_only_in_the_value_of_a_label_are_told_apart() -> None:
    queue = [job("j-1", labels={"zone": "a"}), job("j-2", labels={"zone": "b"})]
    both = cluster(on("a-gpu0", zone="a"), on("b-gpu0", zone="b"))
    assert placed(queue, both) == {"j-1": ("a-gpu0",), "j-2": ("b-gpu0",)}


# --- after -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("states", "sentence"),
    [
        ({"j-1": "succeeded", "j-2": "succeeded"}, ""),
        ({"j-1": "succeeded", "j-2": "running"}, "waits for job to succeed: j-2 (running)"),
        ({"j-2": "queued"}, "waits for jobs to succeed: j-1 (not known), j-2 (queued)"),
        (
            {"j-1": "failed", "j-2": "succeeded"},
            "waits for job to succeed: j-1 (failed); j-1 will not succeed unless it is retried",
        ),
    ],
)
def test_a_job_waits_until_those_before_it_have_succeeded(states: dict[str, str], sentence: str) -> None:
    assert waits_for(job("j-9", after=("j-1", "j-2")), states) == sentence


def test_a_job_after_none_is_ready() -> None:
    assert not waits_for(job("j-1"), {})


# --- reasons ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("waiting", "states", "expected"),
    [
        (
            job("j-9", kind="gpu", count=2, min_memory_bytes=40 * GIB),
            [on("a-gpu0", gib=40), on("a-gpu1", "leased", gib=80, holder="j-1")],
            "waits for 2 gpu devices of at least 40 GiB: a has 1 free, 1 leased by j-1",
        ),
        (
            job("j-9", kind="gpu", min_memory_bytes=80 * GIB),
            [on("a-gpu0", gib=40), on("b-gpu0", gib=24)],
            "no host has a gpu with 80 GiB; the largest has 40 GiB",
        ),
        (job("j-9", kind="gpu"), [on("a-cpu0")], "no host has a gpu"),
        (job("j-9"), [], "no host has a gpu; no host has a cpu"),
        (
            job("j-9", kind="gpu", count=3),
            [on("a-gpu0"), on("b-gpu0"), on("b-gpu1")],
            "no host has 3 gpu devices; b has the most: 2",
        ),
        (job("j-9", kind="gpu", labels={"zone": "b"}), [on("a-gpu0", zone="a")], "no host has a gpu with zone=b"),
        (
            job("j-9", kind="gpu", labels={"zone": "a"}),
            [on("a-gpu0", "leased", holder="ann", zone="a")],
            "waits for 1 gpu device with zone=a: a has 1 leased by ann",
        ),
        (
            job("j-9", kind="gpu"),
            [on("a-gpu0", "reclaiming", holder="j-3"), on("a-gpu1", "reclaiming")],
            "waits for 1 gpu device: a has 1 being reclaimed, 1 being reclaimed from j-3",
        ),
        (
            job("j-9", kind="gpu"),
            [haunted("a-gpu0")],
            "waits for 1 gpu device: a has 1 used by processes that are not of railbus",
        ),
        (
            job("j-9", kind="gpu"),
            [on("a-gpu0", "unhealthy"), on("b-gpu0", "draining")],
            "waits for 1 gpu device in order: a-gpu0 is unhealthy (GPU is lost), b-gpu0 is draining",
        ),
    ],
)
def test_the_reason_says_what_is_lacking(waiting: JobRecord, states: list[DeviceState], expected: str) -> None:
    assert reason(waiting, cluster(*states)) == expected


@pytest.mark.parametrize(
    ("runners", "expected"),
    [
        ({}, "waits for 1 gpu device: a has 1 free, but its runner is not there"),
        ({"a": runner("a", ready=False)}, "waits for 1 gpu device: a has 1 free, but its runner is not ready"),
        ({"a": runner("a", entrypoints=("regressor",))}, "no runner offers the entrypoint 'classifier'"),
        (
            {"b": runner("b", entrypoints=("regressor",))},
            "waits for 1 gpu device: a has 1 free, but its runner is not there",
        ),
        (
            {"a": runner("a", entrypoints=("regressor",)), "b": runner("b")},
            "no host has a gpu",
        ),
    ],
)
def test_the_reason_names_a_runner_that_is_in_the_way(runners: dict[str, RunnerReport], expected: str) -> None:
    assert reason(job("j-9", kind="gpu"), cluster(on("a-gpu0"), runners=runners)) == expected


def test_the_reason_names_the_job_that_a_free_device_is_kept_for() -> None:
    both = cluster(on("a-gpu0"), on("a-gpu1", "leased", holder="j-0"))
    decision = decide([BIG, SMALL], both)
    assert reason(SMALL, both, decision=decision) == "waits for 1 gpu device: a has 1 kept for j-1, 1 leased by j-0"
    assert reason(BIG, both, decision=decision) == "waits for 2 gpu devices: a has 1 free, 1 leased by j-0"


def test_the_reason_names_the_job_that_gets_the_device_now() -> None:
    one = cluster(on("a-gpu0"))
    decision = decide([job("j-1"), job("j-2")], one)
    assert reason(job("j-2"), one, decision=decision) == "waits for 1 gpu device: a has 1 given to j-1"


@pytest.mark.parametrize("state", ["free", "leased", "reclaiming", "draining", "unhealthy"])
def test_a_device_that_fits_means_not_never_whatever_its_state(state: str) -> None:
    assert can_ever(job("j-1"), cluster(on("a-gpu0", state))) is None


@pytest.mark.parametrize(
    ("num_bytes", "expected"),
    [
        (40 * GIB, "40 GiB"),
        (3 * GIB // 2, "1.5 GiB"),
        (GIB // 2, "512 MiB"),
        (1, "0 MiB"),
        (150_754_820_096, "140.4 GiB"),
    ],
)
def test_memory_is_written_for_people(num_bytes: int, expected: str) -> None:
    assert size(num_bytes) == expected


# --- properties ------------------------------------------------------------------------------------------------------

HOSTS = ("a", "b", "c")
LABELS = st.sampled_from([{}, {"x": "1"}, {"x": "1", "y": "1"}])


@st.composite
def clusters(draw: st.DrawFn) -> Cluster:
    states = [
        on(f"{host}-{kind}{index}", draw(states_of_devices), gib=draw(st.sampled_from([8, 16, 80])), **draw(LABELS))
        for host in HOSTS
        for kind in ("cpu", "gpu")
        for index in range(draw(st.integers(0, 3)))
    ]
    reports = {host: draw(st.sampled_from([None, True, True, False, "other"])) for host in HOSTS}
    runners = {
        host: runner(host, ready=report is True, entrypoints=("other",) if report == "other" else ("classifier",))
        for host, report in reports.items()
        if report is not None
    }
    return Cluster(tuple(states), runners)


states_of_devices = st.sampled_from(["free", "free", "free", "leased", "reclaiming", "draining", "unhealthy"])


@st.composite
def queues(draw: st.DrawFn) -> list[JobRecord]:
    kinds = st.sampled_from([["gpu"], ["cpu"], ["gpu", "cpu"], ["cpu", "gpu"]])
    return [
        job(
            f"j-{number}",
            priority=draw(st.integers(-1, 1)),
            kind=draw(kinds),
            count=draw(st.integers(1, 3)),
            min_memory_bytes=draw(st.sampled_from([0, 16 * GIB])),
            labels=draw(LABELS),
        )
        for number in draw(st.permutations(range(draw(st.integers(0, 6)))))
    ]


@given(clusters(), queues())
def test_only_free_devices_of_ready_hosts_are_given_each_once_and_all_that_were_wanted(
    any_cluster: Cluster, queue: list[JobRecord]
) -> None:
    by_id = {state.device.id: state for state in any_cluster.devices}
    jobs = {waiting.id: waiting for waiting in queue}
    placements = place(queue, any_cluster)
    given_away = [device_id for placement in placements for device_id in placement.device_ids]
    assert len(given_away) == len(set(given_away))
    assert len({placement.job_id for placement in placements}) == len(placements)
    for placement in placements:
        wanted = jobs[placement.job_id].spec.devices
        states = [by_id[device_id] for device_id in placement.device_ids]
        assert len(states) == wanted.count
        assert {state.device.host for state in states} == {placement.host}
        assert any_cluster.runners[placement.host].ready
        assert len({state.device.kind for state in states}) == 1
        for state in states:
            assert state.state == "free"
            assert state.device.memory_bytes >= wanted.min_memory_bytes
            assert wanted.labels.items() <= state.device.labels.items()


@given(clusters(), queues())
def test_nobody_takes_what_a_job_before_him_keeps_and_jobs_behind_change_nothing(
    any_cluster: Cluster, queue: list[JobRecord]
) -> None:
    decision = decide(queue, any_cluster)
    assert not decision.taken.keys() & decision.kept_for.keys()
    ordered = sorted(queue, key=lambda waiting: (-waiting.spec.priority, waiting.sequence))
    for length in range(len(ordered)):
        shorter = place(ordered[:length], any_cluster)
        assert decision.placements[: len(shorter)] == shorter


@given(clusters(), queues())
def test_the_first_job_waits_only_if_no_ready_host_has_enough_free_devices_of_its_kind(
    any_cluster: Cluster, queue: list[JobRecord]
) -> None:
    if not queue:
        return
    first = min(queue, key=lambda waiting: (-waiting.spec.priority, waiting.sequence))
    possible = any(
        pool.may_start and sum(state.state == "free" for state in pool.states) >= pool.count
        for pool in pools_for(first, any_cluster)
    )
    assert (first.id in placed(queue, any_cluster)) == possible


@given(clusters(), queues())
def test_a_waiting_job_always_has_a_reason_of_one_line_that_agrees_with_never(
    any_cluster: Cluster, queue: list[JobRecord]
) -> None:
    decision = decide(queue, any_cluster)
    started = {placement.job_id for placement in decision.placements}
    for waiting in queue:
        never = can_ever(waiting, any_cluster)
        if waiting.id in started:
            assert never is None
            continue
        sentence = reason(waiting, any_cluster, decision=decision)
        assert sentence
        assert "\n" not in sentence
        assert (sentence == never) == (never is not None)


def test_thousands_of_jobs_of_one_wish_behind_a_full_cluster_look_for_devices_once() -> None:
    full = cluster(*(on(f"{host}-gpu{index}", "leased") for host in HOSTS for index in range(8)))
    queue = [job(f"j-{number}") for number in range(2000)]
    assert place(queue, full) == []
    assert len(full.pools) == 1

"""A pass through any queue over any cluster: what it remembers on its way changes nothing, and nobody gets too much.

Queues and clusters come from seeds: thousands of draws of Hypothesis for each would take a minute.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from random import Random

import pytest

from cluster_for_tests import GIB, device, job, runner
from railbus_device_manager.cluster import Cluster, Holder, Policy
from railbus_device_manager.decisions import Decision
from railbus_device_manager.placement import _Pass, decide, in_order
from railbus_device_manager.sharing import shares_needed
from railbus_device_manager.wishes import Waiting, units
from railbus_shared.contracts.jobs import JobRecord
from railbus_shared.contracts.requests import DeviceState

NOW = 1000.0
OWNERS = (None, "ann", "bob")
WISHES: list[dict[str, object]] = [
    {"kind": "gpu", "sharing": "fraction", "fraction": 0.5},
    {"kind": "gpu", "sharing": "fraction", "fraction": 0.25},
]
WISHES += [{"kind": kind, "count": count} for kind in ("gpu", "cpu") for count in (1, 1, 2, 3)]
EXTRAS: list[dict[str, object]] = [{}, {}, {"labels": {"x": "1"}}, {"min_memory_bytes": 30 * GIB}]
CLEARED: list[dict[str, str]] = [{}, {}, {"a-gpu0": "j-1"}, {"a-gpu0": "j-1", "a-gpu1": "j-1", "b-cpu0": "j-2"}]
SEEDS_EACH = 50
CHUNKS = range(8)


def queue_of(rng: Random) -> list[JobRecord]:
    return [
        job(
            f"j-{number}",
            {**rng.choice(WISHES), **rng.choice(EXTRAS)},
            owner=rng.choice(OWNERS),
            priority=rng.randrange(3),
            time_limit_s=rng.choice([None, 1.0, 5.0, 20.0]),
        )
        for number in range(rng.randrange(14))
    ]


def cluster_of(rng: Random) -> Cluster:
    holders = {name: holder_of(name, rng) for name in (f"j-{number}" for number in range(100, 107))}
    names = [f"{host}-{kind}{index}" for host in "abc" for kind in ("gpu", "cpu") for index in range(3)]
    policy = Policy(
        quotas=rng.choice([{}, {}, {"ann": 2}, {"*": 3}]),
        preempts=rng.random() < 0.5,
        reservations=rng.randrange(4),
        rooms=rng.randrange(3),
    )
    return Cluster(
        tuple(state_of(name, list(holders), rng) for name in names),
        {host: runner(host, ready=rng.random() < 0.8) for host in "abc"},
        now=NOW,
        policy=policy,
        holders=holders,
        cleared_for=rng.choice(CLEARED),
    )


def state_of(name: str, holders: list[str], rng: Random) -> DeviceState:
    shares = rng.choice([1, 4]) if "gpu" in name else 1
    word = rng.choice(["free", "free", "leased", "leased", "reclaiming", "draining"])
    held_by = rng.choice(holders) if word == "leased" else None
    info = device(name, gib=rng.choice([16, 40]), labels=rng.choice([{}, {"x": "1"}]))
    return DeviceState.model_validate(
        {
            "device": info.model_copy(update={"shares": shares}),
            "state": word,
            "holder": held_by,
            "holders": (held_by,) if held_by and shares > 1 else (),
            "free_shares": rng.randint(1, shares) if word == "free" and shares > 1 else 0,
        }
    )


def holder_of(name: str, rng: Random) -> Holder:
    ends_at = rng.choice([math.inf, NOW + 2, NOW + 10])
    return Holder(
        record=job(name, priority=rng.randrange(3)).changed(state="running", lease_epoch=1),
        owner=rng.choice(OWNERS) or "",
        units=1,
        ends_at=ends_at,
        is_certain=ends_at != math.inf and rng.random() < 0.5,
        can_be_preempted=rng.random() < 0.5,
        unsaved_s=rng.choice([0.0, 5.0]),
    )


def forgetful(queue: list[JobRecord], cluster: Cluster) -> Decision:
    """The same pass, but that it looks at everything anew for each job."""
    waiting = [Waiting.of(record) for record in queue]
    look = _Pass(cluster, waiting)
    for turn in in_order(waiting, cluster):
        look.hopeless.clear()
        look._searches.clear()
        look._no_room.clear()
        look.consider(turn)
    return look.decision


def _compare(seed: int) -> None:
    rng = Random(seed)
    cluster, queue = cluster_of(rng), queue_of(rng)
    quick, slow = decide(queue, cluster), forgetful(queue, cluster)
    assert quick.placements == slow.placements, f"seed {seed}"
    assert quick.preemptions == slow.preemptions, f"seed {seed}"
    assert quick.kept_for == slow.kept_for, f"seed {seed}"
    assert quick.expected == slow.expected, f"seed {seed}"


@pytest.mark.parametrize("chunk", CHUNKS)
def test_what_a_pass_remembers_of_earlier_jobs_changes_nothing(chunk: int) -> None:
    for seed in range(chunk * SEEDS_EACH, (chunk + 1) * SEEDS_EACH):
        _compare(seed)


@pytest.mark.parametrize("seed", [7862, 16014, 16865, 17533, 17853, 19333, 19788])
def test_what_it_remembered_too_long_once_stays_mended(seed: int) -> None:
    _compare(seed)


@pytest.mark.parametrize("chunk", CHUNKS)
def test_nobody_gets_what_is_not_free_or_more_than_all_of_it_or_than_his_quota(chunk: int) -> None:
    for seed in range(chunk * SEEDS_EACH, (chunk + 1) * SEEDS_EACH):
        rng = Random(seed)
        _check(cluster_of(rng), queue_of(rng))


def _check(cluster: Cluster, queue: list[JobRecord]) -> None:
    decision = decide(queue, cluster)
    by_id, wanted = {state.device.id: state for state in cluster.devices}, {one.id: one for one in queue}
    given_away: Counter[str] = Counter()
    used = defaultdict(float, cluster.in_use)
    assert len({one.job_id for one in decision.placements}) == len(decision.placements)
    for one in decision.placements:
        devices = wanted[one.job_id].spec.devices
        assert len(one.device_ids) == len(set(one.device_ids)) == devices.count
        used[wanted[one.job_id].spec.owner or ""] += units(devices)
        for name in one.device_ids:
            assert by_id[name].state == "free"
            assert by_id[name].device.host == one.host
            assert shares_needed(by_id[name].device, devices) in {one.shares, by_id[name].device.shares}
            given_away[name] += shares_needed(by_id[name].device, devices)
    for device_id, shares in given_away.items():
        assert shares <= (by_id[device_id].free_shares if by_id[device_id].device.shares > 1 else 1)
    for owner in {wanted[one.job_id].spec.owner or "" for one in decision.placements}:
        assert used[owner] <= cluster.policy.quota(owner)

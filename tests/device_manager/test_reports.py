"""What the buckets say, told to the facts: keys of every kind, cordons on devices, and what counts as heard."""

from __future__ import annotations

import pytest

from cluster_for_tests import TIME, device, host_report, lease, mark, runner
from railbus_device_manager.manager import ClusterFacts
from railbus_device_manager.reports import Reports
from railbus_shared.bus.bucket import Entry
from railbus_shared.bus.connection import Bus
from railbus_shared.contracts.devices import Cordon
from railbus_shared.contracts.model import Contract
from railbus_shared.leases import reclaim_key


def entries(*found: tuple[str, Contract | None, int]) -> dict[str, Entry]:
    return {key: Entry(key, value.to_map() if value is not None else {}, revision) for key, value, revision in found}


@pytest.fixture
def facts() -> ClusterFacts:
    return ClusterFacts()


@pytest.fixture
def reports(bus: Bus, facts: ClusterFacts) -> Reports:
    return Reports(bus, facts)


HOST = host_report("a", device("a-gpu0"), device("a-gpu1"))


async def test_keys_of_every_kind_are_told_and_taken_back(reports: Reports, facts: ClusterFacts) -> None:
    part = lease("a-gpu1", "j-2").changed(share=2, shares=4)
    leases = entries(
        ("a-gpu0", lease("a-gpu0", "j-1"), 1), ("a-gpu1.2", part, 2), ("a-gpu1.reclaim", mark("a-gpu1", "j-3"), 3)
    )
    cordon = Cordon(device="a-gpu1", cause="fault", reason="XID 79", by="a", cordoned_at=TIME)
    devices = entries(("a", HOST, 1), ("a.runner", runner("a"), 2), ("a.drain", None, 3), ("a-gpu1.cordon", cordon, 4))
    reports.apply(leases, devices, now=1)
    assert {one.holder for one in facts.leases_on("a-gpu1")} == {"j-2"}
    assert (set(facts.leases), set(facts.marks), set(facts.cordons)) == ({"a-gpu0", "a-gpu1.2"}, {"a-gpu1"}, {"a-gpu1"})
    report = facts.hosts["a"]
    assert report.draining
    assert [one.cordoned for one in report.devices] == [False, True]
    assert report.devices[1].health_reason == "XID 79"
    reports.apply({}, entries(("a", HOST, 5)), now=2)
    assert (facts.leases, facts.leases_on("a-gpu1"), facts.marks, facts.cordons, facts.runners) == ({}, (), {}, {}, {})
    assert facts.hosts["a"] == HOST
    reports.apply({}, {}, now=3)
    assert facts.hosts == {}


async def test_a_host_is_heard_when_its_report_is_written_while_somebody_listens(
    reports: Reports, facts: ClusterFacts
) -> None:
    heard = []
    for now, revision in ((10, 1), (11, 1), (12, 2), (13, 2)):
        reports.apply({}, entries(("a", HOST, revision)), now=now)
        heard.append(facts.host_heard_at.get("a"))
    assert heard == [None, None, 12, 12]
    reports.apply({}, {}, now=14)
    assert facts.host_heard_at == {}


async def test_a_reading_that_was_overtaken_by_a_later_one_is_neither_taken_over_nor_heard(
    reports: Reports, facts: ClusterFacts
) -> None:
    newer = host_report("a", device("a-gpu0").changed(compute_pids=(4711,)))
    busy = runner("a", ("j-1", 1))
    reports.apply({}, entries(("a", HOST, 1), ("a.runner", runner("a"), 2)), now=1)
    reports.apply({}, entries(("a", newer, 3), ("a.runner", busy, 4)), now=2)
    reports.apply({}, entries(("a", HOST, 1), ("a.runner", runner("a"), 2)), now=3)
    assert (facts.hosts["a"], facts.runners["a"]) == (newer, busy)
    assert (facts.host_heard_at["a"], facts.runner_heard_at["a"]) == (2, 2)


async def test_a_mark_is_known_at_once_and_outlives_a_reading_that_was_asked_for_before_it(
    reports: Reports, facts: ClusterFacts
) -> None:
    made = mark("a-gpu0", "j-1")
    await reports.mark(made)
    marked_s = facts.marked_at["a-gpu0"]
    assert facts.marks == {"a-gpu0": made}
    assert set(await reports.leases.snapshot()) == {reclaim_key("a-gpu0")}
    reports.apply({}, {}, now=marked_s + 1, asked_at=marked_s - 1)
    assert facts.marks == {"a-gpu0": made}
    reports.apply({}, {}, now=marked_s + 2, asked_at=marked_s + 1)
    assert facts.marks == {}


async def test_what_may_be_granted_or_not_any_more_concerns_placing_and_a_heartbeat_does_not(
    reports: Reports, facts: ClusterFacts
) -> None:
    facts.apply_host("a", HOST)
    facts.apply_runner("a", runner("a"), now=1)
    first, second = HOST.devices
    warm = HOST.changed(devices=(first.changed(temperature_c=70.0), second))
    used = HOST.changed(devices=(first.changed(compute_pids=(4711,)), second))
    lost = HOST.changed(devices=(first.changed(healthy=False), second))
    told = [HOST, HOST, warm, used, used, HOST, lost, HOST.changed(devices=(second,))]
    concerned = [reports._concerns_placing(Entry("a", one.to_map(), 1)) for one in told]
    assert concerned == [True, False, False, True, False, True, True, True]
    assert not reports._concerns_placing(Entry("a.runner", runner("a").to_map(), 1))
    assert reports._concerns_placing(Entry("a.runner", runner("a", ready=False).to_map(), 1))
    assert [reports._concerns_placing(Entry(f"a.{kind}", {}, 1)) for kind in ("drain", "cordon", "other")] == [
        True,
        True,
        False,
    ]
    facts.apply_mark("a-gpu0", mark("a-gpu0", "j-1"), now=1)
    assert [reports._concerns_placing(Entry("a", HOST.changed(devices=(second,)).to_map(), 1)) for _ in range(2)] == [
        True,
        True,
    ]


async def test_a_key_that_cannot_be_read_is_left_out(reports: Reports, facts: ClusterFacts) -> None:
    reports.apply(entries(("a-gpu0", None, 1)), entries(("a", None, 1), ("b", host_report("b"), 2)), now=1)
    assert (facts.leases, set(facts.hosts)) == ({}, {"b"})

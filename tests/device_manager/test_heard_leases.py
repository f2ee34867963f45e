"""Leases as the watch and whole readings of the bucket tell them: whichever is newer counts."""

from __future__ import annotations

import pytest

from cluster_for_tests import TIME, active, device
from railbus_device_manager.manager import ClusterFacts
from railbus_device_manager.reports import Reports
from railbus_shared.bus.bucket import Entry
from railbus_shared.bus.connection import Bus
from railbus_shared.contracts.devices import Lease
from railbus_shared.settings import CommonSettings


def _reports(facts: ClusterFacts) -> Reports:
    return Reports(Bus(CommonSettings(), name="test", inbox="_INBOX"), facts)


def _entry(revision: int, holder: str | None, key: str = "a-cpu0") -> Entry:
    if holder is None:
        return Entry(key, None, revision)
    lease = Lease(device=key, host="a", holder=holder, lease_epoch=1, nonce="n", granted_at=TIME)
    return Entry(key, lease.to_map(), revision)


def _holder(facts: ClusterFacts) -> str | None:
    lease = facts.leases.get("a-cpu0")
    return None if lease is None else lease.holder


def test_an_end_that_was_heard_is_news_and_outlives_an_older_reading() -> None:
    facts = ClusterFacts()
    reports = _reports(facts)
    assert not reports.hear_lease(_entry(1, "j-1"), now=1.0)
    assert reports.hear_lease(_entry(2, None), now=2.0)
    assert _holder(facts) is None
    reports.apply({"a-cpu0": _entry(1, "j-1")}, {}, now=2.1, asked_at=1.9)
    assert _holder(facts) is None


def test_a_grant_that_was_heard_outlives_a_reading_that_was_asked_for_before() -> None:
    facts = ClusterFacts()
    reports = _reports(facts)
    reports.hear_lease(_entry(3, "j-1"), now=2.0)
    reports.apply({}, {}, now=2.1, asked_at=1.9)
    assert _holder(facts) == "j-1"
    reports.apply({}, {}, now=3.1, asked_at=3.0)
    assert _holder(facts) is None, "it has expired, which nobody tells"


def test_what_is_heard_late_changes_nothing() -> None:
    facts = ClusterFacts()
    reports = _reports(facts)
    reports.hear_lease(_entry(5, "j-2"), now=2.0)
    assert not reports.hear_lease(_entry(4, None), now=3.0)
    assert _holder(facts) == "j-2"


def test_a_reading_that_is_newer_than_what_was_heard_counts() -> None:
    facts = ClusterFacts()
    reports = _reports(facts)
    reports.hear_lease(_entry(1, "j-1"), now=1.0)
    reports.apply({"a-cpu0": _entry(6, "j-3")}, {}, now=1.2, asked_at=0.9)
    assert _holder(facts) == "j-3"


def test_the_end_of_a_lease_whose_attempt_is_not_over_is_left_to_a_whole_reading() -> None:
    """Else a report that its runner had made before would pass for one made after."""
    facts = ClusterFacts()
    reports = _reports(facts)
    facts.apply_record("j-1", active("j-1", "a-cpu0"), now=0.5)
    reports.hear_lease(_entry(1, "j-1"), now=1.0)
    assert reports.hear_lease(_entry(2, None), now=2.0)
    assert _holder(facts) == "j-1"
    assert not facts.leaseless_since
    reports.apply({}, {}, now=3.1, asked_at=3.0)
    assert facts.leaseless_since == {"j-1": 3.1}


def test_a_lease_is_looked_for_when_its_life_is_over_since_it_was_last_heard_of() -> None:
    facts = ClusterFacts()
    reports = Reports(Bus(CommonSettings(), name="test", inbox="_INBOX"), facts, lease_ttl_s=15)
    reports.hear_lease(_entry(1, "j-1"), now=1.0)
    reports.hear_lease(_entry(2, "j-1"), now=6.0)
    assert reports.lapses() == [pytest.approx(21.1)]
    reports.hear_lease(_entry(3, None), now=8.0)
    assert reports.lapses() == []


@pytest.mark.parametrize("key", ["a-cpu0.reclaim", "a-gpu0.reclaim"])
def test_a_mark_is_no_lease(key: str) -> None:
    facts = ClusterFacts()
    assert not _reports(facts).hear_lease(_entry(1, None, key), now=1.0)
    assert device("a-cpu0").id not in facts.leases

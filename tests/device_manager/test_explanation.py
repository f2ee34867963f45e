"""Why a job waits: one headline, a reason for each host, who holds what it wants, and when it is expected to start."""

from __future__ import annotations

import pytest

from cluster_for_tests import GIB, active, device, host_report, job, lease, runner
from railbus_device_manager.cluster import Policy
from railbus_device_manager.explanation import why
from railbus_device_manager.fitting import check_fits
from railbus_device_manager.ledger import Ledger
from railbus_device_manager.manager import ClusterFacts, DeviceManager
from railbus_shared import clock
from railbus_shared.contracts.devices import DeviceInfo
from railbus_shared.contracts.jobs import JobRecord
from railbus_shared.contracts.waiting import HostReason, Why
from railbus_shared.errors import NeverFits, NotSupported

DAY_S = 86_400.0
"""The wall clock at the zero of the facts' clock."""


def manager(*records: JobRecord, policy: Policy | None = None, **devices: int) -> DeviceManager:
    """Hosts with so many GPUs each; active records have leases on their devices, all since 0."""
    made = DeviceManager(ClusterFacts(ledger=Ledger()), policy or Policy())
    for host, number in (devices or {"a": 2}).items():
        made.facts.apply_host(host, host_report(host, *(device(f"{host}-gpu{index}") for index in range(number))))
        made.facts.apply_runner(host, runner(host), now=0)
    for record in records:
        made.facts.apply_record(record.id, record.changed(state="queued", devices=(), host=None), now=0)
        made.facts.apply_record(record.id, record, now=0)
        for name in record.devices:
            made.facts.apply_lease(name, lease(name, record.id), now=0)
    return made


def ask(made: DeviceManager, record: JobRecord, *, now: float = 10.0, is_submitted: bool = True) -> Why:
    return why(record, made, now=now, wall_offset_s=DAY_S, is_submitted=is_submitted)


def runs(number: int, *devices: str, limit_s: float | None = None, owner: str | None = None) -> JobRecord:
    record = active(f"j-{number}", *devices)
    return record.changed(spec=record.spec.changed(time_limit_s=limit_s, owner=owner))


WAITS = job("j-9", kind="gpu")


def test_a_job_that_waits_for_running_ones_is_told_by_whom_until_when_and_its_place() -> None:
    ahead = job("j-3", kind="gpu", owner="bob", time_limit_s=100)
    made = manager(runs(1, "a-gpu0", limit_s=50, owner="ann"), runs(2, "a-gpu1"), ahead, WAITS)
    told = ask(made, WAITS)
    assert (told.headline, told.place, told.ahead) == ("resources", 2, ("j-3",))
    assert told.text == "waits for 1 gpu device: a has 1 leased by j-1, 1 leased by j-2"
    assert [(one.device, one.holder, one.owner, one.expected_end) for one in told.holders] == [
        ("a-gpu0", "j-1", "ann", clock.rfc3339(86_450 * clock.NS_PER_S)),
        ("a-gpu1", "j-2", None, None),
    ]
    # j-3 starts at 50 on the first device, and is gone from there at 150
    assert told.expected_start == clock.rfc3339(86_550 * clock.NS_PER_S)
    assert told.expected_basis == "the end of j-1, by its time limit, behind 1 job"


def test_without_known_ends_there_is_no_expected_start_and_the_basis_says_whose_end_is_unknown() -> None:
    told = ask(manager(runs(1, "a-gpu0"), runs(2, "a-gpu1"), WAITS), WAITS)
    assert (told.expected_start, told.expected_basis) == (None, "nobody knows when j-1 ends")


def test_a_job_that_is_about_to_start_says_where() -> None:
    told = ask(manager(WAITS), WAITS)
    assert (told.headline, told.text, told.place) == ("starting", "starts on a with a-gpu0", 1)
    assert told.expected_start == clock.rfc3339(86_410 * clock.NS_PER_S)


@pytest.mark.parametrize(
    ("record", "headline", "text"),
    [
        (WAITS.changed(cancel_requested=True), "cancelling", "is being cancelled"),
        (WAITS.changed(held_by="ann"), "held", "is held by ann, until `railbus release`"),
        (WAITS.changed(held_by="its-submitter"), "held", "is held by its submitter, until `railbus release`"),
        (job("j-9", after=("j-1",)), "dependency", "waits for job to succeed: j-1 (not known)"),
        (WAITS.changed(backoff_s=30.0, lease_epoch=1), "backoff", "is tried again in 20 s"),
    ],
)
def test_what_holds_a_job_back_whatever_is_free_is_the_headline(record: JobRecord, headline: str, text: str) -> None:
    told = ask(manager(record), record)
    assert (told.headline, told.text, told.place) == (headline, text, None)


def test_an_owner_at_his_quota_is_told_so() -> None:
    waits = job("j-9", kind="gpu", owner="ann")
    made = manager(runs(1, "a-gpu0", owner="ann"), waits, policy=Policy(quotas={"ann": 1}))
    told = ask(made, waits)
    assert (told.headline, told.text) == ("quota", "ann may use 1 device at once and uses 1")
    assert made.plan(10).placements == []


def test_what_goes_to_higher_priority_and_what_to_owners_who_use_less_are_two_words() -> None:
    first = job("j-1", kind="gpu", owner="bob", priority=5)
    waits = job("j-2", kind="gpu", owner="ann")
    assert ask(manager(first, waits, a=1), waits).headline == "priority"
    younger = job("j-3", kind="gpu", owner="bob")
    used = runs(7, "a-gpu0", owner="ann")
    made = manager(used, waits, younger, a=2)
    assert [placement.job_id for placement in made.plan(10).placements] == ["j-3"]
    assert ask(made, waits).headline == "fair_share"


def test_devices_that_are_being_cleared_are_a_word_of_their_own() -> None:
    made = manager(runs(1, "a-gpu0"), WAITS, a=1)
    made.facts.apply_lease("a-gpu0", None, now=5)
    assert ask(made, WAITS).headline == "reclaiming"


def test_a_job_for_which_others_make_room_says_who() -> None:
    waits = job("j-9", kind="gpu", priority=5)
    made = manager(runs(1, "a-gpu0", limit_s=500), waits, a=1)
    soon = ask(made, waits)
    assert (soon.headline, soon.text) == ("reclaiming", "waits for j-1 to make room for it")
    assert (soon.expected_start, soon.expected_basis) == (None, "as soon as j-1 has saved and ended")
    made.facts.apply_record("j-1", runs(1, "a-gpu0").changed(preempted_by="j-9"), now=11)
    assert made.plan(12).preemptions == []
    assert ask(made, waits, now=12).text == soon.text


def test_every_host_has_its_own_reason() -> None:
    waits = job("j-9", kind="gpu", count=2)
    made = manager(runs(1, "a-gpu0"), waits, a=2, b=1, c=2, d=2, e=2)
    made.facts.apply_host("c", host_report("c", device("c-gpu0"), device("c-gpu1", healthy=False)))
    made.facts.apply_runner("d", runner("d", ready=False), now=0)
    made.facts.apply_runner("e", runner("e", entrypoints=("regressor",)), now=0)
    assert ask(made, waits).hosts == (
        HostReason(host="a", word="resources", text="has 1 free, 1 leased by j-1", fitting=2, free=1),
        HostReason(host="b", word="no_such_device", text="has 1 of 2 gpu devices", fitting=1, free=0),
        HostReason(host="c", word="out_of_service", text="c-gpu1 is unhealthy (GPU is lost)", fitting=2, free=0),
        HostReason(
            host="d", word="runner_not_ready", text="has 2 free, but its runner is not ready", fitting=2, free=2
        ),
        HostReason(host="e", word="no_entrypoint", text="its runner does not offer 'classifier'", fitting=2, free=0),
    )


def test_a_device_that_somebody_has_and_nobody_gets_afterwards_is_out_of_service_and_has_no_end() -> None:
    made = manager(runs(1, "a-gpu0"), waits := job("j-9", kind="gpu"))
    made.facts.apply_host("a", host_report("a", device("a-gpu0"), draining=True), heard_at=0)
    made.facts.apply_lease("a-gpu0", lease("a-gpu0", "j-1"), now=0)
    told = ask(made, waits)
    assert (told.headline, told.expected_start, told.can_ever_start) == ("out_of_service", None, True)
    assert told.text == "waits for 1 gpu device in order: a-gpu0 is draining"


def test_a_job_whose_leases_are_granted_does_not_wait_for_itself() -> None:
    made = manager(WAITS, a=1)
    made.facts.apply_lease("a-gpu0", lease("a-gpu0", WAITS.id), now=0)
    told = ask(made, WAITS)
    assert (told.headline, told.text) == ("starting", "is being placed on a")
    made.facts.apply_lease("a-gpu0", lease("a-gpu0", WAITS.id).changed(lease_epoch=0), now=1)  # of a person's
    assert ask(made, WAITS).headline == "resources"


def test_a_job_that_does_not_wait_says_what_it_does() -> None:
    record = runs(1, "a-gpu0")
    told = ask(manager(record), record)
    assert (told.headline, told.state, told.text) == ("not_waiting", "running", "is running on a with a-gpu0")
    failed = record.changed(state="failed", reason="exit code 3")
    assert ask(manager(), failed).text == "has failed: exit code 3"


def test_a_dry_run_looks_at_the_job_as_the_youngest_and_leaves_the_queue_as_it_is() -> None:
    made = manager(job("j-1", kind="gpu"), a=1)
    new = job("j-9", kind="gpu")
    told = ask(made, new, is_submitted=False)
    assert (told.job, told.place, told.headline) == (None, 2, "priority")
    assert set(made.facts.ledger.waiting) == {"j-1"}


def test_what_no_host_can_ever_meet_is_told_of_a_job_that_waits_for_hosts() -> None:
    record = job("j-9", kind="gpu", count=3)
    told = ask(manager(record), record)
    assert (told.headline, told.can_ever_start) == ("no_such_device", False)
    assert told.text == "no host has 3 gpu devices; a has the most: 2"


def test_reasons_are_given_for_the_jobs_that_are_asked_for() -> None:
    made = manager(runs(1, "a-gpu0"), job("j-2", kind="gpu"), job("j-3", kind="gpu"), a=1)
    assert made.reasons(0, among=["j-3", "j-1", "j-77"]) == {"j-3": "waits for 1 gpu device: a has 1 leased by j-1"}


# --- refused at submission -------------------------------------------------------------------------------------------

DEVICES = (device("a-gpu0"), device("a-gpu1"), device("b-gpu0", gib=40), device("b-cpu0"))


def shared(found: DeviceInfo) -> DeviceInfo:
    return found.changed(shares=4)


@pytest.mark.parametrize(
    ("wanted", "field", "value", "largest"),
    [
        ({"kind": "gpu", "count": 3}, "devices.count", 3, 2),
        ({"count": 3}, "devices.count", 3, 2),
        ({"kind": "gpu", "min_memory_bytes": 80 * GIB}, "devices.min_memory_bytes", 80 * GIB, 40 * GIB),
        ({"kind": "gpu", "count": 2, "min_memory_bytes": 40 * GIB}, "devices.count", 2, 1),
        ({"kind": "gpu", "labels": {"zone": "b"}}, "devices.labels", "zone=b", ""),
        ({"kind": "gpu", "sharing": "fraction", "fraction": 0.5}, "devices.sharing", "fraction", "exclusive"),
        ({"kind": "cpu", "sharing": "fraction", "fraction": 0.5}, "devices.sharing", "fraction", "exclusive"),
    ],
)
def test_a_request_that_no_known_host_can_meet_is_refused_with_the_most_that_could_be(
    wanted: dict[str, object], field: str, value: object, largest: object
) -> None:
    with pytest.raises(NeverFits) as caught:
        check_fits(job("j-1", wanted).spec, DEVICES, {})
    assert caught.value.details == {"field": field, "value": value, "largest": largest}
    assert field in caught.value.message
    assert "wait_for_hosts" in caught.value.hint


@pytest.mark.parametrize(
    "wanted",
    [
        {},
        {"kind": "gpu", "count": 2},
        {"kind": ["gpu", "cpu"], "min_memory_bytes": 16 * GIB},
        {"kind": ["cpu", "gpu"], "count": 2},
    ],
)
def test_a_request_that_one_host_could_meet_is_not_refused(wanted: dict[str, object]) -> None:
    check_fits(job("j-1", wanted).spec, DEVICES, {})


def test_busy_broken_and_draining_devices_are_no_reason_to_refuse() -> None:
    check_fits(job("j-1", kind="gpu").spec, (device("a-gpu0", healthy=False),), {"a": runner("a", ready=False)})


def test_a_part_of_a_shared_gpu_fits() -> None:
    half = job("j-1", kind="gpu", sharing="fraction", fraction=0.5)
    check_fits(half.spec, (shared(device("a-gpu0")),), {})


def test_where_nothing_is_known_nothing_is_refused() -> None:
    check_fits(job("j-1", kind="gpu", count=64).spec, (), {})


def test_a_job_over_several_hosts_is_refused_as_not_supported_only_where_one_host_is_not_enough() -> None:
    with pytest.raises(NotSupported) as caught:
        check_fits(job("j-1", kind="gpu", count=3, same_host=False).spec, DEVICES, {})
    assert caught.value.details == {"field": "devices.count", "value": 3, "largest": 2}
    with pytest.raises(NeverFits):
        check_fits(job("j-1", kind="gpu", count=4, same_host=False).spec, DEVICES, {})
    check_fits(job("j-1", kind="gpu", count=2, same_host=False).spec, DEVICES, {})


def test_a_host_that_does_not_report_any_more_is_remembered() -> None:
    made = manager(a=2)
    made.facts.apply_host("a", None)
    assert [found.id for found in made.facts.known_devices()] == ["a-gpu0", "a-gpu1"]
    made.facts.apply_host("a", host_report("a", device("a-gpu0")))
    assert [found.id for found in made.facts.known_devices()] == ["a-gpu0"]

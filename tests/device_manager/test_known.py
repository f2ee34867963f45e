"""What a device_manager knows of jobs, however many there are, and lists of them that fit into a message."""

from __future__ import annotations

import pytest

from railbus_device_manager.job_requests import fitting
from railbus_device_manager.known import KnownJobs
from railbus_shared import clock, wire
from railbus_shared.contracts.jobs import JobRecord
from railbus_shared.contracts.requests import JobList, ListJobs
from railbus_shared.records import HeldRecord
from records_for_tests import record, spec


def _job(number: int, **fields: object) -> JobRecord:
    submitted = clock.rfc3339(number * clock.NS_PER_S)
    return record(**{"id": f"job-{number}", "submitted_at": submitted, "sequence": number, **fields})  # type: ignore[arg-type]


def _known(*records: JobRecord) -> KnownJobs:
    known = KnownJobs()
    for revision, one in enumerate(records, start=1):
        assert known.accept(HeldRecord(one, revision))
    return known


@pytest.mark.parametrize("state", ["queued", "running", "succeeded", "failed"])
def test_a_record_comes_back_as_it_was_told(state: str) -> None:
    told = _job(1, state=state, end_cause="ok", ended_at=clock.now())
    assert [one.record() for one in _known(told)] == [told]


def test_an_older_revision_is_no_news_whatever_the_clocks_say() -> None:
    known = _known(_job(1))
    younger = _job(1, state="placed", changed_at=clock.rfc3339(0))
    assert known.accept(HeldRecord(younger, 7))
    assert not known.accept(HeldRecord(_job(1, changed_at=clock.now()), 7))
    assert not known.accept(HeldRecord(_job(1, changed_at=clock.now()), 3))
    assert [one.record() for one in known] == [younger]


def test_a_list_is_newest_first_and_can_be_read_on_to_its_end() -> None:
    known = _known(*(_job(number, state="succeeded" if number % 2 else "queued") for number in (3, 1, 4, 2, 5)))
    first, total = known.newest(ListJobs(limit=2))
    assert ([one.id for one in first], total) == (["job-5", "job-4"], 5)
    then, total = known.newest(ListJobs(limit=2, before=first[-1].id))
    assert ([one.id for one in then], total) == (["job-3", "job-2"], 5)
    assert [one.id for one in known.newest(ListJobs(states=("succeeded",)))[0]] == ["job-5", "job-3", "job-1"]


def test_a_list_is_of_an_owner_or_of_a_group() -> None:
    adas, group = _job(1, spec=spec(owner="ada")), _job(2, spec=spec(owner="ben", group="sweep"))
    known = _known(adas, group, _job(3))
    assert known.newest(ListJobs(owner="ada")) == ([adas], 1)
    assert known.newest(ListJobs(group="sweep")) == ([group], 1)


@pytest.mark.parametrize("encoding", wire.Encoding)
@pytest.mark.parametrize("value", ["x" * 3000, list(range(1000)), [0.1] * 500], ids=["text", "numbers", "fractions"])
def test_five_hundred_large_records_are_cut_to_what_a_message_takes(value: object, encoding: wire.Encoding) -> None:
    records = [_job(number, spec=spec(params={"value": value})) for number in range(500)]
    shown = list(fitting(records))
    assert shown == records[: len(shown)]
    assert 50 < len(shown) < 500
    assert len(wire.encode(JobList(jobs=tuple(shown), total=500).to_map(), encoding=encoding)) <= wire.MAX_BYTES


def test_five_hundred_plain_records_fit() -> None:
    assert len(list(fitting(_job(number) for number in range(500)))) == 500

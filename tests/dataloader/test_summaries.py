"""What the bucket of datasets says, whoever writes it when."""

from __future__ import annotations

import asyncio

import pytest

from railbus_dataloader.summaries import Removed, Summaries, with_host, without_host
from railbus_shared import clock
from railbus_shared.bus.bucket import Bucket
from railbus_shared.bus.connection import Bus
from railbus_shared.contracts.requests import DatasetSummary, SplitSummary


def summary(*hosts: str, version: str = "0", name: str = "d") -> DatasetSummary:
    return DatasetSummary(
        dataset=name,
        format="columns",
        samples=1,
        bytes=1,
        num_shards=1,
        splits={"train": SplitSummary(samples=1)},
        columns=("x",),
        index_sha256=version * 64,
        hosts=hosts,
        described_at=clock.rfc3339(0),
    )


@pytest.mark.parametrize(
    ("there", "mine", "is_news", "expected"),
    [
        (None, summary("a"), False, summary("a")),
        (summary("a"), summary("a"), True, None),
        (summary("b"), summary("a"), False, summary("a", "b")),
        (summary("b", version="1"), summary("a"), True, summary("a")),
        (summary("b", version="1"), summary("a"), False, None),
        (summary("a", "b", version="1"), summary("a"), False, summary("a")),
    ],
)
def test_a_host_is_added_to_a_summary_of_its_own_version(
    there: DatasetSummary | None, mine: DatasetSummary, is_news: bool, expected: DatasetSummary | None
) -> None:
    assert with_host(there, mine, is_news=is_news) == expected


@pytest.mark.parametrize(
    ("there", "expected"),
    [(summary("a", "b"), summary("b")), (summary("a"), Removed()), (summary("b"), None)],
)
def test_a_host_is_taken_out_and_a_summary_without_hosts_is_removed(
    there: DatasetSummary, expected: DatasetSummary | Removed | None
) -> None:
    assert without_host(there, "a") == expected


async def test_no_host_writes_over_another_however_many_write_at_once(bus: Bus) -> None:
    bucket = Bucket(bus, bus.subjects.datasets)
    hosts = [f"h{number}" for number in range(8)]
    all_hosts = {host: Summaries(bucket, host=host) for host in hosts}
    for _ in range(2):
        async with asyncio.TaskGroup() as tasks:
            for host, summaries in all_hosts.items():
                tasks.create_task(summaries.tell(summary(host)))
        entry = await bucket.get("d")
        assert entry is not None
        assert DatasetSummary.parse(entry.value or {}).hosts == tuple(hosts)
        async with asyncio.TaskGroup() as tasks:
            for summaries in all_hosts.values():
                tasks.create_task(summaries.withdraw_others(set()))
        assert await bucket.get("d") is None


async def test_what_cannot_be_read_is_written_anew_and_news_are_told_once(bus: Bus) -> None:
    bucket = Bucket(bus, bus.subjects.datasets)
    await bucket.put("d", {"v": 7})
    summaries = Summaries(bucket, host="a")
    assert await summaries.tell(summary("a"))
    assert not await summaries.tell(summary("a"))
    assert await summaries.tell(summary("a", version="1"))
    assert await summaries.withdraw_others({"d"}) == []
    assert await summaries.withdraw_others({"e"}) == ["d"]

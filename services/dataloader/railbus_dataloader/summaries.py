"""What the bucket of datasets says of each: a summary, and the hosts that have this very version.

All dataloaders write the same keys, so each changes them by compare-and-set: it adds its host to a summary of its own
version, puts its own in place of one of another version when that is news, and takes its host out where it no longer
has the dataset. A summary without hosts is removed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

from railbus_shared.bus.bucket import Bucket, Entry, Write
from railbus_shared.contracts.requests import DatasetSummary
from railbus_shared.errors import RequestTimeout, RevisionConflict, WireError
from railbus_shared.names import key_token

_MAX_TRIES: Final = 16


@dataclass(frozen=True)
class Removed:
    """Nobody has the dataset any more."""


_Change = Callable[[DatasetSummary | None], DatasetSummary | Removed | None]


def with_host(there: DatasetSummary | None, mine: DatasetSummary, *, is_news: bool) -> DatasetSummary | None:
    """The summary as it should be, from the one that is there and that of this host; None to leave it."""
    if there is None:
        return mine
    if there.index_sha256 != mine.index_sha256:
        return mine if is_news or set(mine.hosts) <= set(there.hosts) else None
    if set(mine.hosts) <= set(there.hosts):
        return None
    return there.changed(hosts=tuple(sorted({*there.hosts, *mine.hosts})))


def without_host(there: DatasetSummary, host: str) -> DatasetSummary | Removed | None:
    """The summary without a host that has the dataset no longer; None to leave it."""
    if host not in there.hosts:
        return None
    left = tuple(one for one in there.hosts if one != host)
    return there.changed(hosts=left) if left else Removed()


class Summaries:
    """The bucket of datasets, as one host writes it."""

    def __init__(self, bucket: Bucket, *, host: str) -> None:
        self._bucket = bucket
        self._host = host
        self._told: dict[str, str] = {}  # by dataset: the version that was told last

    async def tell(self, mine: DatasetSummary) -> bool:
        """Say that this host has a dataset; whether that was news. Raises TransientError."""
        is_news = self._told.get(mine.dataset) != mine.index_sha256
        is_written = await self._change(mine.dataset, lambda there: with_host(there, mine, is_news=is_news))
        self._told[mine.dataset] = mine.index_sha256
        return is_news or is_written

    async def withdraw_others(self, here: set[str]) -> list[str]:
        """Take this host out of the summaries of datasets that it does not have; their names. Raises TransientError."""
        gone: list[str] = []
        for entry in (await self._bucket.read_all()).values():
            there = _parsed(entry)
            if there is None or there.dataset in here or self._host not in there.hosts:
                continue
            self._told.pop(there.dataset, None)
            await self._change(there.dataset, self._without_me)
            gone.append(there.dataset)
        return gone

    def _without_me(self, there: DatasetSummary | None) -> DatasetSummary | Removed | None:
        return without_host(there, self._host) if there is not None else None

    async def _change(self, dataset: str, change: _Change) -> bool:
        """Change a summary, reading it again for as long as others are quicker; whether anything was written."""
        key = key_token(dataset)
        for _ in range(_MAX_TRIES):
            entry = await self._bucket.get_with_deleted(key)
            wanted = change(_parsed(entry))
            if wanted is None:
                return False
            value: Mapping[str, object] | None = None if isinstance(wanted, Removed) else wanted.to_map()
            try:
                await self._bucket.write(Write(key, value, entry.revision if entry is not None else 0))
            except RevisionConflict:
                continue
            return True
        raise RequestTimeout(f"dataset {dataset!r} was changed by others {_MAX_TRIES} times in a row", hint="try again")


def _parsed(entry: Entry | None) -> DatasetSummary | None:
    """None where there is no summary, or none that can be read: it is written anew."""
    if entry is None or entry.value is None:
        return None
    try:
        return DatasetSummary.parse(entry.value)
    except WireError:
        return None

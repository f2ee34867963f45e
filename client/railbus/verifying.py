"""Which shards of a dataset are not what its index says."""

from __future__ import annotations

from collections.abc import Iterator

from railbus.importers.source import Report
from railbus.reading_rows import check_shard
from railbus_shared.data.index import DatasetIndex
from railbus_shared.errors import ShardCorrupt
from railbus_shared.layout import Layout


def damaged(layout: Layout, index: DatasetIndex, *, report: Report) -> Iterator[ShardCorrupt]:
    """Hash every shard and sidecar, and give an error for each that is damaged or missing."""
    done = 0
    report("hashing", 0, index.file.bytes)
    for shard in index.file.shards:
        try:
            check_shard(layout.shards(index.schema.name), shard)
        except ShardCorrupt as exc:
            yield exc
        done += shard.bytes
        report("hashing", done, index.file.bytes)

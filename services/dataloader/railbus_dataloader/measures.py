"""What the dataloader counts, for Prometheus."""

from __future__ import annotations

from dataclasses import dataclass

from prometheus_client import Counter, Gauge, Histogram

from railbus_shared.contracts.model import JsonMap
from railbus_shared.metrics import WAITS, Metrics


@dataclass(frozen=True)
class Measures:
    """All metrics that only the dataloader has."""

    sessions: Gauge
    cache_bytes: Gauge
    cache_budget_bytes: Gauge
    cache_waiting: Gauge
    cache_hits: Counter
    cache_misses: Counter
    cache_evictions: Counter
    fetched_bytes: Counter
    sent_bytes: Counter
    ahead_bytes: Counter
    shards_verified: Counter
    hashed_bytes: Counter
    damaged: Counter
    fetch_seconds: Histogram

    @classmethod
    def of(cls, metrics: Metrics) -> Measures:
        return cls(
            sessions=metrics.gauge("data_sessions", "Streams that trainers of this host have open."),
            cache_bytes=metrics.gauge("data_cache_bytes", "Bytes in the cache, those being fetched in full."),
            cache_budget_bytes=metrics.gauge("data_cache_budget_bytes", "Bytes that the cache may have."),
            cache_waiting=metrics.gauge("data_cache_waiting", "Shards that wait for room, once a session."),
            cache_hits=metrics.counter("data_cache_hits", "Readers whose shard was in the cache."),
            cache_misses=metrics.counter("data_cache_misses", "Readers who waited for a shard to be fetched."),
            cache_evictions=metrics.counter("data_cache_evictions", "Shards removed from the cache."),
            fetched_bytes=metrics.counter("data_fetched_bytes", "Bytes of shards fetched into the cache."),
            sent_bytes=metrics.counter("data_sent_bytes", "Bytes of files sent to other hosts."),
            ahead_bytes=metrics.counter("data_ahead_bytes", "Bytes of shards made ready ahead of readers."),
            shards_verified=metrics.counter("data_shards_verified", "Files hashed that had the hash of their index."),
            hashed_bytes=metrics.counter("data_hashed_bytes", "Bytes of these files."),
            damaged=metrics.counter(
                "data_damaged", "Requests that met a shard or index that is not what it should be."
            ),
            fetch_seconds=metrics.histogram(
                "data_fetch_seconds", "Time to fetch one shard into the cache.", "source", buckets=WAITS
            ),
        )

    def hashed(self, size_bytes: int) -> None:
        """A file was hashed and is whole."""
        self.shards_verified.inc()
        self.hashed_bytes.inc(size_bytes)

    def heard(self, event: JsonMap) -> None:
        """A fact that the dataloader tells."""
        kind, told = event["type"], event.get("data")
        if kind == "dataset.damaged":
            self.damaged.inc()
        elif kind == "dataset.fetched" and isinstance(told, dict):
            seconds = told.get("seconds")
            if isinstance(seconds, int | float):
                self.fetch_seconds.labels(str(told.get("source"))).observe(seconds)

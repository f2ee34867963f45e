"""20 GB of data through a cache of 2 GB, from one simulated host to another: `make soak`, some minutes."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from railbus_shared.bus.connection import Bus
from railbus_shared.layout import Layout
from railbus_shared.settings import CommonSettings
from remote_training import ROW_BYTES, Case, read_locally, train_far_away

CACHE_BYTES = 2 << 30
"""What all other sizes follow from."""
CASE = Case(
    samples=10 * CACHE_BYTES // ROW_BYTES,
    shard_bytes=CACHE_BYTES // 8,
    cache_bytes=CACHE_BYTES,
    window=2,
    timeout_s=1500,
)


@pytest.mark.timeout(3600)
async def test_20_gb_are_trained_on_through_a_cache_of_2_gb(
    bus: Bus, common: CommonSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    try:
        outcome = await train_far_away(common, tmp_path, CASE)
        print(f"\ntrained in {outcome.trained_s:.0f} s; the cache held at most {outcome.peak_bytes} of {CACHE_BYTES}")
        assert min(shard.bytes for shard in outcome.index.file.shards) >= CASE.shard_bytes
        assert 3 * CASE.shard_bytes < outcome.peak_bytes <= CASE.cache_bytes
        assert outcome.read == read_locally(Layout(tmp_path / "a"), CASE)
        assert (outcome.read["samples"], outcome.read["distinct"]) == (CASE.samples, CASE.samples)
    finally:
        for host in ("a", "b"):
            shutil.rmtree(tmp_path / host, ignore_errors=True)

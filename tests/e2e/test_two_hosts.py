"""A host trains on what lies on another one only, and its cache never holds more than it may."""

from __future__ import annotations

from pathlib import Path

import pytest

from railbus_shared.bus.connection import Bus
from railbus_shared.layout import Layout
from railbus_shared.settings import CommonSettings
from remote_training import ROW_BYTES, Case, read_locally, train_far_away

CASE = Case(samples=4096, shard_bytes=1 << 20, cache_bytes=7 << 20, window=3, timeout_s=90)


@pytest.mark.timeout(150)  # starts services that import torch, and trains
async def test_a_job_streams_data_of_another_host_through_a_cache_that_is_too_small_for_it(
    bus: Bus, common: CommonSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    outcome = await train_far_away(common, tmp_path, CASE)
    assert CASE.samples * ROW_BYTES > 4 * CASE.cache_bytes
    assert outcome.looks > 100
    assert 3 * CASE.shard_bytes < outcome.peak_bytes <= CASE.cache_bytes
    assert outcome.read == read_locally(Layout(tmp_path / "a"), CASE)
    assert (outcome.read["samples"], outcome.read["distinct"]) == (CASE.samples, CASE.samples)
    assert outcome.metas
    assert {meta["index_sha256"] for meta in outcome.metas} == {outcome.index.sha256}

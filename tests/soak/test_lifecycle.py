"""Ten thousand histories of a cluster on which everything goes wrong."""

from __future__ import annotations

import pytest

from simulated_cluster import run_seed, simulated

SEEDS = range(1000, 11_000)
"""Others than those of the ordinary suite."""


@pytest.mark.timeout(3600)
def test_no_promise_is_broken_in_ten_thousand_histories(monkeypatch: pytest.MonkeyPatch) -> None:
    with simulated(monkeypatch) as told:
        broken = {seed: found for seed in SEEDS if (found := run_seed(told, seed).recorder.broken)}
    assert broken == {}

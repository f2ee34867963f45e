"""The quality of placement on a small workload, within the bounds of the benchmark's range file."""

from __future__ import annotations

import functools
from collections import defaultdict

import pytest
from benchmarks.scheduler import as_one_owner, quality
from benchmarks.scheduling.bounds import bounds, problems, settings_of
from benchmarks.scheduling.workload import workload

Figures = dict[str, dict[str, float]]


@functools.cache
def found(scenario: str) -> Figures:
    run = settings_of(scenario)
    jobs = workload(run["jobs"], seed=run["seed"])
    return quality(as_one_owner(jobs) if scenario == "small_one_owner" else jobs)


@pytest.mark.parametrize("scenario", ["small_six_owners", "small_one_owner"])
def test_placement_is_as_good_as_the_range_file_demands(scenario: str) -> None:
    figures = found(scenario)
    assert problems(scenario, figures["railbus"], figures) == []


def test_plain_order_and_backfilling_without_shares_would_not_be() -> None:
    figures = found("small_six_owners")
    assert problems("small_six_owners", figures["fcfs"], figures)
    assert problems("small_six_owners", figures["easy"], figures)


@pytest.mark.parametrize("scenario", ["pass", "six_owners", "one_owner", "small_six_owners", "small_one_owner"])
def test_every_bound_says_why(scenario: str) -> None:
    figures: Figures = defaultdict(lambda: defaultdict(float))
    assert all(bound.why for bound in bounds(scenario, figures))

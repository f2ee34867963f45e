"""Times on the wire, and the clock of deadlines."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from railbus_shared import clock

_YEAR_1_NS = -62_135_596_800 * clock.NS_PER_S
_END_NS = 253_402_300_800 * clock.NS_PER_S


@pytest.mark.parametrize(
    ("ns", "text"),
    [
        (0, "1970-01-01T00:00:00.000000000Z"),
        (1, "1970-01-01T00:00:00.000000001Z"),
        (-1, "1969-12-31T23:59:59.999999999Z"),
        (1_795_470_335_000_000_001, "2026-11-23T21:45:35.000000001Z"),
        (951_782_400 * clock.NS_PER_S, "2000-02-29T00:00:00.000000000Z"),
        (_YEAR_1_NS, "0001-01-01T00:00:00.000000000Z"),
        (_END_NS - 1, "9999-12-31T23:59:59.999999999Z"),
    ],
)
def test_a_time_is_spelled_with_nine_decimals_in_utc(ns: int, text: str) -> None:
    assert clock.rfc3339(ns) == text
    assert clock.parse_rfc3339(text) == ns


@given(st.integers(_YEAR_1_NS, _END_NS - 1))
def test_every_nanosecond_survives_a_round_trip(ns: int) -> None:
    assert clock.parse_rfc3339(clock.rfc3339(ns)) == ns


@pytest.mark.parametrize(
    ("text", "ns"),
    [
        ("1970-01-01T00:00:01Z", 10**9),
        ("1970-01-01T00:00:01.5Z", 1_500_000_000),
        ("1970-01-01T00:00:01.000001+00:00", 1_000_001_000),
    ],
)
def test_fewer_decimals_are_read(text: str, ns: int) -> None:
    assert clock.parse_rfc3339(text) == ns


@pytest.mark.parametrize(
    "text",
    [
        "", "now", "1970-01-01", "1970-01-01T00:00:00", "1970-01-01T00:00:00+01:00", "1970-01-01 00:00:00Z",
        "1970-01-01T00:00:00.Z", "1970-01-01T00:00:00.0000000000Z", "1970-13-01T00:00:00Z", "1970-01-01T25:00:00Z",
        "1970-02-30T00:00:00Z", "1970-01-01T00:00:00Z\n", "0000-01-01T00:00:00Z", "1970-01-01T00:00:60Z",
        "١٩٧٠-01-01T00:00:00Z", "1970-01-01T00:00:00.١Z", "1970-01-01T00:00:00z",
    ],
)  # fmt: skip
def test_anything_but_a_time_in_utc_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        clock.parse_rfc3339(text)


def test_now_is_now() -> None:
    before, now, after = time.time_ns(), clock.parse_rfc3339(clock.now()), time.time_ns()
    assert before <= now <= after


def test_the_clock_of_deadlines_goes_forward() -> None:
    first = clock.boottime_s()
    time.sleep(0.01)
    assert 0.01 <= clock.boottime_s() - first < 5

"""Time, spelled one way: RFC 3339 in UTC with nine decimals on the wire, and CLOCK_BOOTTIME for deadlines.

A deadline is never kept as wall-clock time: the wall clock jumps, and the monotonic clock stands still in suspend.
"""

from __future__ import annotations

import re
import time
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from typing import Final

_RFC3339: Final = re.compile(r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)(?:\.(\d{1,9}))?(?:Z|\+00:00)\Z", re.ASCII)
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
NS_PER_S: Final = 1_000_000_000


def now_ns() -> int:
    """Nanoseconds since 1970 in UTC."""
    return time.time_ns()


def rfc3339(ns: int) -> str:
    """`ns` since 1970 as RFC 3339, for instance `2026-11-23T21:45:35.000000001Z`."""
    seconds, rest = divmod(ns, NS_PER_S)
    return f"{_second(seconds)}.{rest:09d}Z"


@lru_cache(maxsize=64)
def _second(seconds: int) -> str:
    return (_EPOCH + timedelta(seconds=seconds)).isoformat()[:19]


def now() -> str:
    """The present moment as the wire spells it."""
    return rfc3339(now_ns())


def parse_rfc3339(text: str) -> int:
    """Nanoseconds since 1970; raises ValueError for anything but RFC 3339 in UTC."""
    match = _RFC3339.match(text)
    if match is None:
        raise ValueError(f"{text!r} is not an RFC 3339 time in UTC")
    return _second_ns(match[1]) + int((match[2] or "0").ljust(9, "0"))


@lru_cache(maxsize=64)
def _second_ns(text: str) -> int:
    moment = datetime.fromisoformat(text).replace(tzinfo=UTC)
    return int((moment - _EPOCH).total_seconds()) * NS_PER_S


def boottime_s() -> float:
    """Seconds on CLOCK_BOOTTIME: never set by hand, counts suspended time, equal in all processes of a host."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)

"""Which day an event goes to, and when what is open of a day is to be closed: dates and times, no files."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from datetime import UTC, date, datetime
from typing import Final, Literal

from railbus_shared import clock
from railbus_telemetry.lines import DAY_NS

Rotation = Literal["hourly", "daily"]

PERIOD_NS: Final[dict[Rotation, int]] = {"hourly": 3600 * clock.NS_PER_S, "daily": DAY_NS}
_IDLE_NS: Final = 60 * clock.NS_PER_S
_AHEAD_DAYS: Final = 1
_BEHIND_DAYS: Final = 30


@dataclass
class Period:
    """What is known of a file that grows."""

    first_ns: int
    """When its first line was written."""
    last_ns: int

    def has_ended(self, day: date, *, now_ns: int, period_ns: int) -> bool:
        """Whether the clock has left it; of another day than the current one also when no more comes for a minute."""
        if self.first_ns // period_ns != now_ns // period_ns:
            return True
        return day != date_of(now_ns - now_ns % DAY_NS) and not 0 <= now_ns - self.last_ns < _IDLE_NS


def day_of(day_ns: int, *, now_ns: int) -> date:
    """The day to whose log an event goes: its own, unless its clock must have been wrong."""
    today_ns = now_ns - now_ns % DAY_NS
    is_possible = -_BEHIND_DAYS * DAY_NS <= day_ns - today_ns <= _AHEAD_DAYS * DAY_NS
    return date_of(day_ns if is_possible else today_ns)


@functools.lru_cache(maxsize=64)
def date_of(day_ns: int) -> date:
    """The day that begins then."""
    return datetime.fromtimestamp(day_ns // clock.NS_PER_S, tz=UTC).date()

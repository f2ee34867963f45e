"""When to start again what has ended: soon at first, later and later, soon again after a spell of health."""

from __future__ import annotations

from typing import Final

FIRST_S: Final = 0.25
LONGEST_S: Final = 10.0
HEALTHY_S: Final = 30.0


def delay_s(failures: int) -> float:
    """Wait before the next start, after so many failures in a row (at least one)."""
    return min(LONGEST_S, FIRST_S * 2.0 ** min(failures - 1, 16))


class Backoff:
    """The failures of one process; `now_s` is any clock that only goes forward."""

    def __init__(self) -> None:
        self.failures = 0
        self.due_s: float | None = None
        """When to start it again; None while it runs."""
        self._started_s = 0.0

    def started(self, now_s: float) -> None:
        self._started_s, self.due_s = now_s, None

    def ended(self, now_s: float, *, hopeless: bool = False) -> float:
        """The wait until it is started again. `hopeless`: it said that only a changed setting will help."""
        self.failures = 1 if now_s - self._started_s >= HEALTHY_S else self.failures + 1
        wait_s = LONGEST_S if hopeless else delay_s(self.failures)
        self.due_s = now_s + wait_s
        return wait_s

    def is_due(self, now_s: float) -> bool:
        return self.due_s is not None and now_s >= self.due_s

"""How long jobs take: by their time limits, and by how long jobs of the same entrypoint and model took."""

from __future__ import annotations

import math
import statistics
from collections import OrderedDict
from dataclasses import dataclass
from typing import Final

from railbus_shared import clock
from railbus_shared.contracts.jobs import JobRecord, JobSpec

_KEPT: Final = 20
_ENOUGH: Final = 3
_MOST_KINDS: Final = 1000


@dataclass(frozen=True)
class _Kind:
    """The last jobs of one entrypoint and model."""

    seconds: tuple[float, ...] = ()
    longest_s: float = math.inf
    """Infinite as long as too few are known."""
    median_s: float = math.inf

    def with_one(self, seconds: float) -> _Kind:
        known = (*self.seconds, seconds)[-_KEPT:]
        return _Kind(known, max(known), statistics.median(known)) if len(known) >= _ENOUGH else _Kind(known)


_UNKNOWN: Final = _Kind()


class RunTimes:
    """Seconds that the last successful jobs of each kind took; jobs of one entrypoint and model are of one kind."""

    def __init__(self) -> None:
        self._kinds: OrderedDict[tuple[str, str], _Kind] = OrderedDict()

    def add(self, record: JobRecord) -> None:
        """Remember a record that has ended; one that was not run through in one attempt tells nothing."""
        if record.state != "succeeded" or record.attempt > 1 or record.started_at is None or record.ended_at is None:
            return
        took_ns = clock.parse_rfc3339(record.ended_at) - clock.parse_rfc3339(record.started_at)
        kind = (record.spec.entrypoint, record.spec.model)
        self._kinds[kind] = self._kinds.get(kind, _UNKNOWN).with_one(max(0, took_ns) / clock.NS_PER_S)
        self._kinds.move_to_end(kind)
        while len(self._kinds) > _MOST_KINDS:
            self._kinds.popitem(last=False)

    def longest_s(self, run_kind: tuple[str, str]) -> float:
        """The longest that the last jobs of an entrypoint and model took; infinite if unknown."""
        return self._kinds.get(run_kind, _UNKNOWN).longest_s

    def expected_s(self, spec: JobSpec) -> float:
        """What a job takes, probably: the median of jobs like it, and not more than its time limit."""
        return min(_limit_s(spec), self._like(spec).median_s)

    def basis(self, spec: JobSpec) -> str:
        """What `expected_s` rests on; empty if it is unknown."""
        like = self._like(spec)
        if like.median_s < _limit_s(spec):
            return f"how long the last {len(like.seconds)} jobs like it took"
        return "its time limit" if spec.time_limit_s is not None else ""

    def _like(self, spec: JobSpec) -> _Kind:
        return self._kinds.get((spec.entrypoint, spec.model), _UNKNOWN)


def _limit_s(spec: JobSpec) -> float:
    return math.inf if spec.time_limit_s is None else spec.time_limit_s

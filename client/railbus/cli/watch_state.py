"""What `railbus watch` knows: records and devices as they were asked for last, and what events have told since.

No I/O and no clock: whoever watches puts in what was heard. Memory is bounded, whatever is told.
"""

from __future__ import annotations

import itertools
import math
from collections import OrderedDict, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from railbus.cli.story import Line, Story
from railbus.cli.timeline import Evenly
from railbus_shared import clock, wire
from railbus_shared.contracts.events import BATCHED_TYPES

if TYPE_CHECKING:
    from railbus_shared.contracts.jobs import JobRecord
    from railbus_shared.contracts.requests import DeviceList

_POINTS: Final = 512
_CURVES: Final = 64
_LINES: Final = 100
_RATE_NS: Final = 15 * clock.NS_PER_S
"""Steps a second are those of so long."""
_BARS: Final = "▁▂▃▄▅▆▇█"


class Curve:
    """One metric of one job over all of its run, and how fast the job steps."""

    def __init__(self) -> None:
        self.name = ""
        self.latest: float | None = None
        self.step: int | None = None
        self._lease_epoch = 0
        self._points = Evenly[float](_POINTS)
        self._steps: deque[tuple[int, int]] = deque(maxlen=1024)

    def take(self, event: Mapping[str, object]) -> None:
        """A `train.metrics`: its loss, or where there never is one, the first of its metrics."""
        step, data, epoch = event.get("step"), event.get("data"), event.get("lease_epoch")
        if isinstance(epoch, int) and epoch > self._lease_epoch:
            self._lease_epoch = epoch
            self._steps.clear()  # the next attempt may go on from an earlier step
        if isinstance(step, int):
            self._step(step, _time_ns(event))
        numbers = {
            str(name): value
            for name, value in (data.items() if isinstance(data, dict) else ())
            if isinstance(value, int | float) or value in wire.NOT_FINITE
        }
        if "loss" in numbers and self.name != "loss":
            self.name, self._points = "loss", Evenly(_POINTS)
        self.name = self.name or next(iter(numbers), "")
        if self.name in numbers:
            self.latest = float(numbers[self.name])  # also of the words for what is not finite
            self._points.take(self.latest)

    def _step(self, step: int, time_ns: int) -> None:
        self.step = step
        self._steps.append((time_ns, step))
        while self._steps[0][0] < time_ns - _RATE_NS:
            self._steps.popleft()

    def steps_per_s(self, *, now_ns: int) -> float | None:
        """None where nothing was told for a while."""
        if len(self._steps) < 2 or now_ns - self._steps[-1][0] > _RATE_NS:
            return None
        (first_ns, first), (last_ns, last) = self._steps[0], self._steps[-1]
        return (last - first) * clock.NS_PER_S / (last_ns - first_ns) if last_ns > first_ns and last > first else None

    def sparkline(self, width: int) -> str:
        """The whole run in so many bars, each the mean of its part; from the least to the greatest of them."""
        values = [value for value in self._points.kept if math.isfinite(value)]
        parts = min(width, len(values))
        if parts < 2:
            return ""
        edges = [at * len(values) // parts for at in range(parts + 1)]
        means = [sum(values[a:b]) / (b - a) for a, b in itertools.pairwise(edges)]
        least, span = min(means), max(means) - min(means)
        return "".join(_BARS[round((mean - least) / span * (len(_BARS) - 1)) if span else 0] for mean in means)


@dataclass
class Watched:
    """Everything that is shown."""

    active: Sequence[JobRecord] = ()
    queued: Sequence[JobRecord] = ()
    ended: Sequence[JobRecord] = ()
    totals: Mapping[str, int] = field(default_factory=dict)
    """Jobs that are active, queued, and ended, however many are listed here."""
    devices: DeviceList | None = None
    trouble: str = ""
    """Why what is shown may be old; empty where it is not."""
    lines: deque[tuple[str, Line]] = field(default_factory=lambda: deque(maxlen=_LINES))
    """Time and words of the newest events that are worth a line."""
    curves: OrderedDict[str, Curve] = field(default_factory=OrderedDict)
    _story: Story = field(default_factory=lambda: Story(names_job=True))

    def hear(self, event: Mapping[str, object]) -> None:
        """One more event; metrics go into their curve, facts that are worth a line are told in one."""
        if event.get("type") == "train.metrics":
            self.learn(event)
            return
        line = None if event.get("type") in BATCHED_TYPES else self._story.tell(event)
        if line is not None:
            words = " ".join(part.strip(" |") for part in line.text.splitlines())
            self.lines.append((str(event.get("time", "")), Line(words, line.tone)))

    def learn(self, event: Mapping[str, object]) -> None:
        """Metrics from the past, or just told."""
        job = str(event.get("job") or "")
        curve = self.curves.setdefault(job, Curve())
        self.curves.move_to_end(job)
        curve.take(event)
        if len(self.curves) > _CURVES:
            self.curves.popitem(last=False)


def _time_ns(event: Mapping[str, object]) -> int:
    try:
        return clock.parse_rfc3339(str(event.get("time", "")))
    except ValueError:
        return 0  # an event of a stranger

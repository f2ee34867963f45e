"""What happened to one job, short enough to be read however long it ran: every fact, a share of what comes in batches.

From the log files of the root where they lie on this host, else from telemetry, which is asked for the newest 100,000.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Generic, TypeVar

import click

from railbus.cli.history import Wanted, asked
from railbus.cli.session import session
from railbus_shared.contracts.events import BATCHED_TYPES

if TYPE_CHECKING:
    from railbus.client import Client

Event = dict[str, object]
T = TypeVar("T")

_METRICS: Final = 500
_LINES: Final = 20
"""The newest of what the job printed and logged."""


@dataclass(frozen=True)
class Timeline:
    """Events by time, and how many of those in batches are not among them."""

    events: tuple[Event, ...]
    left_out: int = 0


class Evenly(Generic[T]):
    """At most about `limit` of any number of things, spread evenly over all of them; the first and the last always."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._stride = 1
        self._kept: list[T] = []
        self._last: list[T] = []
        self.seen = 0

    def take(self, one: T) -> None:
        self._last = []
        if self.seen % self._stride == 0:
            self._kept.append(one)
        else:
            self._last = [one]
        self.seen += 1
        if len(self._kept) > self._limit:
            self._kept, self._stride = self._kept[::2], 2 * self._stride

    @property
    def kept(self) -> list[T]:
        return [*self._kept, *self._last]


def thinned(events: Iterable[Event]) -> Timeline:
    """Every fact, metrics spread over the whole run, and the newest lines; memory is bounded but for facts."""
    facts: list[Event] = []
    metrics, lines, num_lines = Evenly[Event](_METRICS), deque[Event](maxlen=_LINES), 0
    for event in events:
        if event.get("type") == "train.metrics":
            metrics.take(event)
        elif event.get("type") in BATCHED_TYPES:
            lines.append(event)
            num_lines += 1
        else:
            facts.append(event)
    kept = [*facts, *metrics.kept, *lines]
    left_out = metrics.seen - len(metrics.kept) + num_lines - len(lines)
    # two services tell of a job, and one of them may be written down later
    return Timeline(tuple(sorted(kept, key=lambda event: str(event.get("time", "")))), left_out)


async def timeline_of(client: Client, job: str) -> Timeline:
    """A job's timeline; an empty one while telemetry is away and no file is here, which is said."""
    from railbus_shared.errors import TransientError
    from railbus_shared.log_reader import read_events

    layout = session().layout
    if layout.logs.is_dir():
        return thinned(read_events(layout, job=job))
    try:
        return thinned(await asked(client, Wanted(job=job)))
    except TransientError as exc:
        click.echo(f"no timeline: {exc.message}", err=True)
        return Timeline(())

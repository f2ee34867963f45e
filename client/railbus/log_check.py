"""Whether anything is missing in the log: every producer counts its events when they leave, so that a gap is a loss.

What is no loss is known: numbers before the range that was read, or before what is kept; events that were given up
before they had a number (`events.dropped` tells them); producers that do not count (`job-queued-…`, `job-ended-…`,
refused messages); and what is still in the stream, if that is looked at as well (`Check.add_stored`).

Memory grows with producers (some 500 bytes for one whose numbers have no gaps) and with gaps, not with events.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Final, NamedTuple

import orjson

from railbus_shared.contracts.events import teller
from railbus_shared.day_log import DayLog
from railbus_shared.layout import CLOSED_LOG_NAME, Layout
from railbus_shared.log_filter import Filter
from railbus_shared.log_reader import days_of, read_events
from railbus_shared.number_spans import Spans

MAX_BROKEN: Final = 1000
"""Lines and places that are told one by one; more are counted."""
MAX_GAPS: Final = 10_000
"""Of one producer that are told one by one; of more the lowest are counted."""
_NOT_COUNTED: Final = ("job-queued-", "job-ended-", "telemetry-rejected-")
"""Whose numbers are places in a stream."""
_FORMER: Final = "the writer found this file damaged, and kept it aside"
Range = tuple[int, int]
Event = Mapping[str, object]


class Broken(NamedTuple):
    """What cannot be read."""

    file: Path
    at_byte: int | None
    """Of a closed file where the gzip member begins in which it is."""
    problem: str


@dataclass(frozen=True)
class Finding:
    """What is wrong, or worth knowing, of one producer; ranges are first and last number."""

    producer: str
    """With the person before it who told its events, if one did (`teller`)."""
    events: int
    missing: tuple[Range, ...]
    doubled: tuple[Range, ...]
    waiting: tuple[Range, ...]
    """Not on disk yet: they are in the stream."""
    num_missing: int
    num_doubled: int
    """Lines too many."""
    num_late: int
    """Lines behind one of a higher number: no loss."""

    @property
    def is_fault(self) -> bool:
        return bool(self.num_missing or self.num_doubled)


@dataclass
class _Count:
    """What is known of one producer."""

    __slots__ = ("doubled", "events", "first", "floor", "highest", "last", "lowest", "num_doubled", "num_late",
                 "numbers", "unlisted", "waiting")  # fmt: skip

    def __init__(self) -> None:
        self.numbers = Spans()
        self.doubled: Spans | None = None
        self.waiting: Spans | None = None
        self.first = self.last = 0
        """The lowest and highest number of an event that is asked for."""
        self.lowest = 0
        """Of all that were read."""
        self.floor = self.highest = self.events = self.num_doubled = self.num_late = self.unlisted = 0

    def add(self, number: int, *, is_asked: bool) -> None:
        if is_asked:
            self.events += 1
            self.first = min(self.first or number, number)
            self.last = max(self.last, number)
        is_late = number < self.highest
        self.lowest = min(self.lowest or number, number)
        self.highest = max(self.highest, number)
        if number <= self.floor or self._is_new(number):
            self.num_late += is_late and is_asked
        elif is_asked:
            self.num_doubled += 1
            self.doubled = self.doubled or Spans()
            self.doubled.add(number)

    def add_stored(self, number: int, *, is_on_disk: bool) -> bool:
        if number <= self.floor or not self._is_new(number) or is_on_disk:
            return False
        self.waiting = self.waiting or Spans()
        return self.waiting.add(number)

    def _is_new(self, number: int) -> bool:
        is_new = self.numbers.add(number)
        if len(self.numbers.firsts) > MAX_GAPS:
            firsts, lasts = self.numbers.firsts, self.numbers.lasts
            self.unlisted += firsts[1] - lasts[0] - 1
            self.floor = lasts[0]
            del firsts[0], lasts[0]
        return is_new

    def gaps(self, *, counts_from_one: bool) -> Iterator[Range]:
        """What is missing among the events that are asked for, or beside them."""
        if counts_from_one and 1 < self.lowest == self.first:
            yield 1, self.lowest - 1
        for last, behind in zip(self.numbers.lasts, self.numbers.firsts[1:], strict=False):
            if last <= self.last and behind >= self.first:
                yield last + 1, behind - 1


@dataclass
class Check:
    """What was found so far."""

    counts_from_one: bool = False
    """Whether the first event of every producer must be there, had it not been lost."""
    days: int = 0
    events: int = 0
    dropped: int = 0
    """Events of the range that producers gave up under pressure, as they tell: they never had a number."""
    broken: list[Broken] = field(default_factory=list)
    num_broken: int = 0
    _producers: dict[str, _Count] = field(default_factory=dict)

    @property
    def num_producers(self) -> int:
        """Of which there is an event that is asked for."""
        return sum(count.events > 0 for count in self._producers.values())

    def add(self, event: Event, *, is_asked: bool) -> None:
        """Take an event of the files; raises ValueError for what is none."""
        self._count_of(event).add(_number_of(event), is_asked=is_asked)
        if is_asked:
            self.events += 1
            self.dropped += _dropped(event)

    def add_stored(self, events: Iterable[Event], *, is_on_disk: bool) -> int:
        """Take events of the stream, read in the files or not; returns how many are not on disk yet."""
        waiting = 0
        for event in events:
            with contextlib.suppress(ValueError):  # one that telemetry will refuse
                waiting += self._count_of(event).add_stored(_number_of(event), is_on_disk=is_on_disk)
        return waiting

    def add_broken(self, file: Path, at_byte: int | None, problem: str) -> None:
        self.num_broken += 1
        if len(self.broken) < MAX_BROKEN:
            self.broken.append(Broken(file, at_byte, problem))

    def findings(self) -> Iterator[Finding]:
        """Of each producer of which there is something to tell, in the order of their names."""
        for producer, count in sorted(self._producers.items()):
            if not count.events:
                continue
            is_counted = not producer.startswith(_NOT_COUNTED)
            missing = tuple(count.gaps(counts_from_one=self.counts_from_one)) if is_counted else ()
            num_missing = sum(last - first + 1 for first, last in missing) + (count.unlisted if is_counted else 0)
            found = Finding(
                producer,
                count.events,
                missing,
                _ranges(count.doubled),
                _ranges(count.waiting),
                num_missing,
                count.num_doubled,
                count.num_late if is_counted else 0,
            )
            if found.is_fault or found.waiting or found.num_late:
                yield found

    def _count_of(self, event: Event) -> _Count:
        producer = event.get("producer")
        if not isinstance(producer, str):
            raise ValueError("it has no producer")  # noqa: TRY004 - a line that is no event
        known = teller(producer, event.get("person"))
        count = self._producers.get(known)
        if count is None:
            count = self._producers[known] = _Count()
        return count


def check(layout: Layout, wanted: Filter) -> Check:
    """Read what is asked for, and the days around it, which tell what of a gap at the edge only lies outside."""
    every = list(layout.log_days())
    asked = _asked_days(layout, wanted)
    found = Check()
    if not asked:
        return found
    begin, end = max(0, every.index(asked[0]) - 1), every.index(asked[-1]) + 2
    was_removed = next(read_events(layout, types=("logs.removed",)), None) is not None
    found.counts_from_one = begin == 0 and not was_removed
    found.days = len(asked)
    for day in every[begin:end]:
        _read_day(layout.day(day), wanted, found)
    return found


def _asked_days(layout: Layout, wanted: Filter) -> Sequence[date]:
    days = days_of(layout, wanted)
    if wanted.job is None:
        return days
    first, last = "9", ""
    for event in read_events(layout, job=wanted.job, since_ns=wanted.since_ns, until_ns=wanted.until_ns):
        told = str(event.get("time"))[:10]
        first, last = min(first, told), max(last, told)
    return [day for day in days if first <= day.isoformat() <= last]


def _read_day(folder: Path, wanted: Filter, found: Check) -> None:
    takes_all = wanted == Filter()
    for aside in sorted(folder.glob(f"{CLOSED_LOG_NAME}.damaged*")):
        found.add_broken(aside, None, _FORMER)

    def note_damage(at: int) -> None:
        found.add_broken(folder / CLOSED_LOG_NAME, at, "the gzip member that begins here is torn or damaged")

    with DayLog.opened(folder) as log:
        for name, place, block in log.named_blocks(note_damage):
            at = place.member if name == CLOSED_LOG_NAME else place.offset
            for line in block.split(b"\n")[:-1]:
                try:
                    event = orjson.loads(line)
                    found.add(event, is_asked=takes_all or wanted.matches(event))
                except (ValueError, AttributeError) as exc:
                    found.add_broken(folder / name, at, f"a line is no event: {exc}")
                if name != CLOSED_LOG_NAME:
                    at += len(line) + 1


def _number_of(event: Event) -> int:
    number = event.get("number")
    if not isinstance(number, int) or not 1 <= number < 2**64:
        raise ValueError("it has no number")
    return number


def _dropped(event: Event) -> int:
    """How many events this one tells to have been given up."""
    data = event.get("data")
    lost = data.get("dropped") if event.get("type") == "events.dropped" and isinstance(data, dict) else None
    return sum(count for count in lost.values() if isinstance(count, int)) if isinstance(lost, dict) else 0


def _ranges(spans: Spans | None) -> tuple[Range, ...]:
    return () if spans is None else tuple(zip(spans.firsts, spans.lasts, strict=True))

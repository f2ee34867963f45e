"""Which events are on disk already: for each producer the numbers seen, as spans without gaps.

A producer counts without gaps, so one span is the rule and memory grows with producers, not with events. A producer
that has been idle longer than the stream can still hold its messages is forgotten. Whatever comes, memory is bounded.

What a person tells is known by the person as well (`teller`), and has room of its own: whatever people make up, no
number of a service is taken by it, and no service is forgotten for it.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Final, Self

from railbus_shared.contracts.events import person_of
from railbus_shared.number_spans import Spans

MAX_PRODUCERS: Final = 100_000
"""Of services, and as many of people; beyond it a tenth of them is forgotten. Some 60 MB, and 4 MB of a saved set."""


class _Spans(Spans):
    """The numbers of one producer."""

    __slots__ = ("used_ns",)

    def __init__(self, used_ns: int) -> None:
        super().__init__()
        self.used_ns = used_ns


_Producers = dict[str, _Spans]


class Seen:
    """A set of (producer, number), where a producer's name is that of its `teller`."""

    def __init__(self) -> None:
        self._of_services: _Producers = {}
        self._of_people: _Producers = {}

    def __contains__(self, key: tuple[str, int]) -> bool:
        spans = self._beside(key[0]).get(key[0])
        return spans is not None and spans.holds(key[1])

    def add(self, producer: str, number: int, *, now_ns: int) -> bool:
        """Whether the key is new; `now_ns` is when its producer was last heard of. Numbers are 1 to 2**64 - 1."""
        producers = self._beside(producer)
        spans = producers.get(producer)
        if spans is None:
            if len(producers) >= MAX_PRODUCERS:
                _forget_some(producers)
            spans = producers[producer] = _Spans(now_ns)
        spans.used_ns = now_ns
        return spans.add(number)

    def is_free(self, producer: str, first: int, last: int) -> bool:
        """Whether the set has none of a producer's numbers from `first` to `last`."""
        spans = self._beside(producer).get(producer)
        return spans is None or spans.is_free(first, last)

    def add_all(self, producer: str, first: int, last: int, *, now_ns: int) -> None:
        """As `add` for each number from `first` to `last`, which are numbers of events that were counted one by one."""
        self.add(producer, first, now_ns=now_ns)
        if last > first:
            self._beside(producer)[producer].add_all(first + 1, last)

    def _beside(self, producer: str) -> _Producers:
        """Those that a producer has its room with."""
        return self._of_people if "/" in producer else self._of_services

    def forget_idle(self, *, since_ns: int) -> int:
        """Forget producers not heard of since then; returns how many."""
        num_idle = 0
        for producers in (self._of_services, self._of_people):
            idle = [producer for producer, spans in producers.items() if spans.used_ns < since_ns]
            for producer in idle:
                del producers[producer]
            num_idle += len(idle)
        return num_idle

    @property
    def num_spans(self) -> int:
        """What the memory grows with."""
        return sum(len(spans.firsts) for _, spans in self._all())

    def to_map(self) -> dict[str, object]:
        """The set as JSON can say it: for each producer `[used_ns, [first, last], ...]`."""
        return {
            producer: [spans.used_ns, *([a, b] for a, b in zip(spans.firsts, spans.lasts, strict=True))]
            for producer, spans in self._all()
        }

    def _all(self) -> Iterator[tuple[str, _Spans]]:
        return itertools.chain(self._of_services.items(), self._of_people.items())

    @classmethod
    def from_map(cls, saved: Mapping[str, object]) -> Self:
        """The inverse of `to_map`; raises ValueError for anything that it did not write."""
        seen = cls()
        for producer, entry in saved.items():
            seen._beside(producer)[producer] = _loaded(entry)
        return seen


def _forget_some(producers: _Producers) -> None:
    """First some of the person who has most, and of each those not heard of for longest."""
    of_person = Counter(map(person_of, producers))
    ordered = sorted(producers, key=lambda name: (-of_person[person_of(name)], producers[name].used_ns))
    for producer in ordered[: MAX_PRODUCERS // 10]:
        del producers[producer]


def _loaded(entry: object) -> _Spans:
    match entry:
        case [int(used_ns), *pairs]:
            spans = _Spans(used_ns)
        case _:
            raise ValueError("an entry does not begin with a time")
    for pair in pairs:
        match pair:
            case [int(first), int(last)] if 1 <= first <= last < 2**64:
                spans.firsts.append(first)
                spans.lasts.append(last)
            case _:
                raise ValueError("a span is not a pair of numbers")
    ordered = zip(spans.lasts, spans.firsts[1:], strict=False)
    if any(behind <= last + 1 for last, behind in ordered):
        raise ValueError("spans are out of order")
    return spans

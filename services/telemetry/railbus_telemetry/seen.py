"""Which events are on disk already: for each producer the numbers seen, as spans without gaps.

A producer counts without gaps, so one span is the rule and memory grows with producers, not with events. A producer
that has been idle longer than the stream can still hold its messages is forgotten. Whatever comes, memory is bounded.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Mapping
from typing import Final, Self

MAX_SPANS: Final = 65_536
"""Of one producer; beyond it the span of the lowest numbers is forgotten, so that no bad producer fills the memory."""


MAX_PRODUCERS: Final = 100_000
"""Beyond it a tenth of them is forgotten, those not heard of for longest; some 60 MB, and 4 MB of a saved set."""


class _Spans:
    """The numbers of one producer."""

    __slots__ = ("firsts", "lasts", "used_ns")

    def __init__(self, used_ns: int) -> None:
        self.firsts = array("Q")
        self.lasts = array("Q")
        self.used_ns = used_ns

    def holds(self, number: int) -> bool:
        at = bisect_right(self.firsts, number) - 1
        return at >= 0 and number <= self.lasts[at]

    def add(self, number: int) -> bool:
        firsts, lasts = self.firsts, self.lasts
        if lasts and number == lasts[-1] + 1:
            lasts[-1] = number
            return True
        at = bisect_right(firsts, number)
        if at and number <= lasts[at - 1]:
            return False
        self._insert(at, number)
        if len(firsts) > MAX_SPANS:
            del firsts[0], lasts[0]
        return True

    def is_free(self, first: int, last: int) -> bool:
        """Whether none of these numbers is held."""
        at = bisect_right(self.firsts, last) - 1
        return at < 0 or self.lasts[at] < first

    def add_all(self, first: int, last: int) -> None:
        if self.lasts and first == self.lasts[-1] + 1:
            self.lasts[-1] = last
            return
        at = bisect_right(self.firsts, first) - 1
        if at >= 0 and first == self.lasts[at] + 1 and last < self.firsts[at + 1]:
            self.lasts[at] = last - 1  # the last number may join the next span, which `add` knows how to do
            first = last
        for number in range(first, last + 1):
            self.add(number)

    def _insert(self, at: int, number: int) -> None:
        """Add a number that is not held; the span `at` is the first that begins behind it."""
        firsts, lasts = self.firsts, self.lasts
        joins_left = at > 0 and lasts[at - 1] + 1 == number
        joins_right = at < len(firsts) and firsts[at] == number + 1
        if joins_left and joins_right:
            lasts[at - 1] = lasts[at]
            del firsts[at], lasts[at]
        elif joins_left:
            lasts[at - 1] = number
        elif joins_right:
            firsts[at] = number
        else:
            firsts.insert(at, number)
            lasts.insert(at, number)


class Seen:
    """A set of (producer, number)."""

    def __init__(self) -> None:
        self._producers: dict[str, _Spans] = {}

    def __contains__(self, key: tuple[str, int]) -> bool:
        spans = self._producers.get(key[0])
        return spans is not None and spans.holds(key[1])

    def add(self, producer: str, number: int, *, now_ns: int) -> bool:
        """Whether the key is new; `now_ns` is when its producer was last heard of. Numbers are 1 to 2**64 - 1."""
        spans = self._producers.get(producer)
        if spans is None:
            if len(self._producers) >= MAX_PRODUCERS:
                self._forget_some()
            spans = self._producers[producer] = _Spans(now_ns)
        spans.used_ns = now_ns
        return spans.add(number)

    def is_free(self, producer: str, first: int, last: int) -> bool:
        """Whether the set has none of a producer's numbers from `first` to `last`."""
        spans = self._producers.get(producer)
        return spans is None or spans.is_free(first, last)

    def add_all(self, producer: str, first: int, last: int, *, now_ns: int) -> None:
        """As `add` for each number from `first` to `last`, which are numbers of events that were counted one by one."""
        self.add(producer, first, now_ns=now_ns)
        if last > first:
            self._producers[producer].add_all(first + 1, last)

    def _forget_some(self) -> None:
        for producer in sorted(self._producers, key=lambda name: self._producers[name].used_ns)[: MAX_PRODUCERS // 10]:
            del self._producers[producer]

    def forget_idle(self, *, since_ns: int) -> int:
        """Forget producers not heard of since then; returns how many."""
        idle = [producer for producer, spans in self._producers.items() if spans.used_ns < since_ns]
        for producer in idle:
            del self._producers[producer]
        return len(idle)

    @property
    def num_spans(self) -> int:
        """What the memory grows with."""
        return sum(len(spans.firsts) for spans in self._producers.values())

    def to_map(self) -> dict[str, object]:
        """The set as JSON can say it: for each producer `[used_ns, [first, last], ...]`."""
        return {
            producer: [spans.used_ns, *([a, b] for a, b in zip(spans.firsts, spans.lasts, strict=True))]
            for producer, spans in self._producers.items()
        }

    @classmethod
    def from_map(cls, saved: Mapping[str, object]) -> Self:
        """The inverse of `to_map`; raises ValueError for anything that it did not write."""
        seen = cls()
        for producer, entry in saved.items():
            seen._producers[producer] = _loaded(entry)
        return seen


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

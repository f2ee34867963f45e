"""Which events are on disk already: for each producer the numbers seen, as spans without gaps.

A producer counts without gaps, so one span is the rule and memory grows with producers, not with events. A producer
that has been idle longer than the stream can still hold its messages is forgotten. Whatever comes, memory is bounded.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, Self

from railbus_shared.number_spans import Spans

MAX_PRODUCERS: Final = 100_000
"""Beyond it a tenth of them is forgotten, those not heard of for longest; some 60 MB, and 4 MB of a saved set."""


class _Spans(Spans):
    """The numbers of one producer."""

    __slots__ = ("used_ns",)

    def __init__(self, used_ns: int) -> None:
        super().__init__()
        self.used_ns = used_ns


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

"""Lines that belong together: of one producer, numbered without gaps, of one day; they are written as one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

from railbus_shared.contracts.events import teller


class Run(NamedTuple):
    """Some lines as they will stand in a file, one after the other."""

    day_ns: int
    """Beginning of the UTC day of the events' times."""
    producer: str
    """With the name of the person before it who told this, if one did (`teller`)."""
    number: int
    """Of the first line."""
    data: bytes
    """JSON with a newline at the end of each event."""
    code: str = ""
    """Error code of a refused message; empty for events."""
    num_lines: int = 1
    at_ns: int = 0
    """Time of the first event."""

    @property
    def last(self) -> int:
        """Number of the last line."""
        return self.number + self.num_lines - 1

    def of_person(self, person: str) -> Run:
        """The same lines, as they count where a person told them."""
        return self._replace(producer=teller(self.producer, person))

    def singles(self) -> Iterator[Run]:
        """Each line as a run of its own."""
        for number, line in enumerate(self.data.splitlines(keepends=True), self.number):
            yield self._replace(number=number, data=line, num_lines=1)


def runs_of(
    data: bytes,
    *,
    days_ns: Sequence[int],
    producers: Sequence[str],
    numbers: Sequence[int],
    at_ns: Callable[[int], int],
) -> list[Run]:
    """The runs among events of which each is one line of `data`; `at_ns` gives an event's time."""
    count = len(numbers)
    if _follow(numbers) and days_ns.count(days_ns[0]) == producers.count(producers[0]) == count:
        return [Run(days_ns[0], producers[0], numbers[0], data, "", count, at_ns(0))]
    keys = list(zip(producers, days_ns, numbers, strict=True))
    cuts = [at for at, ((p, d, n), key) in enumerate(pairwise(keys), 1) if key != (p, d, n + 1)]
    lines = data.splitlines(keepends=True)
    return [
        Run(days_ns[a], producers[a], numbers[a], b"".join(lines[a:b]), "", b - a, at_ns(a))
        for a, b in pairwise([0, *cuts, count])
    ]


def _follow(numbers: Sequence[int]) -> bool:
    """Whether each is the one before and one."""
    first, last = numbers[0], numbers[-1]
    return last - first + 1 == len(numbers) and list(numbers) == list(range(first, last + 1))

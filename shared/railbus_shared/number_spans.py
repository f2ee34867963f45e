"""Numbers as spans without gaps: what is counted without gaps is one span, however many there are."""

from __future__ import annotations

from array import array
from bisect import bisect_right
from typing import Final

MAX_SPANS: Final = 65_536
"""Of one set; beyond it the span of the lowest numbers is forgotten, so that no bad producer fills the memory."""


class Spans:
    """A set of numbers from 1 to 2**64 - 1."""

    __slots__ = ("firsts", "lasts")

    def __init__(self) -> None:
        self.firsts = array("Q")
        self.lasts = array("Q")

    def holds(self, number: int) -> bool:
        at = bisect_right(self.firsts, number) - 1
        return at >= 0 and number <= self.lasts[at]

    def add(self, number: int) -> bool:
        """Whether the number is new."""
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
        """As `add` for each number from `first` to `last`."""
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

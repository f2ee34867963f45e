"""Which lines of the log are meant, told as early as possible: of a stretch, a block of lines, a line, an event.

Each of the earlier answers only says what cannot be meant. Lines are as telemetry writes them: JSON without spaces.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Final

import orjson

from railbus_shared import clock
from railbus_shared.log_index import MAX_TYPE_LENGTH, Stretch, hash_of

_TIME: Final = b'"time":"'
_SECONDS: Final = len("2026-11-23T21:45:35")
_PATTERN: Final = frozenset("\\.^$*+?{}[]|()")
"""What makes a regular expression of a text."""
Find = Callable[[bytes, int], int]


@dataclass(frozen=True)
class Filter:
    """What is asked for; a field that is not given asks for nothing."""

    job: str | None = None
    types: tuple[str, ...] = ()
    """Beginnings of types, one of which must fit."""
    since_ns: int | None = None
    until_ns: int | None = None
    """Only events before this time."""
    pattern: re.Pattern[str] | None = None
    """Only lines in which it is found."""
    _job_bytes: bytes = field(init=False, repr=False)
    _type_bytes: tuple[bytes, ...] = field(init=False, repr=False)
    _since_text: bytes = field(init=False, repr=False)
    _until_text: bytes = field(init=False, repr=False)

    def __post_init__(self) -> None:
        add = object.__setattr__
        add(self, "_job_bytes", b"" if self.job is None else b'"job":' + orjson.dumps(self.job))
        add(self, "_type_bytes", tuple(b'"type":' + orjson.dumps(prefix)[:-1] for prefix in self.types))
        add(self, "_since_text", _second(self.since_ns) or b"0")
        add(self, "_until_text", _second(self.until_ns) or b"9")

    def may_be_in(self, stretch: Stretch) -> bool:
        """Whether an event in the stretch may match."""
        job = None if self.job is None or not _is_plain(self.job) else hash_of(self.job.encode())
        return stretch.may_hold(
            job=job,
            types=self.types if all(_is_plain(kind) and len(kind) <= MAX_TYPE_LENGTH for kind in self.types) else (),
            since_s=None if self.since_ns is None else self.since_ns // clock.NS_PER_S,
            until_s=None if self.until_ns is None else (self.until_ns - 1) // clock.NS_PER_S,
        )

    def candidates(self, block: bytes) -> Iterator[tuple[int, bytes]]:
        """The lines of a block that may match, without their newlines, each with its offset; the block ends a line."""
        needle = self._needle()
        for at, line in _all_lines(block) if needle is None else _lines_with(needle(block), block):
            if self._may_match(line):
                yield at, line

    def event_of(self, line: bytes) -> dict[str, object] | None:
        """The event of a candidate if it matches; raises ValueError for what is no event."""
        event = orjson.loads(line)
        return event if isinstance(event, dict) and self.matches(event) else None

    def _needle(self) -> Callable[[bytes], Callable[[int], int]] | None:
        """Finds in a block, from a place on, what every match has; None if there is nothing to look for."""
        if self.job is not None:
            return lambda block: lambda start: block.find(self._job_bytes, start)
        if self.types:
            pattern = re.compile(b"|".join(map(re.escape, self._type_bytes)))
            return lambda block: lambda start: -1 if (hit := pattern.search(block, start)) is None else hit.start()
        literal = None if self.pattern is None else _literal(self.pattern)
        if literal is None:
            return None

        def lowered(block: bytes) -> Callable[[int], int]:
            low = block.lower()
            return lambda start: low.find(literal, start)

        return lowered

    def _may_match(self, line: bytes) -> bool:
        if self._job_bytes not in line:
            return False
        if self._type_bytes and not any(part in line for part in self._type_bytes):
            return False
        if (self.since_ns is not None or self.until_ns is not None) and self._is_of_another_time(line):
            return False
        return self.pattern is None or self.pattern.search(line.decode(errors="replace")) is not None

    def _is_of_another_time(self, line: bytes) -> bool:
        """Whether its only time says so to the second."""
        at = line.find(_TIME)
        if at < 0 or line.find(_TIME, at + 1) >= 0:
            return False
        begin = at + len(_TIME)
        return not self._since_text <= line[begin : begin + _SECONDS] <= self._until_text

    def matches(self, event: dict[str, object]) -> bool:
        """Whether an event is meant, as far as its fields tell; raises ValueError for a time that is none."""
        if self.job is not None and event.get("job") != self.job:
            return False
        if self.types and not str(event.get("type")).startswith(self.types):
            return False
        if self.since_ns is None and self.until_ns is None:
            return True
        time_ns = clock.parse_rfc3339(str(event.get("time")))
        return (self.since_ns is None or time_ns >= self.since_ns) and (
            self.until_ns is None or time_ns < self.until_ns
        )


def _second(time_ns: int | None) -> bytes:
    return b"" if time_ns is None else clock.rfc3339(time_ns)[:_SECONDS].encode()


def _is_plain(text: str) -> bool:
    """Whether it stands in JSON as it is."""
    return orjson.dumps(text) == f'"{text}"'.encode() and '"' not in text


def _literal(pattern: re.Pattern[str]) -> bytes | None:
    """What a pattern looks for in any case, in lower case; None if it is more than a text."""
    text = pattern.pattern
    if not text or not text.isascii() or _PATTERN & set(text) or pattern.flags & re.VERBOSE:
        return None
    return text.lower().encode()


def _all_lines(block: bytes) -> Iterator[tuple[int, bytes]]:
    at = 0
    for line in block.split(b"\n")[:-1]:
        yield at, line
        at += len(line) + 1


def _lines_with(find: Callable[[int], int], block: bytes) -> Iterable[tuple[int, bytes]]:
    start = 0
    while (hit := find(start)) >= 0:
        begin, end = block.rfind(b"\n", start, hit) + 1 or start, block.find(b"\n", hit)
        yield begin, block[begin:end]
        start = end + 1

"""Makes the indexes by which readers pass over members of closed logs (`railbus_shared.log_index`).

It is a reader of the closed files as others are, so the writer goes on meanwhile. A file that has grown since its index
was made is read from there on. All of it may be lost or left undone: readers then read more.
"""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, Final

from railbus_shared import clock, inflate
from railbus_shared.inflate import Piece
from railbus_shared.layout import CLOSED_LOG_NAME
from railbus_shared.log_index import MAX_TYPE_LENGTH, MAX_TYPES, DayIndex, Jobs, Stretch, hash_of

_JOB: Final = re.compile(rb'"job":"([^"\\]*)"')
_TYPE: Final = re.compile(rb'"type":"([^"]{0,%d})' % MAX_TYPE_LENGTH)
_ANY_TIME: Final = b'"time":"'
_TIME: Final = re.compile(
    rb'"time":"([0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2})(?:\.[0-9]{1,9})?(?:Z|\+00:00)"'
)
_MAX_REST_S: Final = 0.1


def is_indexed(folder: Path) -> bool:
    """Whether a day needs no index, or has one that describes its closed file."""
    with _closed_log(folder) as closed:
        index = None if closed is None else DayIndex.load(folder)
        return closed is None or (index is not None and index.describes(closed))


def update(folder: Path, *, is_stopping: Callable[[], bool] = lambda: False, rests: bool = False) -> bool:
    """Bring the index of a day up to date; returns whether it was written.

    With `rests` at most half of the time is worked. Raises StorageFull; FileNotFoundError if the day has gone.
    """
    with _closed_log(folder) as closed:
        if closed is None:
            return False
        former = DayIndex.load(folder)
        if former is not None and former.describes(closed):
            return False
        known = former if former is not None and former.begins(closed) else None
        start = 0 if known is None else known.closed_bytes
        stretches = [] if known is None else list(known.stretches)
        pieces = inflate.salvage(closed, start=start, damaged=lambda _: None)
        try:
            stretches += _stretches(_at_leisure(pieces, is_stopping, rests=rests), start)
        except _Stopped:
            return False
        DayIndex.of(closed, stretches).save(folder)
    return True


class _Stopped(Exception):
    """There is no time left to read on."""


@contextlib.contextmanager
def _closed_log(folder: Path) -> Iterator[BinaryIO | None]:
    try:
        file = (folder / CLOSED_LOG_NAME).open("rb")
    except (FileNotFoundError, NotADirectoryError):
        yield None
        return
    with file:
        yield file


def _at_leisure(pieces: Iterable[Piece], is_stopping: Callable[[], bool], *, rests: bool) -> Iterator[Piece]:
    began_s = time.perf_counter()
    for piece in pieces:
        if is_stopping():
            raise _Stopped
        yield piece
        if rests:
            time.sleep(min(time.perf_counter() - began_s, _MAX_REST_S))
        began_s = time.perf_counter()


def _stretches(pieces: Iterable[Piece], start: int) -> Iterator[Stretch]:
    """One of each member; of several together where a line goes from one into the next."""
    content, member, rest = _Content(start), start, b""
    for piece in pieces:
        if not piece.data:
            rest = b""
            continue
        if piece.member != member and not rest:
            yield content.stretch()
            content = _Content(piece.member)
        member = piece.member
        data = rest + piece.data
        cut = data.rfind(b"\n") + 1
        content.add(data[:cut])
        rest = data[cut:]
    yield content.stretch()


class _Content:
    """What stands in the lines of a stretch. It may say more than the events do, for data may hold the same names."""

    def __init__(self, start: int) -> None:
        self._start = start
        self._lines = 0
        self._plain_bytes = 0
        self._jobs: set[bytes] = set()
        self._types: set[bytes] = set()
        self._times: list[bytes] = []
        self._has_all_times = True

    def add(self, lines: bytes) -> None:
        self._lines += lines.count(b"\n")
        self._plain_bytes += len(lines)
        self._jobs.update(_JOB.findall(lines))
        if len(self._types) <= MAX_TYPES:
            self._types.update(_TYPE.findall(lines))
        times = _TIME.findall(lines)
        self._has_all_times &= len(times) == lines.count(_ANY_TIME)
        self._times = [min(self._times + times), max(self._times + times)] if times or self._times else []

    def stretch(self) -> Stretch:
        first_s, last_s = self._seconds()
        types = frozenset(kind.decode(errors="replace") for kind in self._types)
        return Stretch(
            start=self._start,
            plain_bytes=self._plain_bytes,
            lines=self._lines,
            first_s=first_s,
            last_s=last_s,
            types=types if len(types) <= MAX_TYPES else None,
            jobs=Jobs({hash_of(job) for job in self._jobs}),
        )

    def _seconds(self) -> tuple[int, int] | tuple[None, None]:
        if not (self._has_all_times and self._times):
            return None, None
        try:
            first_ns, last_ns = (clock.parse_rfc3339(f"{time.decode()}Z") for time in self._times)
        except ValueError:
            return None, None
        return first_ns // clock.NS_PER_S, last_ns // clock.NS_PER_S

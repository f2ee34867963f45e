"""The log of one day, read while telemetry writes it or after it was killed: forwards, or from its end.

Lines come in the order in which they were written, each once, as far as the files are whole; what is torn or damaged is
reported and passed over. Memory is bounded, whatever the files hold. Every line has a place, which it keeps: the plain
file becomes the member that begins where the closed file ends now, and the file begun beside it the one behind.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, Final, NamedTuple

from railbus_shared import inflate
from railbus_shared.inflate import Piece
from railbus_shared.layout import BEGUN_LOG_NAME, CLOSED_LOG_NAME, LOG_NAME
from railbus_shared.log_filter import Filter
from railbus_shared.log_index import DayIndex

logger = logging.getLogger(__name__)

_OPEN_TRIES: Final = 100
_FIRST_BYTES: Final = 64 * 1024  # of a plain file, from its end: some two hundred lines
_SPARE: Final = 64


class Place(NamedTuple):
    """Where a line stands in its day."""

    member: int
    """Where in the closed file the member begins in which it stands, or will stand."""
    is_behind: bool
    """Whether it will stand in the one behind that, of which nobody knows yet where it begins."""
    offset: int
    """Where it begins in the plain bytes of the member."""


class Found(NamedTuple):
    """An event and where it stands."""

    place: Place
    event: dict[str, object]


class _Files(NamedTuple):
    """Those of a day that there are."""

    closed: BinaryIO | None
    plain: BinaryIO | None
    begun: BinaryIO | None


class DayLog:
    """The files of a day as they were at one instant."""

    def __init__(self, folder: Path, found: _Files) -> None:
        self._folder = folder
        self._closed = closed = found.closed
        self._closed_bytes = 0 if closed is None else os.fstat(closed.fileno()).st_size
        self._growing = [file for file in (found.plain, found.begun) if file is not None]
        """What is in no member yet, oldest first: one file, or two while the first is being closed."""

    @classmethod
    @contextlib.contextmanager
    def opened(cls, folder: Path) -> Iterator[DayLog]:
        """A day that has vanished has no lines."""
        with contextlib.ExitStack() as stack:
            found = _opened(folder, stack)
            if found.closed is not None and found.plain is not None and inflate.ends_with(found.closed, found.plain):
                found = found._replace(plain=None)  # its lines are in the closed file already
            yield cls(folder, found)

    def events(self, wanted: Filter) -> Iterator[Found]:
        """All that match, in their order."""
        for start, end in _merged(self._spans(wanted)):
            yield from self._matching(self._closed_blocks(start, end), wanted)
        yield from self._matching(self._growing_blocks(), wanted)

    def newest(self, wanted: Filter, *, limit: int, before: Place | None = None) -> list[Found]:
        """The newest that match and stand before a place, the newest first."""
        before = None if before is None else self._now_at(before)
        found: list[Found] = []
        for at in reversed(range(len(self._growing))):
            found += self._newest_growing(at, wanted, limit=limit - len(found), before=before)
        for start, end in reversed(self._spans(wanted)):
            if len(found) >= limit:
                break
            if before is None or start <= before.member:
                found += self._newest_of(start, end, wanted, limit=limit - len(found), before=before)
        return found

    def named_blocks(self, damaged: Callable[[int], object]) -> Iterator[tuple[str, Place, bytes]]:
        """Every complete line, some at a time, with the name of their file and the place of the first.

        Where the closed file is damaged is told to `damaged`, by its byte.
        """
        if self._closed is not None:
            pieces = inflate.salvage(self._closed, end=self._closed_bytes, damaged=damaged)
            for place, block in _blocks(pieces):
                yield CLOSED_LOG_NAME, place, block
        for place, block in self._growing_blocks():
            yield BEGUN_LOG_NAME if place.is_behind else LOG_NAME, place, block

    def lines(self) -> Iterator[bytes]:
        """Every line, without its newline."""
        for _, block in self._all_blocks():
            yield from block.split(b"\n")[:-1]

    # --- the closed file ---------------------------------------------------------------------------------------------

    def _all_blocks(self) -> Iterator[tuple[Place, bytes]]:
        if self._closed is not None:
            yield from self._closed_blocks(0, self._closed_bytes)
        yield from self._growing_blocks()

    def _spans(self, wanted: Filter) -> list[tuple[int, int]]:
        """The parts of the closed file in which something may match; all of it where no index describes it."""
        if self._closed is None:
            return []
        index = DayIndex.load(self._folder)
        if index is None or not index.describes(self._closed):
            return [(0, self._closed_bytes)]
        return [(stretch.start, end) for stretch, end in index.spans() if wanted.may_be_in(stretch)]

    def _closed_blocks(self, start: int, end: int) -> Iterator[tuple[Place, bytes]]:
        assert self._closed is not None  # noqa: S101 - without it there are no spans
        return _blocks(inflate.salvage(self._closed, start=start, end=end, damaged=self._report_damage))

    def _newest_of(self, start: int, end: int, wanted: Filter, *, limit: int, before: Place | None) -> list[Found]:
        """Those of a part of the closed file, the newest first; few lines are parsed that are not asked for."""
        kept = deque[tuple[Place, bytes]](maxlen=4 * limit + _SPARE)
        seen = 0
        for place, line in _candidates(self._closed_blocks(start, end), wanted):
            if before is not None and place >= before:
                break
            kept.append((place, line))
            seen += 1
        found: list[Found] = []
        for place, line in reversed(kept):
            if (event := self._event_of(line, wanted)) is not None:
                found.append(Found(place, event))
                if len(found) == limit:
                    return found
        if seen <= len(kept):
            return found
        matching = self._matching(self._closed_blocks(start, end), wanted)
        return list(deque((one for one in matching if before is None or one.place < before), maxlen=limit))[::-1]

    def _report_damage(self, at: int) -> None:
        logger.warning("closed log is torn or damaged", extra={"folder": str(self._folder), "at_byte": at})

    def _now_at(self, place: Place) -> Place:
        """A place as it is called now: what was behind a plain file has a member to stand in, once that one has."""
        if not place.is_behind or self._closed is None or place.member >= self._closed_bytes:
            return place
        members = inflate.Members(self._closed, offset=place.member)
        for _ in members.pieces(of_one=True):
            pass
        return Place(members.whole_end, False, place.offset)

    # --- the files that grow -----------------------------------------------------------------------------------------

    def _growing_blocks(self) -> Iterator[tuple[Place, bytes]]:
        for at, file in enumerate(self._growing):
            file.seek(0)
            for place, block in _blocks(Piece(self._closed_bytes, chunk) for chunk in inflate.chunks_of(file)):
                yield place._replace(is_behind=at > 0), block

    def _newest_growing(self, at: int, wanted: Filter, *, limit: int, before: Place | None) -> list[Found]:
        found: list[Found] = []
        file, start = self._growing[at], Place(self._closed_bytes, at > 0, 0)
        if limit <= 0 or (before is not None and before <= start):
            return found
        end = os.fstat(file.fileno()).st_size
        if before is not None and before[:2] == start[:2]:
            end = min(end, before.offset)
        for offset, block in _blocks_from_the_end(file, end):
            for line_at, line in reversed(list(wanted.candidates(block))):
                if (event := self._event_of(line, wanted)) is not None:
                    found.append(Found(start._replace(offset=offset + line_at), event))
                    if len(found) == limit:
                        return found
        return found

    # --- lines -------------------------------------------------------------------------------------------------------

    def _matching(self, blocks: Iterable[tuple[Place, bytes]], wanted: Filter) -> Iterator[Found]:
        for place, line in _candidates(blocks, wanted):
            if (event := self._event_of(line, wanted)) is not None:
                yield Found(place, event)

    def _event_of(self, line: bytes, wanted: Filter) -> dict[str, object] | None:
        try:
            return wanted.event_of(line)
        except ValueError as exc:
            about = {"folder": str(self._folder), "problem": str(exc), "bytes": len(line)}
            logger.warning("unreadable log line", extra=about)
            return None


def _candidates(blocks: Iterable[tuple[Place, bytes]], wanted: Filter) -> Iterator[tuple[Place, bytes]]:
    for place, block in blocks:
        for at, line in wanted.candidates(block):
            yield place._replace(offset=place.offset + at), line


def _merged(spans: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Neighbours joined."""
    merged: list[tuple[int, int]] = []
    for start, end in spans:
        if merged and merged[-1][1] == start:
            merged[-1] = (merged[-1][0], end)
        else:
            merged.append((start, end))
    return merged


def _blocks(pieces: Iterable[Piece]) -> Iterator[tuple[Place, bytes]]:
    """Complete lines, some at a time, of one member unless a line spans two; what follows the last newline is left out.

    The place is that of the first line.
    """
    rest, place, member, offset = b"", Place(0, False, 0), -1, 0
    for piece in pieces:
        if not piece.data:
            rest = b""
            continue
        if piece.member != member:
            member, offset = piece.member, 0
        if not rest:
            place = Place(member, False, offset)
        first_end = piece.data.find(b"\n") + 1 if rest and place.member != member else 0
        if first_end:  # the line that spans two members goes alone
            yield place, rest + piece.data[:first_end]
            rest, place = b"", Place(member, False, first_end)
        data = rest + piece.data[first_end:]
        cut = data.rfind(b"\n") + 1
        offset += len(piece.data)
        if cut:
            yield place, data[:cut]
            place = place._replace(offset=place.offset + cut)
        rest = data[cut:]


def _blocks_from_the_end(file: BinaryIO, end: int) -> Iterator[tuple[int, bytes]]:
    """Complete lines of a plain file that is cut at `end`, the last ones first, each block with its offset."""
    size, behind, is_cut = _FIRST_BYTES, b"", False
    while end > 0:
        begin = max(0, end - size)
        file.seek(begin)
        data = file.read(end - begin) + behind
        if not is_cut:
            data = data[: data.rfind(b"\n") + 1] or data
            is_cut = data.endswith(b"\n")
        start = data.find(b"\n") + 1 if begin else 0
        if is_cut and start < len(data):
            yield begin + start, data[start:]
            behind = data[:start]
        else:
            behind = data
        end, size = begin, min(2 * size, inflate.CHUNK_BYTES)


def _opened(folder: Path, stack: contextlib.ExitStack) -> _Files:
    """The files of a day as they were at one instant.

    Lines only move on: what was begun takes the name of the plain file, and that joins the closed one. So they are
    opened in this order, and nothing is missed. If what was opened still has a name at the end, then at most the first
    of them that grow has its lines in the closed file already, as its last member.
    """
    for _ in range(_OPEN_TRIES):
        with contextlib.ExitStack() as attempt:
            begun = _open(folder / BEGUN_LOG_NAME, attempt)
            plain = _open(folder / LOG_NAME, attempt)
            closed = _open(folder / CLOSED_LOG_NAME, attempt)
            if begun is not None and (plain is None or _is_same(begun, plain)):
                begun, plain = None, begun  # its turn has come
            if all(file is None or _grows_in(folder, file) for file in (begun, plain)):
                stack.push(attempt.pop_all())
                return _Files(closed, plain, begun)
    raise TimeoutError(f"the log in {str(folder)!r} changes faster than it can be opened")


def _is_same(one: BinaryIO, other: BinaryIO) -> bool:
    return os.path.samestat(os.fstat(one.fileno()), os.fstat(other.fileno()))


def _open(path: Path, stack: contextlib.ExitStack) -> BinaryIO | None:
    try:
        return stack.enter_context(path.open("rb"))
    except (FileNotFoundError, NotADirectoryError):
        return None


def _grows_in(folder: Path, file: BinaryIO) -> bool:
    """Whether an open file still has its name, or the one that it takes next; a link elsewhere is none of ours."""
    opened = os.fstat(file.fileno())
    for name in (BEGUN_LOG_NAME, LOG_NAME):
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            if os.path.samestat(opened, (folder / name).stat()):
                return True
    return False

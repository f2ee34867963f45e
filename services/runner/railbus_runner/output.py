"""What a trainer writes to its standard output and error, line by line.

Nothing is dropped and no line is longer than the limit: a longer one comes in pieces. Of a line that was overwritten by
carriage returns, as progress bars do, only what a terminal would show last is kept.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
from collections.abc import Callable, Iterator
from typing import Final

MAX_LINE_BYTES: Final = 8192
_READ_BYTES: Final = 1 << 16
_MAX_READS_LEFT: Final = 4
_UNFINISHED: Final = re.compile(rb"[\xc2-\xf4][\x80-\xbf]{0,2}\Z")
"""The first bytes of a character whose rest may follow."""

OnLines = Callable[[str, list[str]], None]
"""Given the name of the stream and at least one line, without their ends."""


class LineSplitter:
    """Turns chunks of bytes into lines."""

    def __init__(self, *, max_line_bytes: int = MAX_LINE_BYTES) -> None:
        self._max_line_bytes = max_line_bytes
        self._rest = b""

    def feed(self, data: bytes) -> list[str]:
        """Lines completed by `data`, and pieces of one that has grown too long."""
        *whole, self._rest = (self._rest + data).split(b"\n")
        lines = [piece for line in whole for piece in self._pieces(_shown(line))]
        self._rest = self._rest[self._overwritten() :]
        while len(self._rest) > self._max_line_bytes:
            piece, self._rest = self._cut(self._rest)
            lines.append(_text(piece))
        return lines

    def finish(self) -> list[str]:
        """The last line, if it had no end."""
        rest, self._rest = _shown(self._rest), b""
        return self._pieces(rest) if rest else []

    def _overwritten(self) -> int:
        """How much of the incomplete line has been overwritten; a `\\r` at its end may be half of a `\\r\\n`."""
        return self._rest.rfind(b"\r", 0, max(0, len(self._rest) - 1)) + 1

    def _pieces(self, line: bytes) -> list[str]:
        pieces: list[str] = []
        while len(line) > self._max_line_bytes:
            piece, line = self._cut(line)
            pieces.append(_text(piece))
        return [*pieces, _text(line)]

    def _cut(self, line: bytes) -> tuple[bytes, bytes]:
        """At the limit, or up to three bytes before it where a character would be torn."""
        head = line[: self._max_line_bytes]
        unfinished = _UNFINISHED.search(head)
        if unfinished is not None and _is_torn(line, unfinished.start(), self._max_line_bytes):
            head = head[: unfinished.start()]
        return head, line[len(head) :]


async def read_output(fd: int, name: str, on_lines: OnLines) -> None:
    """Read a pipe until every writer has closed it, and close it.

    A process that outlives the trainer may hold the pipe, so wait for this only once the attempt is reaped. When
    cancelled, what has come so far is given, the incomplete last line too.
    """
    splitter = LineSplitter()

    def heed(data: bytes) -> None:
        if lines := splitter.feed(data):
            on_lines(name, lines)

    os.set_blocking(fd, False)
    try:
        while data := await _read(fd):
            heed(data)
            await asyncio.sleep(0)  # a trainer that writes without end must not hold the loop
    finally:
        for data in _left_in(fd):
            heed(data)
        os.close(fd)
        if lines := splitter.finish():
            on_lines(name, lines)


async def _read(fd: int) -> bytes:
    while True:
        try:
            return os.read(fd, _READ_BYTES)
        except BlockingIOError:
            await _readable(fd)


def _left_in(fd: int) -> Iterator[bytes]:
    """What a pipe holds now, and not much more: somebody may write without end."""
    with contextlib.suppress(BlockingIOError):
        for _ in range(_MAX_READS_LEFT):
            yield os.read(fd, _READ_BYTES)


async def _readable(fd: int) -> None:
    loop = asyncio.get_running_loop()
    event = asyncio.Event()
    loop.add_reader(fd, event.set)
    try:
        await event.wait()
    finally:
        loop.remove_reader(fd)


def _shown(line: bytes) -> bytes:
    """What of a complete line stands on a terminal in the end."""
    return line.rstrip(b"\r").rpartition(b"\r")[2]


def _is_torn(line: bytes, start: int, end: int) -> bool:
    """Whether the character at `start` goes on behind `end`."""
    first = line[start]
    length = 4 if first >= 0xF0 else 3 if first >= 0xE0 else 2
    return start + length > end


def _text(line: bytes) -> str:
    return line.decode("utf-8", errors="replace")

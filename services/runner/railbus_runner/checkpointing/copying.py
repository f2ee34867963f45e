"""Copies of host memory by a few threads, in order, so that whoever reads the copy may begin before it is whole.

The threads are Python's own and meet nowhere: each takes the next piece until none is left. Those of torch's pool wait
for each other in a busy loop after every tensor, which was measured to make a copy nine times as long where another
process shares the cores; these cost nothing beside one thread there, and where the cores are free they halve the time.
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Final, NamedTuple

PIECE_BYTES: Final = 4 << 20
_MAX_THREADS: Final = 4
"""From some four on, memory is the limit and not the cores."""
_BYTES_PER_THREAD: Final = 32 << 20
"""For less than this, starting another thread does not pay."""


class Piece(NamedTuple):
    """Bytes one after the other: from an address to an address."""

    to: int
    source: int
    nbytes: int


def pieces_of(to: int, source: int, nbytes: int) -> Iterator[Piece]:
    """A range as pieces of at most PIECE_BYTES."""
    for start in range(0, nbytes, PIECE_BYTES):
        yield Piece(to + start, source + start, min(PIECE_BYTES, nbytes - start))


def copy(pieces: Sequence[Piece], *, on_copied: Callable[[int], None]) -> None:
    """Copy all pieces, which are sorted by where they go; returns once that is done.

    `on_copied` is called in this thread, now and then, with an address below which everything has been copied. What it
    raises ends the copy, which is then not whole.
    """
    total = sum(piece.nbytes for piece in pieces)
    num_threads = max(1, min(_MAX_THREADS, _num_cores(), total // _BYTES_PER_THREAD))
    queue = iter(enumerate(pieces))  # the interpreter gives each item to one thread alone
    at = [0] * num_threads  # the piece that each thread is at, set late: all before the least one are copied
    helpers = [
        threading.Thread(target=_help, args=(queue, at, number), name="checkpoint-copy", daemon=True)
        for number in range(1, num_threads)
    ]
    for helper in helpers:
        helper.start()
    try:
        for index, piece in queue:
            at[0] = index
            ctypes.memmove(piece.to, piece.source, piece.nbytes)
            at[0] = index + 1
            if (least := min(at)) < len(pieces):
                on_copied(pieces[least].to)
    finally:
        deque(queue, maxlen=0)  # after an error the helpers are to find nothing more
        for helper in helpers:
            helper.join()


def has_spare_cores() -> bool:
    """Whether this process has cores for two more threads beside those that copy."""
    return _num_cores() >= _MAX_THREADS + 2


def _num_cores() -> int:
    return len(os.sched_getaffinity(0))


def _help(queue: Iterator[tuple[int, Piece]], at: list[int], number: int) -> None:
    for index, piece in queue:
        at[number] = index
        ctypes.memmove(piece.to, piece.source, piece.nbytes)
    at[number] = sys.maxsize

"""What is mended of a day's files that a killed writer, or a disk that failed, has left.

- A plain file may have a torn tail, which was never acknowledged: it is cut. Or it is the last member of the closed
  file already: it goes.
- A closed file is replaced whole, so it is damaged only where the disk has damaged it: it is kept aside, and what can
  be read of it becomes the closed file.
"""

from __future__ import annotations

import itertools
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import orjson

from railbus_shared import files, inflate
from railbus_shared.contracts.events import teller
from railbus_telemetry import appending, closing

logger = logging.getLogger(__name__)


def remove_litter(folder: Path) -> None:
    """Remove what a killed process left under temporary names."""
    for path in folder.glob(".*.tmp"):
        path.unlink()


def mend_plain(plain: Path, *, note: Callable[[str, int], object]) -> bool:
    """Tell the keys of a plain file to `note` and cut its torn tail; returns whether the file is still there.

    It is not if the closed file has its lines already, or if no line is left of it. What is left is on disk: it may
    have been written and not flushed, and what is noted will not be written again.
    """
    if not plain.exists():
        return False
    good_bytes, found_bytes = _scan(plain, note), plain.stat().st_size
    if good_bytes == 0 or closing.is_closed(plain):
        logger.warning("removed a log that was closed or empty", extra={"file": str(plain), "good_bytes": good_bytes})
        files.fsync_dir(plain.parent)  # the closed one must not be lost in its place
        appending.cut(plain, 0)
        return False
    if found_bytes > good_bytes:
        torn_bytes = found_bytes - good_bytes
        logger.warning("cut the torn tail of a log", extra={"file": str(plain), "torn_bytes": torn_bytes})
    appending.cut(plain, good_bytes)
    appending.make_name_durable(plain)
    return True


def mend_closed(closed: Path) -> int:
    """Make sure that a closed file is whole, so that a member can be added; returns its size in bytes.

    A damaged one is kept aside as `<name>.damaged`, and what can be read of it, before and behind the damage, becomes
    the closed file. It is read from end to end.
    """
    with closed.open("rb") as file:
        members = inflate.Members(file)
        for _ in members.chunks():
            pass
        if members.is_torn:
            _salvage(closed, members.whole_end, file)
    return closed.stat().st_size


def key_of(line: bytes) -> tuple[str, int] | None:
    """The key of a line, its teller and number; None if it is not one of ours."""
    try:
        event = orjson.loads(line)
    except orjson.JSONDecodeError:
        return None
    match event:
        case {"producer": str(producer), "number": int(number)} if 1 <= number < 2**64:
            return teller(producer, event.get("person")), number
        case _:
            return None


def _scan(plain: Path, note: Callable[[str, int], object]) -> int:
    """Note every key; returns where the last line ends that is complete and parses."""
    end = good_end = 0
    with plain.open("rb") as file:
        for line in inflate.complete_lines(inflate.chunks_of(file)):
            end += len(line) + 1
            key = key_of(line)
            if key is not None:
                note(*key)
                good_end = end
    return good_end


def _salvage(closed: Path, whole_bytes: int, file: BinaryIO) -> None:
    aside = next(path for path in _names_aside(closed) if not path.exists())
    logger.error(
        "closed log is damaged, kept aside",
        extra={"file": str(closed), "aside": aside.name, "whole_bytes": whole_bytes},
    )
    with files.temporary(closed) as mended:
        closing.copy(closed, mended, limit_bytes=whole_bytes)
        pieces = inflate.salvage(file, start=whole_bytes, damaged=_nothing)
        lines = inflate.complete_lines(piece.data for piece in pieces)
        readable = (line + b"\n" for line in lines if key_of(line) is not None)
        first = next(readable, None)
        if first is not None:
            closing.add_member(itertools.chain([first], readable), mended)
    os.link(closed, aside)
    files.fsync_dir(closed.parent)
    files.temporary_path(closed).replace(closed)
    files.fsync_dir(closed.parent)


def _nothing(_: int) -> None:
    """Of damage that has been told."""


def _names_aside(closed: Path) -> Iterator[Path]:
    yield closed.with_name(f"{closed.name}.damaged")
    for number in itertools.count(2):
        yield closed.with_name(f"{closed.name}.damaged-{number}")

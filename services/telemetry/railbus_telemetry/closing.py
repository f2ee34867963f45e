"""How a day's plain file joins the closed one, as one more gzip member.

Closing is staged so that at every instant each line stands in a whole file: the closed file with the new member is
written beside the old one, read back and compared, renamed over it, and only then the plain file goes. A process killed
between the last two steps leaves the lines in both; `mend_plain` finds the plain file in the last member, and drops it.
The plain file does not change meanwhile: what comes is written elsewhere (`series`).
"""

from __future__ import annotations

import errno
import itertools
import logging
import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, Final, Protocol

import orjson

from railbus_shared import files, inflate
from railbus_shared.contracts.events import teller
from railbus_shared.layout import CLOSED_LOG_NAME

try:
    from isal import isal_zlib
except ImportError:  # no wheel for this machine: slower, the same bytes for every reader
    isal_zlib = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

_LEVEL: Final = 2  # of isal: as quick as 1, and smaller
_GZIP_WBITS: Final = 31


IsStopping = Callable[[], bool]


class LeftOpen(Exception):
    """A file was not closed, as there was no time for that any more; it is as it was."""


def never() -> bool:
    """For who has time."""
    return False


class Compressor(Protocol):
    """What `zlib.compressobj` makes."""

    def compress(self, data: bytes, /) -> bytes: ...
    def flush(self) -> bytes: ...


def stage(plain: Path, *, is_stopping: IsStopping = never) -> int:
    """Write and verify the day's closed file with the plain file as one more member, under its temporary name.

    Returns its size in bytes. Nothing that is seen from outside changes. Raises StorageFull; LeftOpen as soon as it is
    stopping; OSError (EIO) if what was read back is not what was written.
    """
    closed = plain.with_name(CLOSED_LOG_NAME)
    with files.temporary(closed) as staged:
        offset = _copy(closed, staged, is_stopping=is_stopping)
        with plain.open("rb") as source:
            _add_member(_unless(is_stopping, inflate.chunks_of(source)), staged)
    temporary = files.temporary_path(closed)
    is_same = _begins_with(temporary, closed, offset, is_stopping) and _member_is(temporary, offset, plain, is_stopping)
    if not is_same:
        temporary.unlink()
        raise OSError(errno.EIO, "the closed log reads back differently from what was written", str(closed))
    return temporary.stat().st_size


def commit(plain: Path) -> None:
    """Let the staged file replace the closed one; from then on the plain one may go."""
    closed = plain.with_name(CLOSED_LOG_NAME)
    files.temporary_path(closed).replace(closed)
    files.fsync_dir(closed.parent)


def discard(plain: Path) -> None:
    """Remove the staged file, if there is one."""
    files.temporary_path(plain.with_name(CLOSED_LOG_NAME)).unlink(missing_ok=True)


def remove(path: Path) -> None:
    path.unlink()
    files.fsync_dir(path.parent)


# --- after a crash ---------------------------------------------------------------------------------------------------


def remove_litter(folder: Path) -> None:
    """Remove what a killed process left under temporary names."""
    for path in folder.glob(".*.tmp"):
        path.unlink()


def mend_plain(plain: Path, *, note: Callable[[str, int], object]) -> bool:
    """Tell the keys of a plain file to `note` and cut its torn tail; returns whether the file is still there.

    It is not if the closed file has its lines already, or if no line is left of it.
    """
    if not plain.exists():
        return False
    good_bytes = _scan(plain, note)
    if good_bytes == 0 or is_closed(plain):
        logger.warning("removed a log that was closed or empty", extra={"file": str(plain), "good_bytes": good_bytes})
        remove(plain)
        return False
    torn_bytes = plain.stat().st_size - good_bytes
    if torn_bytes:
        logger.warning("cut the torn tail of a log", extra={"file": str(plain), "torn_bytes": torn_bytes})
        truncate(plain, good_bytes)
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


def keys_of(line: bytes) -> tuple[str, int] | None:
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


def truncate(path: Path, size_bytes: int) -> None:
    """Cut a file, durably."""
    with path.open("r+b") as file:
        file.truncate(size_bytes)
        os.fsync(file.fileno())


def _scan(plain: Path, note: Callable[[str, int], object]) -> int:
    """Note every key; returns where the last line ends that is complete and parses."""
    end = good_end = 0
    with plain.open("rb") as file:
        for line in inflate.complete_lines(inflate.chunks_of(file)):
            end += len(line) + 1
            key = keys_of(line)
            if key is not None:
                note(*key)
                good_end = end
    return good_end


def is_closed(plain: Path) -> bool:
    """Whether the last member of the closed file is the plain file, byte for byte."""
    closed = plain.with_name(CLOSED_LOG_NAME)
    if not closed.exists():
        return False
    with closed.open("rb") as file, plain.open("rb") as source:
        if not inflate.ends_with(file, source):
            return False
        members = inflate.Members(file)
        for _ in members.chunks():
            pass
    return not members.is_torn and _member_is(closed, members.last_start, plain)


def _salvage(closed: Path, whole_bytes: int, file: BinaryIO) -> None:
    aside = next(path for path in _names_aside(closed) if not path.exists())
    logger.error(
        "closed log is damaged, kept aside",
        extra={"file": str(closed), "aside": aside.name, "whole_bytes": whole_bytes},
    )
    with files.temporary(closed) as mended:
        _copy(closed, mended, limit_bytes=whole_bytes)
        pieces = inflate.salvage(file, start=whole_bytes, damaged=_nothing)
        lines = inflate.complete_lines(piece.data for piece in pieces)
        readable = (line + b"\n" for line in lines if keys_of(line) is not None)
        first = next(readable, None)
        if first is not None:
            _add_member(itertools.chain([first], readable), mended)
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


# --- bytes -----------------------------------------------------------------------------------------------------------


def compressor() -> Compressor:
    """Makes one gzip member, by the quickest means that this machine has."""
    if isal_zlib is None:
        return zlib.compressobj(_LEVEL, wbits=_GZIP_WBITS)
    fast: Compressor = isal_zlib.compressobj(_LEVEL, wbits=_GZIP_WBITS)
    return fast


def _add_member(chunks: Iterator[bytes], target: BinaryIO) -> None:
    member = compressor()
    for chunk in chunks:
        target.write(member.compress(chunk))
    target.write(member.flush())


def _unless(is_stopping: IsStopping, chunks: Iterable[bytes]) -> Iterator[bytes]:
    """The chunks; raises LeftOpen as soon as it is stopping."""
    for chunk in chunks:
        if is_stopping():
            raise LeftOpen
        yield chunk


def _copy(closed: Path, target: BinaryIO, *, limit_bytes: int | None = None, is_stopping: IsStopping = never) -> int:
    """Copy the closed file, if there is one; returns the bytes copied."""
    if not closed.exists():
        return 0
    with closed.open("rb") as source:
        for chunk in _unless(is_stopping, inflate.chunks_of(source)):
            target.write(chunk)
    if limit_bytes is not None:
        target.seek(limit_bytes)
        target.truncate()
    return target.tell()


def _begins_with(staged: Path, closed: Path, size_bytes: int, is_stopping: IsStopping) -> bool:
    if size_bytes == 0:
        return True
    with staged.open("rb") as new, closed.open("rb") as old:
        return all(new.read(len(chunk)) == chunk for chunk in _unless(is_stopping, inflate.chunks_of(old)))


def _member_is(path: Path, offset: int, plain: Path, is_stopping: IsStopping = never) -> bool:
    """Whether the one member from `offset` to the end holds exactly the plain file."""
    with path.open("rb") as file, plain.open("rb") as source:
        members = inflate.Members(file, offset=offset)
        if not all(source.read(len(chunk)) == chunk for chunk in _unless(is_stopping, members.chunks())):
            return False
        is_one = members.last_start == offset and members.whole_end == os.fstat(file.fileno()).st_size
        return is_one and not members.is_torn and source.read(1) == b""

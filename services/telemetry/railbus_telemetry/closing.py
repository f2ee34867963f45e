"""How a day's plain file joins the closed one, as one more gzip member.

The closed file with the new member is written beside the old one, read back and compared (`staged`), and renamed over
it (`replace`). Only then may the plain file go: at every instant each line stands in a whole file. It does not change
meanwhile; what comes is written elsewhere (`series`).
"""

from __future__ import annotations

import errno
import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Final, Protocol

from railbus_shared import files, inflate
from railbus_shared.layout import CLOSED_LOG_NAME

try:
    from isal import isal_zlib
except ImportError:  # no wheel for this machine: slower, the same bytes for every reader
    isal_zlib = None  # type: ignore[assignment]

_LEVEL: Final = 2  # of isal: as quick as 1, and smaller
_GZIP_WBITS: Final = 31


IsStopping = Callable[[], bool]


class LeftOpen(Exception):
    """A file was not closed, as there was no time for that any more; its lines are where they were."""


def never() -> bool:
    """For who has time."""
    return False


class Compressor(Protocol):
    """What `zlib.compressobj` makes."""

    def compress(self, data: bytes, /) -> bytes: ...
    def flush(self) -> bytes: ...


@contextmanager
def staged(plain: Path, *, is_stopping: IsStopping = never) -> Iterator[int]:
    """Write and verify the day's closed file with the plain file as one more member, under its temporary name.

    Yields its size in bytes; nothing that is seen from outside has changed then, and it is removed at the end unless
    it has replaced the closed file. Raises StorageFull; LeftOpen as soon as it is stopping; OSError (EIO) if what was
    read back is not what was written.
    """
    closed = plain.with_name(CLOSED_LOG_NAME)
    temporary = files.temporary_path(closed)
    try:
        with files.temporary(closed) as target:
            offset = copy(closed, target, is_stopping=is_stopping)
            with plain.open("rb") as source:
                add_member(_unless(is_stopping, inflate.chunks_of(source)), target)
        if not (
            _begins_with(temporary, closed, offset, is_stopping) and _member_is(temporary, offset, plain, is_stopping)
        ):
            raise OSError(errno.EIO, "the closed log reads back differently from what was written", str(closed))
        yield temporary.stat().st_size
    finally:
        temporary.unlink(missing_ok=True)


def replace(plain: Path) -> None:
    """Let the staged file replace the closed one; once the folder is flushed the plain one may go."""
    closed = plain.with_name(CLOSED_LOG_NAME)
    files.temporary_path(closed).replace(closed)


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


# --- bytes -----------------------------------------------------------------------------------------------------------


def compressor() -> Compressor:
    """Makes one gzip member, by the quickest means that this machine has."""
    if isal_zlib is None:
        return zlib.compressobj(_LEVEL, wbits=_GZIP_WBITS)
    fast: Compressor = isal_zlib.compressobj(_LEVEL, wbits=_GZIP_WBITS)
    return fast


def add_member(chunks: Iterator[bytes], target: BinaryIO) -> None:
    member = compressor()
    for chunk in chunks:
        target.write(member.compress(chunk))
    target.write(member.flush())


def copy(closed: Path, target: BinaryIO, *, limit_bytes: int | None = None, is_stopping: IsStopping = never) -> int:
    """Copy the closed file, if there is one, or its beginning; returns the bytes copied."""
    if not closed.exists():
        return 0
    with closed.open("rb") as source:
        for chunk in _unless(is_stopping, inflate.chunks_of(source)):
            target.write(chunk)
    if limit_bytes is not None:
        target.seek(limit_bytes)
        target.truncate()
    return target.tell()


def _unless(is_stopping: IsStopping, chunks: Iterable[bytes]) -> Iterator[bytes]:
    """The chunks; raises LeftOpen as soon as it is stopping."""
    for chunk in chunks:
        if is_stopping():
            raise LeftOpen
        yield chunk


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

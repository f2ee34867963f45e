"""Whether a checkpoint's bytes are what its meta says; nothing is read out of one before that is shown."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterator
from io import BufferedReader
from typing import Final

from railbus.checkpoints.catalogue import Checkpoint
from railbus_shared.contracts.artifacts import CheckpointFile
from railbus_shared.errors import CheckpointCorrupt
from railbus_shared.plain_files import opened

Report = Callable[[str, int, int | None], None]
"""Is told what is done, how much of it, and of how much, in bytes."""

_CHUNK_BYTES: Final = 4 << 20


def silent(_stage: str, _done: int, _total: int | None) -> None:
    """A report to nobody."""


def fault(one: Checkpoint, *, report: Report = silent) -> CheckpointCorrupt | None:
    """What is wrong with a checkpoint's files; None if every size and hash is as the meta says."""
    try:
        with verified(one, report=report):
            return None
    except CheckpointCorrupt as exc:
        return exc


@contextlib.contextmanager
def verified(one: Checkpoint, *, report: Report = silent) -> Iterator[BufferedReader]:
    """The first file of a checkpoint, open, once all of them have been hashed; raises CheckpointCorrupt."""
    total, done = one.num_bytes, 0
    for extra in one.meta.files[1:]:
        with _opened(one, extra) as file:
            done = _check(file, one, extra, done=done, report=lambda now: report("hash", now, total))
    first = one.meta.files[0]
    with _opened(one, first) as file:
        _check(file, one, first, done=done, report=lambda now: report("hash", now, total))
        file.seek(0)
        yield file


def _opened(one: Checkpoint, expected: CheckpointFile) -> BufferedReader:
    try:
        return opened(one.folder, expected.file)
    except FileNotFoundError as exc:
        path = str(one.folder / expected.file)
        raise CheckpointCorrupt(path=path, expected=f"{expected.bytes} bytes", actual="no such file") from exc


def _check(
    file: BufferedReader, one: Checkpoint, expected: CheckpointFile, *, done: int, report: Callable[[int], None]
) -> int:
    """Raises CheckpointCorrupt unless an open file has the size and hash that its meta states; gives what is done."""
    path, size = str(one.folder / expected.file), os.fstat(file.fileno()).st_size
    if size != expected.bytes:
        raise CheckpointCorrupt(path=path, expected=f"{expected.bytes} bytes", actual=f"{size} bytes")
    digest = hashlib.sha256()
    while chunk := file.read(_CHUNK_BYTES):
        digest.update(chunk)
        done += len(chunk)
        report(done)
    if digest.hexdigest() != expected.sha256:
        raise CheckpointCorrupt(path=path, expected=f"sha256 {expected.sha256}", actual=f"sha256 {digest.hexdigest()}")
    return done

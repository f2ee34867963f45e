"""Files that appear whole or not at all.

Every file is written beside its final name under a name that starts with a dot, flushed, and then takes its final name
by one atomic step; the folder is flushed after it. A reader therefore never sees half a file, and a crash leaves only
dot files, which are litter.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Final

import orjson

from railbus_shared.errors import StorageFull

_HASH_CHUNK_BYTES: Final = 1 << 20
_NO_SPACE: Final = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def fsync_dir(path: Path) -> None:
    """Make the names in a folder durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turn the system's errors for a full disk into StorageFull, naming the path."""
    try:
        yield
    except OSError as exc:
        if exc.errno not in _NO_SPACE:
            raise
        raise StorageFull(
            f"no space left to write {str(path)!r}", hint="free space or move the root; nothing older was touched"
        ) from exc


@contextmanager
def temporary(final: Path, *, mode: int = 0o644) -> Iterator[BinaryIO]:
    """A writable file beside `final` whose name starts with a dot; flushed and closed at the end, removed on error."""
    path = temporary_path(final)
    with storage_errors(path):
        path.unlink(missing_ok=True)
        try:
            with os.fdopen(os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, mode), "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
        except BaseException:
            path.unlink(missing_ok=True)
            raise


def temporary_path(final: Path) -> Path:
    return final.with_name(f".{final.name}.tmp")


def publish(temporary_file: Path, final: Path) -> None:
    """Give a flushed file its final name without replacing; raises FileExistsError if the name is taken."""
    os.link(temporary_file, final, follow_symlinks=False)
    temporary_file.unlink()
    fsync_dir(final.parent)


def write_new(final: Path, data: bytes, *, mode: int = 0o644) -> None:
    """Write a file that must not exist yet; of several writers one wins; raises FileExistsError, StorageFull."""
    with _written_beside(final, data, mode=mode) as path:
        publish(path, final)


def write_whole(final: Path, data: bytes, *, mode: int = 0o644, keep_owner: bool = False) -> None:
    """Write a file, replacing an older one of the name in one step; safe with several writers; raises StorageFull.

    With `keep_owner` what root replaces goes on to belong to whom it belonged.
    """
    with _written_beside(final, data, mode=mode) as path:
        if keep_owner and os.geteuid() == 0 and final.exists():
            before = final.stat()
            os.chown(path, before.st_uid, before.st_gid)
        path.replace(final)
        fsync_dir(final.parent)


@contextmanager
def _written_beside(final: Path, data: bytes, *, mode: int) -> Iterator[Path]:
    """A flushed file with a temporary name that no other writer uses; removed on error."""
    path = final.with_name(f".{final.name}.{os.getpid()}-{os.urandom(4).hex()}.tmp")
    with storage_errors(path):
        try:
            with os.fdopen(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, mode), "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            yield path
        except BaseException:
            path.unlink(missing_ok=True)
            raise


def remove_litter(folder: Path, *, but: str = "") -> None:
    """Remove what a crash left in a folder: its dot files and dot folders, except for one that may be of use."""
    for path in folder.glob(".*"):
        if path.name == but:
            continue
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def to_json(value: object) -> bytes:
    """JSON for people: two spaces of indent, keys in the order given, a newline at the end."""
    return orjson.dumps(value, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE)


def sha256_file(path: Path) -> str:
    """Hex SHA-256 of a file's bytes; the GIL is released while hashing."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(_HASH_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def sha256_if_any(path: Path) -> str | None:
    """Hex SHA-256 of a file's bytes; None if there is no such file."""
    try:
        return sha256_file(path)
    except FileNotFoundError:
        return None

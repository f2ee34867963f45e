"""A file of `torch.save`, proven before it is unpickled.

    1. the directory of the zip is read, and every length in it checked; nothing is believed yet
    2. the whole file is hashed; the bytes of the directory and of the pickle are kept as they went into the hash, while
       another thread reads values that are known to need memory of their own (`ahead`)
    3. the hash is compared, then the directory of step 1 with the bytes that were hashed
    4. the state is rebuilt from the pickle that was hashed, with `weights_only`, its tensors without values
    5. `TensorFile.fill` reads the values

All of it through one descriptor. Before 5 nothing outside this module has changed.
"""

from __future__ import annotations

import os
import stat
import threading
from collections.abc import Collection, Mapping
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import torch

from railbus_runner.checkpointing.filling import fill_storage
from railbus_runner.checkpointing.proving import NotProven, digest
from railbus_runner.checkpointing.tensor_file import TensorFile
from railbus_runner.checkpointing.unpickling import NoState, Skeleton, new_storage, rebuild
from railbus_shared.archive import Directory, Extent, NotAnArchive, read_directory
from railbus_shared.errors import CheckpointCorrupt

_PICKLE: Final = "data.pkl"
_BYTEORDER: Final = "byteorder"


def open_state(
    path: Path, *, nbytes: int | None = None, sha256: str | None = None, ahead: Collection[int] = ()
) -> TensorFile:
    """Prove a file and rebuild its state.

    Args:
        path: of a file of `torch.save`, of whatever age.
        nbytes: the size that it must have.
        sha256: the hash that it must have; without one, whatever its bytes are is taken, and `sha256` says.
        ahead: offsets of records that will be read to memory of their own; a hint, which saves time.

    Raises CheckpointCorrupt.
    """
    descriptor, size = open_plain(path, nbytes)
    try:
        return _proven(path, descriptor, size, sha256, ahead)
    except BaseException:
        os.close(descriptor)
        raise


def open_plain(path: Path, stated: int | None = None) -> tuple[int, int]:
    """A descriptor of a plain file, and its size, which must be the stated one; raises CheckpointCorrupt."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a pipe must not keep us waiting
    except OSError as exc:
        raise CheckpointCorrupt(path=str(path), expected=_stated(stated), actual=str(exc)) from exc
    found = os.fstat(descriptor)
    if stat.S_ISREG(found.st_mode) and stated in {None, found.st_size}:
        return descriptor, found.st_size
    os.close(descriptor)
    actual = f"{found.st_size} bytes" if stat.S_ISREG(found.st_mode) else "no file"
    raise CheckpointCorrupt(path=str(path), expected=_stated(stated), actual=actual)


def _proven(path: Path, descriptor: int, nbytes: int, stated: str | None, ahead: Collection[int]) -> TensorFile:
    directory, problem = _directory(descriptor, nbytes)
    with _Ahead(descriptor, directory.records, ahead) as reading:
        sha256, kept = _digest(path, descriptor, nbytes, directory)
        if stated not in {None, sha256}:
            raise CheckpointCorrupt(path=str(path), expected=f"sha256 {stated}", actual=f"sha256 {sha256}")
    if problem or _PICKLE not in directory.records:
        raise _no_state(path, problem or "no pickle is in it")
    if any(kept[extent] != read for extent, read in directory.kept.items()):
        raise CheckpointCorrupt(path=str(path), expected="a file at rest", actual="one that changed meanwhile")
    skeleton = _rebuilt(path, directory.records, kept, reading.storages)
    return TensorFile(
        path, descriptor, sha256=sha256, records=directory.records, skeleton=skeleton, filled=reading.storages
    )


class _Ahead:
    """Reads values to memory of their own while the file is still being hashed; they are used only if it is proven."""

    def __init__(self, descriptor: int, records: Mapping[str, Extent], offsets: Collection[int]) -> None:
        self.storages: dict[str, torch.UntypedStorage] = {}
        wanted = ((name, extent) for name, extent in records.items() if extent.offset in offsets)
        self._wanted = sorted(wanted, key=lambda item: item[1].offset)
        self._descriptor = descriptor
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._read, name="checkpoint-ahead", daemon=True)

    def __enter__(self) -> Self:
        if self._wanted:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._is_over.set()
        if self._wanted:
            self._thread.join()

    def _read(self) -> None:
        for name, extent in self._wanted:
            if self._is_over.is_set():
                return
            storage = new_storage(extent.nbytes)
            try:
                fill_storage(self._descriptor, storage, extent.offset)
            except (EOFError, OSError, MemoryError):
                return  # whoever needs it reads it again, and says what is wrong
            self.storages[name] = storage


def _directory(descriptor: int, nbytes: int) -> tuple[Directory, str]:
    """The directory, or an empty one and why: a wrong hash is to be told first."""
    try:
        return read_directory(descriptor, nbytes), ""
    except NotAnArchive as exc:
        return Directory({}, {}), str(exc)


def _digest(path: Path, descriptor: int, nbytes: int, directory: Directory) -> tuple[str, dict[Extent, bytes]]:
    texts = [directory.records[name] for name in (_PICKLE, _BYTEORDER) if name in directory.records]
    try:
        return digest(descriptor, nbytes=nbytes, keep=[*directory.kept, *texts])
    except (NotProven, OSError) as exc:
        raise CheckpointCorrupt(path=str(path), expected=_stated(nbytes), actual=str(exc)) from exc


def _rebuilt(
    path: Path,
    records: Mapping[str, Extent],
    kept: Mapping[Extent, bytes],
    filled: Mapping[str, torch.UntypedStorage],
) -> Skeleton:
    byteorder = kept[records[_BYTEORDER]] if _BYTEORDER in records else b"little"  # what torch took before it wrote it
    try:
        return rebuild(kept[records[_PICKLE]], records=records, byteorder=byteorder, filled=filled)
    except NoState as exc:
        raise CheckpointCorrupt(path=str(path), expected="tensors and plain containers", actual=str(exc)) from exc


def _no_state(path: Path, problem: str) -> CheckpointCorrupt:
    return CheckpointCorrupt(path=str(path), expected="a file of torch.save", actual=problem)


def _stated(nbytes: int | None) -> str:
    return "a file" if nbytes is None else f"{nbytes} bytes"

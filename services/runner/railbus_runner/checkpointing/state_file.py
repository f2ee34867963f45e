"""A file of `torch.save`, proven before it is unpickled, whose values are read to where they are wanted.

    1. the directory of the zip is read, and every length in it checked; nothing is believed yet
    2. the whole file is hashed; the bytes of the directory and of the pickle are kept as they went into the hash, while
       another thread reads values that are known to need memory of their own (`ahead`)
    3. the hash is compared, then the directory of step 1 with the bytes that were hashed
    4. the state is rebuilt from the pickle that was hashed, with `weights_only`, its tensors without values
    5. `fill`: the values go by `preadv` into live tensors or into memory of their own, never through a mapping of the
       file, which costs a page fault for every few KiB and leaves tensors that change or vanish with the file

All of it through one descriptor. Before 5 nothing outside this module has changed.
"""

from __future__ import annotations

import os
import stat
import threading
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import torch

from railbus_runner.checkpointing.archive import Directory, Extent, NotAnArchive, read_directory
from railbus_runner.checkpointing.filling import Placement, fill, fill_storage
from railbus_runner.checkpointing.proving import NotProven, digest
from railbus_runner.checkpointing.unpickling import NoState, Skeleton, check_sparse, new_storage, rebuild, tensors_in
from railbus_shared.errors import CheckpointCorrupt

_PICKLE: Final = "data.pkl"
_BYTEORDER: Final = "byteorder"


class StateFile:
    """An open file whose bytes matched their hash; to be closed, or used as a context.

    Attributes:
        path: where it lies.
        nbytes: its size.
        sha256: of all its bytes.
        state: what it holds; the tensors have no values before `fill`.
    """

    def __init__(self, path: Path, descriptor: int, *, nbytes: int, ahead: Collection[int], sha256: str | None) -> None:
        """Takes over the descriptor. Raises CheckpointCorrupt for what is not as stated, or holds no state."""
        self.path = path
        self.nbytes = nbytes
        self._descriptor = descriptor
        directory, problem = _directory(descriptor, nbytes)
        with _Ahead(descriptor, directory.records, ahead) as reading:
            self.sha256, kept = _digest(path, descriptor, nbytes, directory)
            if sha256 is not None and self.sha256 != sha256:
                raise CheckpointCorrupt(path=str(path), expected=f"sha256 {sha256}", actual=f"sha256 {self.sha256}")
        if problem or _PICKLE not in directory.records:
            raise _no_state(path, problem or "no pickle is in it")
        if any(kept[extent] != read for extent, read in directory.kept.items()):
            raise CheckpointCorrupt(path=str(path), expected="a file at rest", actual="one that changed meanwhile")
        self._records = directory.records
        self._filled = set(reading.storages)
        self._skeleton = _rebuilt(path, directory.records, kept, reading.storages)
        self.state = self._skeleton.state

    def place(self, saved: torch.Tensor, target: torch.Tensor) -> Placement | None:
        """How the values of a tensor of the state get into another of the same dtype and shape; None if they cannot.

        Both must lie in memory alike, without gaps.
        """
        record = self._skeleton.record_of(saved)
        if record is None or not _lie_alike(saved, target):
            return None
        first = self._records[record].offset + int(saved.storage_offset()) * saved.element_size()
        return Placement(Extent(first, saved.numel() * saved.element_size()), target)

    def fill(self, state: object, placements: Iterable[Placement] = ()) -> int:
        """Read the values of every tensor of this file that is in `state`, and those of `placements`.

        `state` is this file's, or a part of it. Gives the bytes that were read to their place. Raises CheckpointCorrupt
        if the file can no longer be read, when what was to be filled may hold anything.
        """
        try:
            total = fill(self._descriptor, placements)
            for name in sorted(self._needed(state) - self._filled, key=lambda name: self._records[name].offset):
                fill_storage(self._descriptor, self._skeleton.storages[name], self._records[name].offset)
                self._filled.add(name)
        except (EOFError, OSError) as exc:
            raise CheckpointCorrupt(
                path=str(self.path), expected="the bytes that were hashed", actual=str(exc)
            ) from exc
        check_sparse()
        return total + sum(self._records[name].nbytes for name in self._needed(state))

    def close(self) -> None:
        """Let go of the file; what was filled stays."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _needed(self, state: object) -> set[str]:
        """The records that tensors of a state lie in; all where it holds something of unknown kind."""
        needed: set[str] = set()
        for tensor in tensors_in(state):
            if tensor is None:
                return set(self._skeleton.storages)
            if (record := self._skeleton.record_of(tensor)) is not None:
                needed.add(record)
        return needed


def open_state(
    path: Path, *, nbytes: int | None = None, sha256: str | None = None, ahead: Collection[int] = ()
) -> StateFile:
    """Prove a file and rebuild its state.

    Args:
        path: of a file of `torch.save`, of whatever age.
        nbytes: the size that it must have.
        sha256: the hash that it must have; without one, whatever its bytes are is taken, and `sha256` says.
        ahead: offsets of records that will be read to memory of their own; a hint, which saves time.

    Raises CheckpointCorrupt.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a pipe must not keep us waiting
    except OSError as exc:
        raise CheckpointCorrupt(path=str(path), expected=_stated(nbytes), actual=str(exc)) from exc
    try:
        size = _size(path, descriptor, nbytes)
        return StateFile(path, descriptor, nbytes=size, ahead=ahead, sha256=sha256)
    except BaseException:
        os.close(descriptor)
        raise


def _size(path: Path, descriptor: int, stated: int | None) -> int:
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode):
        raise CheckpointCorrupt(path=str(path), expected=_stated(stated), actual="no file")
    if stated is not None and found.st_size != stated:
        raise CheckpointCorrupt(path=str(path), expected=_stated(stated), actual=f"{found.st_size} bytes")
    return found.st_size


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


def _lie_alike(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether the elements of both fill one run of memory, in the same order."""
    if one.is_contiguous() and other.is_contiguous():
        return True
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return (
        one.dim() in formats and one.stride() == other.stride() and one.is_contiguous(memory_format=formats[one.dim()])
    )

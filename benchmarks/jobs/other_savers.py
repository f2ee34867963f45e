"""What railbus's checkpoints are measured against: limits of the machine, and how others write and read a state.

Each is used at its best on a machine without a GPU, and flushes what it writes: without `fsync` nothing is durable.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import time
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Final, cast

import torch
import torch.distributed.checkpoint as dcp
from large_state import Buffer, Training, tensors_of
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

IsDurable = Callable[[], bool]
BLOCK_BYTES: Final = 16 << 20


class Limits:
    """The same bytes copied, hashed, and written raw; nothing that does one of these can take less time."""

    def __init__(self, training: Training, buffer: Buffer, folder: Path) -> None:
        self._tensors = training.tensors()
        self._buffer = buffer
        self._path = folder / "raw"

    def copy(self) -> None:
        """Into memory that was touched before, with one thread."""
        self._buffer.fill(self._tensors)

    def hash(self) -> None:
        """SHA-256 of memory, with one thread."""
        hashlib.sha256(self._buffer.memory).digest()

    def write(self) -> None:
        """Past the page cache where the file system lets that be, into blocks that are reserved at once."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC
        try:
            descriptor = os.open(self._path, flags | os.O_DIRECT, 0o600)
        except OSError:  # tmpfs and some others
            descriptor = os.open(self._path, flags, 0o600)
        with memoryview(self._buffer.memory) as memory:
            os.posix_fallocate(descriptor, 0, len(memory))
            for start in range(0, len(memory), BLOCK_BYTES):
                os.write(descriptor, memory[start : start + BLOCK_BYTES])
        os.fsync(descriptor)
        os.close(descriptor)


class Savers:
    """Each method begins a save, and returns when the loop may go on; what it gives tells when the save is durable."""

    def __init__(self, training: Training, folder: Path) -> None:
        self._training = training
        self.folder = folder
        self._stager = DefaultStager(
            StagingOptions(
                use_pinned_memory=False,
                use_shared_memory=True,
                use_async_staging=False,
                use_non_blocking_copy=False,
            )
        )

    def clean(self) -> None:
        """Remove what was written."""
        shutil.rmtree(self.folder)
        self.folder.mkdir()

    def close(self) -> None:
        self._stager.close()

    def torch_save(self) -> IsDurable:
        """The path is given, which is faster than a file object: torch writes it in C++."""
        torch.save(self._training.state, self.folder / "torch.pt")
        fsync(self.folder / "torch.pt")
        return _at_once

    def safetensors(self) -> IsDurable:
        save_file(flat(self._training.state), self.folder / "flat.safetensors")
        fsync(self.folder / "flat.safetensors")
        return _at_once

    def dcp_save(self) -> IsDurable:
        with warnings.catch_warnings(action="ignore"):
            dcp.save(self._training.state, storage_writer=self._writer(), no_dist=True)
        return _at_once

    def dcp_async_shared(self) -> IsDurable:
        """With a stager that keeps shared memory from save to save."""
        return self._dcp_async(self._stager)

    def dcp_async_default(self) -> IsDurable:
        """As it is without a word about staging: memory is had anew each time."""
        return self._dcp_async(None)

    def _dcp_async(self, stager: DefaultStager | None) -> IsDurable:
        with warnings.catch_warnings(action="ignore"):
            future = dcp.async_save(
                self._training.state, storage_writer=self._writer(), async_stager=stager, no_dist=True
            )
        return cast("Future[object]", future).done

    def _writer(self) -> dcp.FileSystemWriter:
        return dcp.FileSystemWriter(self.folder / "dcp", sync_files=True)


class Loaders:
    """Each method reads a state from disk into the tensors that are there; none of them verifies what it reads."""

    def __init__(self, training: Training, folder: Path, *, checkpoint: Path) -> None:
        self._training = training
        self._checkpoint = checkpoint
        self._flat, self._dcp = folder / "flat.safetensors", folder / "dcp"
        save_file(flat(training.state), self._flat)
        with warnings.catch_warnings(action="ignore"):
            dcp.save(training.state, storage_writer=dcp.FileSystemWriter(self._dcp), no_dist=True)
        for path in self.files():
            fsync(path)

    def files(self) -> list[Path]:
        return [self._checkpoint, self._flat, *self._dcp.iterdir()]

    def torch_load(self) -> None:
        """Read whole, then copied."""
        self._take(torch.load(self._checkpoint, weights_only=True)["parts"])

    def torch_load_mapped(self) -> None:
        """Mapped, then copied out of the map."""
        self._take(torch.load(self._checkpoint, weights_only=True, mmap=True)["parts"])

    def torch_load_at_start(self) -> None:
        """As a script goes on: the optimizer, which has no state yet, takes the tensors that were read."""
        self._begin(torch.load(self._checkpoint, weights_only=True)["parts"])

    def torch_load_mapped_at_start(self) -> None:
        """The optimizer's tensors are copied out of the map, in which they would be changed otherwise."""
        found = torch.load(self._checkpoint, weights_only=True, mmap=True)["parts"]
        state = found["optimizer"]["state"]
        copied = {
            number: {name: tensor.clone() for name, tensor in tensors.items()} for number, tensors in state.items()
        }
        self._begin({**found, "optimizer": {**found["optimizer"], "state": copied}})

    def _begin(self, found: Any) -> None:
        self._training.model.load_state_dict(found["model"])
        self._training.optimizer.load_state_dict(found["optimizer"])

    def safetensors(self) -> None:
        found = load_file(self._flat)
        self._take([found[name] for name in flat(self._training.state)])

    def dcp_load(self) -> None:
        """Into the tensors themselves."""
        with warnings.catch_warnings(action="ignore"):
            dcp.load(self._training.state, checkpoint_id=self._dcp, no_dist=True)

    def _take(self, loaded: object) -> None:
        torch._foreach_copy_(self._training.tensors(), list(tensors_of(loaded)))


def flat(state: Mapping[str, object]) -> dict[str, torch.Tensor]:
    """Tensors by a name each, as safetensors wants them."""
    return {str(number): tensor for number, tensor in enumerate(tensors_of(state))}


def fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    os.fsync(descriptor)
    os.close(descriptor)


def evict(path: Path) -> None:
    """Let the page cache forget a file that is on disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


def until(is_durable: IsDurable) -> None:
    while not is_durable():
        time.sleep(0.001)


def _at_once() -> bool:
    return True

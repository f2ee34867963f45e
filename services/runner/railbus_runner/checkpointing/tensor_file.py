"""An open file that has been proven, and whose tensors get their values where they are wanted.

The values go by `preadv` into live tensors or into memory of their own, never through a mapping of the file: that costs
a page fault for every few KiB, and leaves tensors that change or vanish with the file.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Self

import torch

from railbus_runner.checkpointing.filling import Placement, fill, fill_storage
from railbus_runner.checkpointing.unpickling import Skeleton, check_sparse, tensors_in
from railbus_shared.archive import Extent
from railbus_shared.errors import CheckpointCorrupt


class TensorFile:
    """An open file whose bytes matched their hash; to be closed, or used as a context.

    Attributes:
        path: where it lies.
        sha256: of all its bytes.
        state: what it holds; the tensors have no values before `fill`.
    """

    def __init__(
        self,
        path: Path,
        descriptor: int,
        *,
        sha256: str,
        records: Mapping[str, Extent],
        skeleton: Skeleton,
        filled: Iterable[str] = (),
    ) -> None:
        """Takes over the descriptor; `filled` are records whose storages have their values already."""
        self.path = path
        self.sha256 = sha256
        self.state = skeleton.state
        self._descriptor = descriptor
        self._records = records
        self._skeleton = skeleton
        self._filled = set(filled)

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


def _lie_alike(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether the elements of both fill one run of memory, in the same order."""
    if one.is_contiguous() and other.is_contiguous():
        return True
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return (
        one.dim() in formats and one.stride() == other.stride() and one.is_contiguous(memory_format=formats[one.dim()])
    )

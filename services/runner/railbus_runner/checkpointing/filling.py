"""Reads parts of a file into the memory of tensors: straight for the CPU, through pinned buffers for a GPU.

Source of the two alternating buffers: the copy engine of a GPU works while the next bytes are read, as in
https://docs.pytorch.org/tutorials/intermediate/pinmem_nonblock.html.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final, cast

import torch

from railbus_shared.archive import Extent

_READ_BYTES: Final = 1 << 30
"""Linux gives at most 2 GiB at once."""
STAGING_BYTES: Final = 16 << 20


@dataclass(frozen=True)
class Placement:
    """Values of a file, and the dense tensor that they are for: its memory holds exactly these bytes, in this order."""

    extent: Extent
    target: torch.Tensor


def fill(descriptor: int, placements: Iterable[Placement]) -> int:
    """Read values into tensors on whatever device, in the order of the file; gives the bytes that were read.

    Raises EOFError if the file is shorter. The tensors hold their values once this returns.
    """
    staging: dict[torch.device, _Staging] = {}
    total = 0
    for placement in sorted(placements, key=lambda placement: placement.extent.offset):
        if placement.extent.nbytes == 0:
            continue
        bytes_ = _bytes_of(placement.target, placement.extent.nbytes)
        if bytes_.device.type == "cpu":
            read_into(descriptor, _view(bytes_), placement.extent.offset)
        else:
            if bytes_.device not in staging:
                staging[bytes_.device] = _Staging(bytes_.device)
            staging[bytes_.device].read(descriptor, bytes_, placement.extent.offset)
        total += placement.extent.nbytes
    for stage in staging.values():
        stage.finish()
    return total


def fill_storage(descriptor: int, storage: torch.UntypedStorage, offset: int) -> None:
    """Read a whole storage of the CPU; raises EOFError."""
    if storage.nbytes():
        whole = torch.empty(0, dtype=torch.uint8).set_(storage)
        read_into(descriptor, _view(whole), offset)


def read_into(descriptor: int, memory: memoryview, offset: int) -> None:
    """Read as many bytes as the memory has; raises EOFError if the file ends before."""
    done = 0
    while done < len(memory):
        count = os.preadv(descriptor, [memory[done : done + _READ_BYTES]], offset + done)
        if count == 0:
            raise EOFError(f"the file ends at byte {offset + done}, and {len(memory) - done} more were expected")
        done += count


class _Staging:
    """Two buffers of the host between a file and one device."""

    def __init__(self, device: torch.device) -> None:
        self._is_cuda = device.type == "cuda"
        self._device = device
        pair = [torch.empty(STAGING_BYTES, dtype=torch.uint8, pin_memory=self._is_cuda) for _ in range(2)]
        self._buffers = pair
        self._copied = [_event() for _ in pair] if self._is_cuda else []
        self._turn = 0

    def read(self, descriptor: int, target: torch.Tensor, offset: int) -> None:
        """Have `target`, bytes on the device, filled from the file."""
        for start in range(0, target.numel(), STAGING_BYTES):
            part = target[start : start + STAGING_BYTES]
            buffer = self._buffers[self._turn][: part.numel()]
            if self._is_cuda:
                self._copied[self._turn].synchronize()  # the copy out of it that is under way, if any
            read_into(descriptor, _view(buffer), offset + start)
            part.copy_(buffer, non_blocking=self._is_cuda)
            if self._is_cuda:
                self._copied[self._turn].record(torch.cuda.current_stream(self._device))
            self._turn = 1 - self._turn

    def finish(self) -> None:
        """Wait until all is on the device."""
        for event in self._copied:
            event.synchronize()


def _event() -> torch.cuda.Event:
    return torch.cuda.Event()  # type: ignore[no-untyped-call]


def _bytes_of(tensor: torch.Tensor, nbytes: int) -> torch.Tensor:
    """The memory of a dense tensor as uint8, whatever its dtype and strides."""
    first = tensor.storage_offset() * tensor.element_size()
    empty = torch.empty(0, dtype=torch.uint8, device=tensor.device)
    return empty.set_(tensor.untyped_storage(), first, (nbytes,))  # type: ignore[call-overload,no-any-return]


def _view(tensor: torch.Tensor) -> memoryview:
    return memoryview(cast("Any", tensor.numpy()))

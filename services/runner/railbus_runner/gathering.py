"""Batches gathered from mapped shards: one `take` per column and shard into a page-aligned buffer, then to the device.

On the CPU a buffer is the batch's own memory, made anew for each, so a batch is the caller's to keep. For a CUDA device
the buffer is pinned and copied without waiting; torch gives pinned memory out again only after the copy has ended.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import torch

from railbus_shared.contracts.artifacts import Column
from railbus_shared.data.index import ITEM_BYTES, DatasetIndex, sample_bytes
from railbus_shared.data.order import Positions
from railbus_shared.data.readers import Array, ShardReader, numpy_dtype, open_shard, page_aligned_empty

Batch = dict[str, torch.Tensor]

TORCH_DTYPES: Final[dict[str, torch.dtype]] = {name: getattr(torch, name) for name in ITEM_BYTES}
_LARGE_BYTES: Final = 128 << 10
"""From here on it shows where a buffer begins."""


@dataclass(frozen=True)
class Rows:
    """Where samples lie: shard numbers and rows, int64 (N,) each."""

    numbers: Positions
    rows: Positions


class Gatherer:
    """Opens shards as they are needed and gathers batches from them."""

    def __init__(
        self,
        index: DatasetIndex,
        shard_paths: Mapping[int, Path],
        *,
        device: torch.device,
        ensure_verified: Callable[[Sequence[int]], None],
    ) -> None:
        self._index = index
        self._paths = shard_paths
        self._device = device
        self._ensure_verified = ensure_verified
        self._readers: dict[int, ShardReader] = {}
        self._columns = {name: _Column(column) for name, column in index.schema.columns.items()}

    def gather(self, where: Rows) -> Batch:
        """A tensor (N, *shape) of each column, on the device; raises what `ensure_verified` raises."""
        present: list[int] = np.flatnonzero(np.bincount(where.numbers)).tolist()  # np.unique imports more: 50 ms
        self._open(present)
        places = [(number, np.flatnonzero(where.numbers == number)) for number in present] if len(present) > 1 else []
        batch: Batch = {}
        for name, column in self._columns.items():
            tensor, array = column.buffer(len(where.rows), is_pinned=self._is_cuda)
            if len(present) == 1:
                self._readers[present[0]].take(name, where.rows, array)
            for number, here in places:
                array[here] = column.taken(self._readers[number], name, where.rows[here])
            batch[name] = tensor.to(self._device, non_blocking=True) if self._is_cuda else tensor
        return batch

    @property
    def _is_cuda(self) -> bool:
        return self._device.type == "cuda"

    def _open(self, numbers: Sequence[int]) -> None:
        new = [number for number in numbers if number not in self._readers]
        if new:
            self._ensure_verified(new)
            for number in new:
                self._readers[number] = open_shard(self._paths[number], self._index, number)


class _Column:
    """One column of the batches: its buffers, and scratch memory."""

    def __init__(self, column: Column) -> None:
        self._dtype = TORCH_DTYPES[column.dtype]
        self._array_dtype = numpy_dtype(column)
        self._shape = column.shape
        self._sample_bytes = sample_bytes(column)
        self._scratch: Array | None = None

    def buffer(self, samples: int, *, is_pinned: bool) -> tuple[torch.Tensor, Array]:
        """A tensor, and the array that fills it; a CUDA device copies from pinned memory by itself."""
        shape = (samples, *self._shape)
        if is_pinned:
            tensor = torch.empty(shape, dtype=self._dtype, pin_memory=True)
            array: Array = (tensor.view(torch.uint16) if self._dtype is torch.bfloat16 else tensor).numpy()
            return tensor, array
        is_large = samples * self._sample_bytes >= _LARGE_BYTES
        array = page_aligned_empty(shape, self._array_dtype) if is_large else np.empty(shape, self._array_dtype)
        return torch.from_numpy(array).view(self._dtype), array

    def taken(self, reader: ShardReader, name: str, rows: Positions) -> Array:
        """Rows of a column in scratch memory, good until the next call."""
        if self._scratch is None or len(self._scratch) < len(rows):
            self._scratch = page_aligned_empty((len(rows), *self._shape), self._array_dtype)
        scratch = self._scratch[: len(rows)]
        reader.take(name, rows, scratch)
        return scratch

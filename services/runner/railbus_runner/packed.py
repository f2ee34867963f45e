"""`Packed`: a column of variable length in a batch, as two tensors; the samples lie back to back.

It is what `Ragged` is to NumPy. Nothing is copied until somebody asks for a form that needs it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch


@dataclass(frozen=True, eq=False)
class Packed:
    """Samples of different lengths: sample i is `values[offsets[i]:offsets[i + 1]]`."""

    values: torch.Tensor
    """All items (items, *shape)."""
    offsets: torch.Tensor
    """Where each sample begins, and where the last one ends; int64 (samples + 1,)."""

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, number: int) -> torch.Tensor:
        """One sample's items (length, *shape), as a view. Raises IndexError for a sample that is not there."""
        if not -len(self) <= number < len(self):
            raise IndexError(f"sample {number} of {len(self)}")
        at = number % len(self)
        return self.values[int(self.offsets[at]) : int(self.offsets[at + 1])]

    def __iter__(self) -> Iterator[torch.Tensor]:
        return iter(self.to_list())

    @property
    def lengths(self) -> torch.Tensor:
        """Items of each sample, int64 (samples,)."""
        return self.offsets.diff()

    def to_list(self) -> list[torch.Tensor]:
        """Every sample's items, as views."""
        return list(self.values.split(self.lengths.tolist()))  # type: ignore[no-untyped-call]

    def bytes(self, number: int) -> bytes:
        """One sample as it lies in memory: of a column of bytes the very bytes, for instance of an image file."""
        return self[number].contiguous().view(torch.uint8).cpu().numpy().tobytes()

    def padded(self, fill: float = 0, length: int | None = None) -> torch.Tensor:
        """A new tensor (samples, length, *shape): each sample's items, cut at `length`, then `fill`.

        `length` is that of the longest sample unless it is given.
        """
        lengths = self.lengths
        if length is None:
            length = int(lengths.max()) if len(self) else 0
        columns = torch.arange(length, device=self.values.device)
        is_item = columns < lengths[:, None]
        padded = self.values.new_full((len(self), length, *self.values.shape[1:]), fill)
        items = (self.offsets[:-1, None] + columns)[is_item]
        padded[is_item] = self.values[items]
        return padded

    def nested(self) -> torch.Tensor:
        """The same memory as a nested tensor of layout `torch.jagged`."""
        return torch.nested.nested_tensor_from_jagged(self.values, self.offsets)

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Packed:
        """Itself on another device."""
        return Packed(
            self.values.to(device, non_blocking=non_blocking), self.offsets.to(device, non_blocking=non_blocking)
        )

    def pin_memory(self) -> Packed:
        """Itself in pinned memory; `DataLoader(pin_memory=True)` calls it."""
        return Packed(self.values.pin_memory(), self.offsets.pin_memory())

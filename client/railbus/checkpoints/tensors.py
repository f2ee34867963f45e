"""The tensors of a checkpoint: which there are, where their bytes lie, and their bytes.

The meta says so; where it does not, as in files that an older railbus wrote, or not of all, as where some are not
contiguous, the file's own description is read (`skeleton`). Either way nothing is unpickled that could do anything.
"""

from __future__ import annotations

import bisect
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from io import BufferedReader
from typing import Final

import numpy as np

from railbus.checkpoints.catalogue import Checkpoint
from railbus.checkpoints.dtypes import ITEM_BYTES, Bytes
from railbus.checkpoints.skeleton import Found, Opaque, skeleton, storages
from railbus_shared.archive import Extent
from railbus_shared.contracts.artifacts import TensorPlace
from railbus_shared.errors import CheckpointCorrupt, NotSupported

CHUNK_BYTES: Final = 8 << 20
PARTS: Final = "parts."
"""Begins the names of all tensors of what the entrypoint tracks."""


@dataclass(frozen=True)
class Tensor:
    """A dense tensor in a file."""

    name: str
    """Where it stands in the state, for instance `parts.model.fc.weight`."""
    dtype: str
    shape: tuple[int, ...]
    offset: int
    """Of its first element, bytes from the start of the file."""
    strides: tuple[int, ...] | None = None
    """In elements, where its elements do not lie one after the other."""

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        """Of its elements, one after the other."""
        return self.num_elements * ITEM_BYTES[self.dtype]

    @property
    def form(self) -> str:
        return f"{self.dtype}[{', '.join(map(str, self.shape))}]"

    @property
    def span_bytes(self) -> int:
        """From its first to behind its last element in the file."""
        if self.strides is None or not self.num_elements:
            return self.num_bytes
        last = sum((size - 1) * stride for size, stride in zip(self.shape, self.strides, strict=True))
        return (last + 1) * ITEM_BYTES[self.dtype]


@dataclass(frozen=True)
class Contents:
    """What a checkpoint holds."""

    tensors: dict[str, Tensor]
    others: tuple[str, ...] = ()
    """Names of tensors that are not dense, such as sparse ones; only torch can read them."""

    @property
    def names(self) -> tuple[str, ...]:
        return (*self.tensors, *self.others)

    @property
    def parts(self) -> tuple[str, ...]:
        """Names under which something with tensors was tracked."""
        tracked = (name.removeprefix(PARTS) for name in self.names if name.startswith(PARTS))
        return tuple(dict.fromkeys(name.partition(".")[0] for name in tracked))

    def part(self, name: str) -> Contents:
        """What was tracked under a name."""
        prefix = f"{PARTS}{name}."
        return Contents(
            {name: one for name, one in self.tensors.items() if name.startswith(prefix)},
            tuple(name for name in self.others if name.startswith(prefix)),
        )


def contents(one: Checkpoint, file: BufferedReader) -> Contents:
    """The tensors in the one file of a checkpoint (see `as_one_file`), whose bytes are verified.

    Raises NotSupported for a dtype that is not known, CheckpointCorrupt.
    """
    placed = Contents({name: _placed(one, name, place) for name, place in one.meta.tensors.items()})
    _check_within(one, placed, file)
    if placed.tensors and _is_all(placed, storages(file, _path(one))):
        return placed
    found = _described(one, file)
    _check_within(one, found, file)
    return found


def _check_within(one: Checkpoint, found: Contents, file: BufferedReader) -> None:
    size = os.fstat(file.fileno()).st_size
    for tensor in found.tensors.values():
        if (end := tensor.offset + tensor.span_bytes) > size:
            raise _wrong(one, f"{tensor.name} within {size} bytes", f"one that ends at {end}")


def read(file: BufferedReader, tensor: Tensor, *, chunk_bytes: int = CHUNK_BYTES) -> Iterator[Bytes]:
    """A tensor's elements in order, as bytes, in pieces of whole elements; CheckpointCorrupt if it ends early."""
    if tensor.strides is not None:
        yield _gathered(file, tensor)
        return
    piece = max(1, chunk_bytes // ITEM_BYTES[tensor.dtype]) * ITEM_BYTES[tensor.dtype]
    for start in range(0, tensor.num_bytes, piece):
        yield _read(file, tensor, tensor.offset + start, min(piece, tensor.num_bytes - start))


def _gathered(file: BufferedReader, tensor: Tensor) -> Bytes:
    strides = tuple(stride * ITEM_BYTES[tensor.dtype] for stride in tensor.strides or ())
    raw = _read(file, tensor, tensor.offset, tensor.span_bytes)
    item = np.dtype((np.void, ITEM_BYTES[tensor.dtype]))
    view = np.lib.stride_tricks.as_strided(
        raw[: raw.size // item.itemsize * item.itemsize].view(item), tensor.shape, strides
    )
    return np.ascontiguousarray(view).reshape(-1).view(np.uint8)


def _read(file: BufferedReader, tensor: Tensor, offset: int, count: int) -> Bytes:
    raw = np.empty(count, np.uint8)
    done = 0
    while done < count:
        got = os.preadv(file.fileno(), [raw.data[done:]], offset + done)
        if not got:
            raise CheckpointCorrupt(
                path=tensor.name,
                expected=f"{count} bytes at {offset}",
                actual="a file that was cut since it was hashed",
            )
        done += got
    return raw


def _placed(one: Checkpoint, name: str, place: TensorPlace) -> Tensor:
    tensor = Tensor(name, _known(one, name, place.dtype), place.shape, place.offset)
    if tensor.num_bytes != place.bytes:
        raise _wrong(one, f"{name} of {tensor.num_bytes} bytes, as {tensor.form}", f"{place.bytes} bytes")
    return tensor


def _is_all(placed: Contents, extents: Mapping[str, Extent]) -> bool:
    """Whether every storage that is not empty belongs to some tensor of the table: else it tells only of a part."""
    begins = sorted({tensor.offset for tensor in placed.tensors.values() if tensor.num_bytes})
    firsts = (
        (bisect.bisect_left(begins, one.offset), one.offset + one.nbytes) for one in extents.values() if one.nbytes
    )
    return all(at < len(begins) and begins[at] < end for at, end in firsts)


def _described(one: Checkpoint, file: BufferedReader) -> Contents:
    found, extents = skeleton(file, _path(one))
    dense = {name: item for name, item in found.items() if isinstance(item, Found)}
    try:
        tensors = {name: _found(one, name, item, extents[item.storage]) for name, item in dense.items()}
    except KeyError as exc:
        raise _wrong(one, f"a storage {exc}", "none of that name") from exc
    return Contents(tensors, tuple(name for name, item in found.items() if isinstance(item, Opaque)))


def _found(one: Checkpoint, name: str, item: Found, storage: Extent) -> Tensor:
    start, size = storage.offset, storage.nbytes
    if len(item.shape) != len(item.strides) or min((*item.shape, *item.strides, item.first)) < 0:
        raise _wrong(one, f"{name} as torch describes tensors", f"shape {item.shape} and strides {item.strides}")
    dtype = _known(one, name, item.dtype)
    strides = None if item.strides == _dense_strides(item.shape, item.strides) else item.strides
    tensor = Tensor(name, dtype, item.shape, start + item.first * ITEM_BYTES[dtype], strides)
    if tensor.num_elements and tensor.offset + tensor.span_bytes > start + size:
        raise _wrong(one, f"{name} within its storage", "one that leaves it")
    return tensor


def _dense_strides(shape: tuple[int, ...], strides: tuple[int, ...]) -> tuple[int, ...]:
    """Those of a contiguous tensor; an axis of one element may have any, so it keeps its own."""
    dense, step = list(strides), 1
    for axis in reversed(range(len(shape))):
        if shape[axis] != 1:
            dense[axis] = step
            step *= shape[axis]
    return tuple(dense) if math.prod(shape) else strides


def _known(one: Checkpoint, name: str, dtype: str) -> str:
    if dtype not in ITEM_BYTES:
        raise NotSupported(f"{one.title}: tensor {name!r} has dtype {dtype!r}, which cannot be read without torch")
    return dtype


def _wrong(one: Checkpoint, expected: str, actual: str) -> CheckpointCorrupt:
    return CheckpointCorrupt(path=_path(one), expected=expected, actual=actual)


def _path(one: Checkpoint) -> str:
    return str(one.folder / one.meta.files[0].file)

"""A state as the exact bytes of one `.pt` file, made without copying a tensor.

    of          pickles the state and lays out its storages: a few milliseconds for hundreds of tensors
    copy_to     the whole file into an arena: one pass over the data
    chunks      the same bytes in order, straight from live memory

The file is one of torch.save: torch.load opens it, with `weights_only` and with `mmap`. It differs in the order of its
records (`zip_layout`), and it has no `.format_version` record, by which torch would take that order for its own and
compute offsets instead of reading them. A storage that several tensors share is written once, whole, and they come back
tied.

Until its bytes are copied or written, the tensors of a state must not change.
"""

from __future__ import annotations

import functools
import io
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Final, cast

import torch

from railbus_runner.checkpointing.copying import copy, pieces_of
from railbus_runner.checkpointing.model_schema import dtype_name
from railbus_runner.checkpointing.pickling import StatePickler, is_dense
from railbus_runner.checkpointing.zip_layout import ZipLayout
from railbus_shared.contracts.artifacts import TensorPlace

CHUNK_BYTES: Final = 16 << 20
"""At most so much of a device's memory is brought to the host at a time while `chunks` are taken."""
MAX_TOLD: Final = 16_384
"""Tensors whose places are told. A meta that names more is slow to read, and from some 50,000 on no valid one (`wire`);
who needs the places then finds them in the file itself."""
_FORMAT_VERSION: Final = b"3\n"
"""Of torch's files: what torch.save writes (kProducedFileFormatVersion)."""


class Image:
    """The bytes of a state's file, as long as its tensors stay as they are.

    Attributes:
        nbytes: of the whole file.
        tensors: where the elements of each dense, contiguous tensor lie, by its keys and positions in the state, joined
            by dots: `parts.model.fc.weight`. A name that two tensors would share is left out, and all where there are
            more than MAX_TOLD. Not to be changed: the next image of the same form has the same map.
    """

    def __init__(
        self,
        storages: list[torch.UntypedStorage],
        *,
        layout: ZipLayout,
        tail: bytes,
        tensors: dict[str, TensorPlace],
    ) -> None:
        self.nbytes = layout.data_end + len(tail)
        self.tensors = tensors
        self._storages = storages
        self._layout = layout
        self._tail = tail

    @classmethod
    def of(cls, state: Mapping[str, object]) -> Image:
        """The image of a state.

        Raises RuntimeError for tensors of different dtypes that share a storage, and what pickle raises for an object
        that cannot be pickled.
        """
        pickled = io.BytesIO()
        pickler = StatePickler(pickled)
        pickler.dump(dict(state))
        layout = ZipLayout.of(storage.nbytes() for storage in pickler.storages)
        small = {"data.pkl": pickled.getvalue(), "byteorder": sys.byteorder.encode(), "version": _FORMAT_VERSION}
        tensors = _table(tuple(_places(state, pickler, layout)))
        return cls(pickler.storages, layout=layout, tail=layout.tail(small), tensors=tensors)

    def copy_to(self, arena: torch.Tensor, *, on_copied: Callable[[int], None] = lambda _nbytes: None) -> None:
        """Copy the whole file into an arena, uint8 (at least nbytes,) on the CPU; pinned, if a GPU is to be quick.

        What lies on the host is copied without the GIL and outside of torch (`copying`): each change of torch's number
        of threads would throw away the primitives that oneDNN has prepared. Copies from devices run beside it and are
        done when this returns. `on_copied` is told now and then how many bytes from the start on are there, and what it
        raises ends the copy. Raises ValueError for an arena that does not fit.
        """
        is_memory = arena.dtype is torch.uint8 and arena.device.type == "cpu" and arena.is_contiguous()
        if not is_memory or arena.dim() != 1 or len(arena) < self.nbytes:
            found = f"{arena.dtype} {list(arena.shape)} on {arena.device}"
            raise ValueError(f"arena is {found}; the image needs uint8 [{self.nbytes}] or more, contiguous on the CPU")
        devices = self._begin_copies_from_devices(arena)
        layout, start, file = self._layout, arena.data_ptr(), _memory(arena)
        for header, offset in zip(layout.headers, layout.offsets, strict=True):
            file[offset - len(header) : offset] = header
        file[layout.data_end : self.nbytes] = self._tail
        pieces = [
            piece
            for storage, offset in zip(self._storages, layout.offsets, strict=True)
            if storage.device.type == "cpu"
            for piece in pieces_of(start + offset, storage.data_ptr(), storage.nbytes())
        ]
        copy(pieces, on_copied=lambda address: None if devices else on_copied(address - start))
        for device in devices:
            torch.accelerator.current_stream(device).synchronize()
        on_copied(self.nbytes)

    def chunks(self) -> Iterator[memoryview]:
        """The file's bytes in order; those of tensors on the CPU are the live ones."""
        for storage, header in zip(self._storages, self._layout.headers, strict=True):
            yield memoryview(header)
            elements = _elements(storage)
            if storage.device.type == "cpu":
                yield _memory(elements)
            else:
                yield from (_memory(part.cpu()) for part in torch.split(elements, CHUNK_BYTES))
        yield memoryview(self._tail)

    def _begin_copies_from_devices(self, arena: torch.Tensor) -> set[torch.device]:
        """The devices whose current stream is to be waited for."""
        devices: set[torch.device] = set()
        for storage, offset in zip(self._storages, self._layout.offsets, strict=True):
            if storage.device.type != "cpu":
                arena[offset : offset + storage.nbytes()].copy_(_elements(storage), non_blocking=True)
                devices.add(storage.device)
        return devices


def _elements(storage: torch.UntypedStorage) -> torch.Tensor:
    """The bytes of a storage, uint8 (nbytes,); the tensor holds the storage."""
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def _memory(tensor: torch.Tensor) -> memoryview:
    """The memory of a tensor, uint8 (n,) on the CPU; the view holds it."""
    return memoryview(tensor.numpy())  # type: ignore[arg-type]


# --- where tensors lie -----------------------------------------------------------------------------------------------

_Place = tuple[str, str, tuple[int, ...], int, int]
"""Name, dtype, shape, offset, bytes."""


def _places(state: Mapping[str, object], pickler: StatePickler, layout: ZipLayout) -> Iterator[_Place]:
    """Each tensor whose elements lie in a record as they are, one after the other."""
    for name, tensor in _named_tensors(state, ""):
        if is_dense(tensor) and tensor.is_contiguous() and (record := pickler.record_of(tensor)) is not None:
            offset = layout.offsets[record] + int(tensor.storage_offset()) * tensor.itemsize
            yield name, dtype_name(tensor.dtype), tuple(tensor.shape), offset, tensor.numel() * tensor.itemsize


def _named_tensors(value: object, name: str) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors in plain containers; of classes that only look like tensors, none."""
    items: Iterable[tuple[object, object]] = ()
    if type(value) in {torch.Tensor, torch.nn.Parameter}:
        yield name, cast("torch.Tensor", value)
    elif isinstance(value, Mapping):
        items = value.items()
    elif isinstance(value, list | tuple):
        items = enumerate(value)
    for key, item in items:
        yield from _named_tensors(item, f"{name}.{key}" if name else str(key))


@functools.lru_cache(maxsize=2)
def _table(places: tuple[_Place, ...]) -> dict[str, TensorPlace]:
    """The places by name; remembered, since a state keeps its form from one checkpoint to the next."""
    if len(places) > MAX_TOLD:
        return {}
    times = Counter(name for name, *_ in places)
    return {
        name: TensorPlace(dtype=dtype, shape=shape, offset=offset, bytes=size)
        for name, dtype, shape, offset, size in places
        if times[name] == 1
    }

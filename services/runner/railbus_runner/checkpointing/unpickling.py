"""States of `torch.save` whose tensors have their memory and not yet their values.

A state is rebuilt from the bytes of its pickle alone, by the unpickler of `torch.load(weights_only=True)`. A storage is
memory that nobody has touched: it costs nothing until it is filled, and nothing at all where the values go elsewhere.
"""

from __future__ import annotations

import io
import pickle
import sys
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, TypeGuard, cast

import torch
from torch import _weights_only_unpickler

from railbus_shared.archive import Extent

_PLAIN: Final = {str, bytes, int, float, bool, complex, torch.Size, torch.dtype, torch.device, type(None)}
_MAPS: Final = {dict, OrderedDict, Counter, defaultdict}
_NO_STATE: Final = (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, LookupError, TypeError, AttributeError)
"""What torch makes of bytes that have the right hash but hold no state that `weights_only` allows."""


class NoState(Exception):
    """The bytes hold no state that may be loaded; the message says why."""


@dataclass
class Skeleton:
    """A state without values.

    Attributes:
        state: what was saved; its tensors lie in `storages`.
        storages: by the name of the record that holds their values.
    """

    state: object
    storages: dict[str, torch.UntypedStorage]

    def record_of(self, tensor: torch.Tensor) -> str | None:
        """The record that a tensor's values lie in; None for one that is not of this state, or is no dense one."""
        if tensor.layout != torch.strided:
            return None
        return self._names.get(_address(tensor.untyped_storage()))

    def __post_init__(self) -> None:
        self._names = {_address(storage): name for name, storage in self.storages.items()}


def rebuild(
    pickled: bytes,
    *,
    records: Mapping[str, Extent],
    byteorder: bytes,
    filled: Mapping[str, torch.UntypedStorage],
) -> Skeleton:
    """The state in a pickle; storages in `filled` are taken as they are. Raises NoState."""
    if byteorder.decode("ascii", errors="replace") != sys.byteorder:
        raise NoState(f"it was written on a machine whose byte order is {byteorder!r}")
    storages: dict[str, torch.UntypedStorage] = {}

    def persistent_load(saved_id: object) -> object:
        _, storage_type, key, _, num_elements = cast("tuple[str, Any, str, str, int]", saved_id)
        dtype = torch.uint8 if storage_type is torch.UntypedStorage else cast("torch.dtype", storage_type.dtype)
        name, nbytes = f"data/{key}", num_elements * dtype.itemsize
        if name not in records or records[name].nbytes != nbytes:
            raise NoState(f"record {name!r} does not have the {nbytes} bytes that the state says")
        if name not in storages:
            storages[name] = filled[name] if name in filled else new_storage(nbytes)
        return cast("Any", torch.storage.TypedStorage)(wrap_storage=storages[name], dtype=dtype, _internal=True)

    unpickler: Any = _weights_only_unpickler.Unpickler(io.BytesIO(pickled), encoding="utf-8")
    unpickler.persistent_load = persistent_load
    try:
        return Skeleton(unpickler.load(), storages)
    except _NO_STATE as exc:
        raise NoState(str(exc)) from exc


def tensors_in(state: object) -> Iterator[torch.Tensor | None]:
    """Every tensor of a state; None where there is something that may hold tensors and is no plain container."""
    if type(state) in _MAPS:
        for key, value in cast("dict[object, object]", state).items():
            yield from tensors_in(key)
            yield from tensors_in(value)
    elif type(state) in {list, tuple, set}:
        for item in cast("list[object]", state):
            yield from tensors_in(item)
    elif is_dense(state):
        yield state
    elif type(state) not in _PLAIN:
        yield None


def is_dense(value: object) -> TypeGuard[torch.Tensor]:
    """Whether this is a tensor of no special kind, so that its values are those in its storage."""
    return type(value) in {torch.Tensor, torch.nn.Parameter} and cast("torch.Tensor", value).layout == torch.strided


def check_sparse() -> None:
    """Check sparse tensors that were rebuilt, now that they have their values, where torch is set to."""
    torch._utils._validate_loaded_sparse_tensors()  # type: ignore[no-untyped-call]  # noqa: SLF001 - as `torch.load` does


def new_storage(nbytes: int) -> torch.UntypedStorage:
    """Memory of the CPU without values."""
    return torch.UntypedStorage(nbytes)  # type: ignore[no-untyped-call]


def _address(storage: torch.UntypedStorage) -> int:
    return int(storage._cdata)  # noqa: SLF001 - torch has no other name for it

"""A state as torch.save pickles it, its storages beside it, with a quick way for tensors.

torch's own way takes some 30 microseconds of Python for a tensor. The one here gives the same for a plain dense tensor,
and leaves every other (parameters, sparse, quantized, nested, subclasses, devices without storages) to torch, whose
ways end in plain tensors or storages again.

Source: torch 2.13, `_reduce_ex_internal` in torch/_tensor.py and `_save` in torch/serialization.py.
"""

from __future__ import annotations

import io
import pickle
import types
from collections import OrderedDict
from typing import Any, Final, cast

import torch
from torch._utils import _rebuild_tensor_v2, _rebuild_tensor_v3

_PROTOCOL: Final = 2
"""The one that torch.save writes, and that `weights_only` reads."""
_FAST_DEVICES: Final = {"cpu", "cuda"}
_STORAGE_TYPES: Final[dict[torch.dtype, type]] = {
    dtype: getattr(torch, name)
    for dtype, name in torch.storage._dtype_to_storage_type_map().items()  # noqa: SLF001
}
"""Of the dtypes whose tensors are pickled as those of a typed storage."""
_UNTYPED: Final = frozenset(torch.storage._new_dtypes())  # noqa: SLF001
"""Of those that are pickled with their dtype and an untyped storage."""

_NO_STORAGES: Final = {int, str, tuple, dict, bool, float, OrderedDict, type(None), torch.Tensor, types.FunctionType}
"""What is met often; asked first, for speed alone."""

_StorageId = tuple[str, type, str, str, int]


class _Stored:
    """A storage that has a record: what is pickled in its place."""

    __slots__ = ("dtype", "id", "number")

    def __init__(self, storage: torch.UntypedStorage, *, number: int, dtype: torch.dtype, kind: type) -> None:
        self.number = number
        self.dtype = dtype
        location = "cpu" if storage.device.type == "cpu" else torch.serialization.location_tag(storage)
        self.id: _StorageId = ("storage", kind, str(number), location, storage.nbytes() // dtype.itemsize)


class StatePickler(pickle.Pickler):
    """Pickles one state.

    Attributes:
        storages: what the tensors of the state view, each once; record n is `data/n`.
    """

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=_PROTOCOL)
        self.storages: list[torch.UntypedStorage] = []
        self._stored: dict[int, _Stored] = {}

    def persistent_id(self, obj: object) -> _StorageId | None:
        kind = type(obj)
        if kind is _Stored:
            return cast("_Stored", obj).id
        if kind in _NO_STORAGES:
            return None
        if isinstance(obj, torch.storage.TypedStorage):
            untyped, name = obj._untyped_storage, obj._pickle_storage_type()  # type: ignore[no-untyped-call]  # noqa: SLF001
            return self._stored_of(untyped, obj.dtype, getattr(torch, name)).id
        if isinstance(obj, torch.UntypedStorage):
            return self._stored_of(obj, torch.uint8, torch.UntypedStorage).id
        return None

    def reducer_override(self, obj: object) -> Any:
        kind = type(obj)
        if kind is torch.Tensor and _is_plain(cast("torch.Tensor", obj)):
            return self._reduced(cast("torch.Tensor", obj))
        if kind is OrderedDict and not obj and not obj.__dict__:  # every tensor has one, and Python takes its time
            return OrderedDict, ()
        return NotImplemented

    def record_of(self, tensor: torch.Tensor) -> int | None:
        """The number of the record that holds a tensor's storage, if it has one."""
        stored = self._stored.get(tensor.untyped_storage()._cdata)  # noqa: SLF001
        return None if stored is None else stored.number

    def _reduced(self, tensor: torch.Tensor) -> tuple[object, ...]:
        dtype, storage = tensor.dtype, tensor.untyped_storage()
        form: tuple[object, ...] = (
            tensor.storage_offset(),
            tuple(tensor.shape),
            tensor.stride(),
            tensor.requires_grad,
            OrderedDict(),
        )
        if dtype in _UNTYPED:
            stored = self._stored_of(storage, torch.uint8, torch.UntypedStorage)
            return _rebuild_tensor_v3, (stored, *form, dtype)
        stored = self._stored_of(storage, dtype, _STORAGE_TYPES[dtype])
        return _rebuild_tensor_v2, (stored, *form)

    def _stored_of(self, storage: torch.UntypedStorage, dtype: torch.dtype, kind: type) -> _Stored:
        """The entry of a storage, made when it is met first; raises RuntimeError as torch.save does."""
        address: int = storage._cdata  # noqa: SLF001
        stored = self._stored.get(address)
        if stored is None:
            stored = self._stored[address] = _Stored(storage, number=len(self.storages), dtype=dtype, kind=kind)
            self.storages.append(storage)  # and so the address is not used again
        elif stored.dtype is not dtype:
            raise RuntimeError(
                f"a state has tensors of {stored.dtype} and of {dtype} that view the same storage, which a .pt file "
                "cannot hold; clone() one of them in state_dict()"
            )
        return stored


def _is_plain(tensor: torch.Tensor) -> bool:
    """Whether nothing but its storage, form and dtype makes this tensor."""
    return (
        is_dense(tensor)
        and tensor.device.type in _FAST_DEVICES
        and (tensor.dtype in _STORAGE_TYPES or tensor.dtype in _UNTYPED)
        and not tensor.__dict__
        and not tensor._backward_hooks  # noqa: SLF001
    )


def is_dense(tensor: torch.Tensor) -> bool:
    """Whether a tensor's elements lie in its storage as they are."""
    return (
        tensor.layout is torch.strided
        and not (tensor.is_quantized or tensor.is_nested or tensor.is_conj() or tensor.is_neg())
        and tensor.device.type != "meta"
    )

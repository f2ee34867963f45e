"""Where the tensors of a `.pt` lie, found without torch, for files whose meta does not say so.

A file of `torch.save` is a zip archive with stored records: `data.pkl`, which describes the tensors, and one record for
each storage. The pickle is read by an unpickler that knows some twenty names, none of which does anything but keep what
it is given; any other name ends the reading. So nothing of a file can be run, whatever is in it.
Source: https://docs.pytorch.org/docs/stable/notes/serialization.html
"""

from __future__ import annotations

import io
import os
import pickle
import struct
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from io import BufferedReader
from typing import Any, Final

from railbus_shared.archive import Extent, NotAnArchive, read_directory
from railbus_shared.errors import CheckpointCorrupt, NotSupported

_STORAGE_DTYPES: Final = {
    "FloatStorage": "float32", "DoubleStorage": "float64", "HalfStorage": "float16", "BFloat16Storage": "bfloat16",
    "LongStorage": "int64", "IntStorage": "int32", "ShortStorage": "int16", "CharStorage": "int8",
    "ByteStorage": "uint8", "BoolStorage": "bool", "ComplexFloatStorage": "complex64",
    "ComplexDoubleStorage": "complex128", "UntypedStorage": "uint8",
}  # fmt: skip
_MAX_DEPTH: Final = 64
_NO_STATE: Final = (
    pickle.UnpicklingError, struct.error, ValueError, TypeError, LookupError, EOFError, AttributeError,
    NotImplementedError, RecursionError,
)  # fmt: skip
"""What is met in bytes that have the right hash but hold no state."""


@dataclass(frozen=True)
class Found:
    """A dense tensor: part of one storage."""

    storage: str
    dtype: str
    first: int
    """Element of the storage that it begins with."""
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    """In elements."""


@dataclass(frozen=True)
class Opaque:
    """A tensor of another kind: sparse, quantized, what else only torch can make, or one whose name another one has."""


@dataclass(frozen=True)
class _Dtype:
    name: str


@dataclass(frozen=True)
class _Storage:
    key: str
    dtype: str


def storages(file: BufferedReader, path: str) -> dict[str, Extent]:
    """Where every storage's record lies, by its key; nothing is unpickled. Raises CheckpointCorrupt."""
    return _storages(_records(file, path))


def skeleton(file: BufferedReader, path: str) -> tuple[dict[str, Found | Opaque], dict[str, Extent]]:
    """Every tensor by where it stands in the state, and where every storage lies by its key.

    The bytes must have been verified before. Raises CheckpointCorrupt for what is no file of `torch.save`, NotSupported
    for one that holds other things than tensors and plain containers.
    """
    records = _records(file, path)
    if "byteorder" in records and _bytes_of(file, records["byteorder"]) != b"little":
        raise CheckpointCorrupt(path=path, expected="little-endian numbers", actual="big-endian ones")
    found: dict[str, Found | Opaque] = {}
    try:
        unpickler = _Unpickler(io.BytesIO(_bytes_of(file, records["data.pkl"])), encoding="utf-8")
        unpickler.path = path
        for name, tensor in _tensors(unpickler.load(), "", path):
            found[name] = Opaque() if name in found else tensor  # keys with dots may make two names the same
    except _NO_STATE as exc:
        raise CheckpointCorrupt(path=path, expected="a file of torch.save", actual=str(exc)) from exc
    return found, _storages(records)


def _records(file: BufferedReader, path: str) -> Mapping[str, Extent]:
    try:
        return read_directory(file.fileno(), os.fstat(file.fileno()).st_size).records
    except NotAnArchive as exc:
        raise CheckpointCorrupt(path=path, expected="a file of torch.save", actual=str(exc)) from exc


def _storages(records: Mapping[str, Extent]) -> dict[str, Extent]:
    return {name.removeprefix("data/"): extent for name, extent in records.items() if name.startswith("data/")}


def _bytes_of(file: BufferedReader, extent: Extent) -> bytes:
    file.seek(extent.offset)
    return file.read(extent.nbytes)


def _tensors(value: object, at: str, path: str, depth: int = 0) -> Iterator[tuple[str, Found | Opaque]]:
    """Tensors below a value, by the keys and places that lead to them, joined by dots."""
    if depth > _MAX_DEPTH:
        raise CheckpointCorrupt(path=path, expected="a state", actual=f"one nested deeper than {_MAX_DEPTH}")
    if isinstance(value, Found | Opaque):
        yield at, value
    items: Any = ()
    if isinstance(value, Mapping):
        items = value.items()
    elif isinstance(value, list | tuple):
        items = enumerate(value)
    for key, item in items:
        yield from _tensors(item, f"{at}.{key}" if at else str(key), path, depth + 1)


class _Unpickler(pickle._Unpickler):  # noqa: SLF001 - see below
    """Knows tensors and plain containers, and nothing that does anything.

    It is the one in Python, of 0.1 s for 600 tensors: that in C gives a number of a few bytes gigabytes of memory.
    """

    path = ""

    def find_class(self, module: str, name: str) -> object:
        if module == "torch._utils" and name.startswith("_rebuild_"):
            return _REBUILDING.get(name, _opaque)
        if (known := _PLAIN.get((module, name))) is not None:
            return known
        if module in {"torch", "torch.storage"}:  # dtypes, storages and words for layouts; none of it can be called
            return _Dtype(_STORAGE_DTYPES.get(name, name))
        raise NotSupported(
            f"{self.path} holds {module}.{name}, which is neither a tensor nor a plain container",
            hint="nothing of it was run; only checkpoints that railbus wrote can be read",
        )

    def persistent_load(self, pid: Any) -> _Storage:
        _, kind, key, _, _ = pid
        return _Storage(str(key), kind.name)


def _rebuilt(storage: _Storage, first: int, shape: Any, strides: Any, *_: object) -> Found:
    return Found(storage.key, storage.dtype, first, tuple(shape), tuple(strides))


def _rebuilt_typed(
    storage: _Storage, first: int, shape: Any, strides: Any, _grad: object, _hooks: object, dtype: _Dtype, *_: object
) -> Found:
    return Found(storage.key, dtype.name, first, tuple(shape), tuple(strides))


def _same(tensor: object, *_: object) -> object:
    return tensor


def _rebuilt_from(rebuild: Callable[..., object], _kind: object, arguments: Any, _state: object) -> object:
    return rebuild(*arguments)


def _opaque(*_: object) -> Opaque:
    return Opaque()


def _bytes(text: str, _encoding: str) -> bytes:
    return text.encode("latin1")


def _text(*words: object) -> str:
    return " ".join(map(str, words))


_REBUILDING: Final[Mapping[str, Callable[..., object]]] = {
    "_rebuild_tensor_v2": _rebuilt,
    "_rebuild_tensor_v3": _rebuilt_typed,
    "_rebuild_parameter": _same,
    "_rebuild_parameter_with_state": _same,
}
_PLAIN: Final[Mapping[tuple[str, str], object]] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("collections", "Counter"): Counter,
    ("torch", "Size"): tuple,
    ("torch", "device"): _text,
    ("torch.serialization", "_get_layout"): _text,
    ("torch._tensor", "_rebuild_from_type_v2"): _rebuilt_from,
    ("torch._tensor", "Tensor"): _Dtype("tensor"),
    ("torch.nn.parameter", "Parameter"): _Dtype("parameter"),
    ("_codecs", "encode"): _bytes,
    ("__builtin__", "set"): set,
    ("builtins", "set"): set,
    ("__builtin__", "complex"): complex,
    ("builtins", "complex"): complex,
}

"""A safetensors file: a header in JSON, then the values; nothing in it is ever evaluated.

Source: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Final, cast

import orjson
import torch

from railbus_runner.checkpointing.proving import NotProven, digest
from railbus_runner.checkpointing.state_file import open_plain
from railbus_runner.checkpointing.tensor_file import TensorFile
from railbus_runner.checkpointing.unpickling import Skeleton, new_storage
from railbus_shared.archive import Extent
from railbus_shared.errors import CheckpointCorrupt

_MAX_HEADER_BYTES: Final = 100 << 20
"""As much as the reference reads."""
_DTYPES: Final = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


class _BadHeader(Exception):
    """The header is not one of safetensors; the message says why."""


def open_safetensors(path: Path, *, sha256: str | None = None) -> TensorFile:
    """Prove a file and give its tensors by name; raises CheckpointCorrupt."""
    descriptor, nbytes = open_plain(path)
    try:
        return _proven(path, descriptor, nbytes, sha256)
    except (NotProven, OSError, _BadHeader) as exc:
        os.close(descriptor)
        raise CheckpointCorrupt(path=str(path), expected="a file of safetensors", actual=str(exc)) from exc
    except BaseException:
        os.close(descriptor)
        raise


def _proven(path: Path, descriptor: int, nbytes: int, stated: str | None) -> TensorFile:
    length = int.from_bytes(os.pread(descriptor, 8, 0), "little")
    is_possible = 8 + length <= nbytes and length <= _MAX_HEADER_BYTES
    header = Extent(0, 8 + length if is_possible else 0)
    sha256, kept = digest(descriptor, nbytes=nbytes, keep=[header])
    if stated not in {None, sha256}:
        raise CheckpointCorrupt(path=str(path), expected=f"sha256 {stated}", actual=f"sha256 {sha256}")
    if not is_possible or int.from_bytes(kept[header][:8], "little") != length:
        raise _BadHeader(f"a header that claims {length} bytes")
    records: dict[str, Extent] = {}
    storages: dict[str, torch.UntypedStorage] = {}
    state: dict[str, torch.Tensor] = {}
    for name, dtype, shape, extent in _entries(kept[header][8:], header.nbytes, nbytes):
        records[name], storages[name] = extent, new_storage(extent.nbytes)
        flat = torch.empty(0, dtype=dtype).set_(storages[name], 0, (math.prod(shape),), (1,))
        state[name] = flat.view(shape)
    return TensorFile(path, descriptor, sha256=sha256, records=records, skeleton=Skeleton(state, storages))


def _entries(text: bytes, begin: int, nbytes: int) -> list[tuple[str, torch.dtype, tuple[int, ...], Extent]]:
    try:
        found = orjson.loads(text)
    except orjson.JSONDecodeError as exc:
        raise _BadHeader(f"a header that is no JSON: {exc}") from exc
    if not isinstance(found, dict):
        raise _BadHeader("a header that is no map")
    return [(name, *_entry(name, entry, begin, nbytes)) for name, entry in found.items() if name != "__metadata__"]


def _entry(
    name: str, entry: Mapping[str, object], begin: int, nbytes: int
) -> tuple[torch.dtype, tuple[int, ...], Extent]:
    try:
        dtype = _DTYPES[cast("str", entry["dtype"])]
        shape = tuple(cast("list[int]", entry["shape"]))
        start, stop = cast("list[int]", entry["data_offsets"])
        is_whole = all(type(value) is int and value >= 0 for value in (*shape, start, stop))
    except (KeyError, TypeError, ValueError) as exc:
        raise _BadHeader(f"tensor {name!r} of an unknown kind: {entry}") from exc
    if not is_whole or stop - start != math.prod(shape) * dtype.itemsize or begin + stop > nbytes:
        raise _BadHeader(f"tensor {name!r} where it cannot be: {entry}")
    return dtype, shape, Extent(begin + start, stop - start)

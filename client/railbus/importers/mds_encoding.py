"""How MosaicML's MDS shards encode values, read and written without their library.

A shard is `uint32` samples, `uint32` offsets (samples + 1), a JSON text of its columns, and the samples: the `uint32`
sizes of those columns whose size varies, then the columns' bytes. Source: streaming/base/format/mds of
github.com/mosaicml/streaming.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import numpy as np

from railbus.importers.source import Array

SCALARS: Final = {
    "int": "int64", "uint8": "uint8", "int8": "int8", "uint16": "uint16", "int16": "int16", "uint32": "uint32",
    "int32": "int32", "uint64": "uint64", "int64": "int64", "float16": "float16", "float32": "float32",
    "float64": "float64",
}  # fmt: skip
FILES: Final = {"bytes": "", "str": "utf-8", "json": "json", "jpeg": "jpeg", "png": "png"}
"""Encodings whose bytes stay as they are, and what we call them."""
DIGITS: Final = {"str_int": np.int64, "str_float": np.float64}
_VALUE_DTYPES: Final = {
    8: "uint8", 9: "int8", 16: "uint16", 17: "int16", 18: "float16", 32: "uint32", 33: "int32", 34: "float32",
    64: "uint64", 65: "int64", 66: "float64",
}  # fmt: skip
ARRAY_DTYPES: Final = frozenset(_VALUE_DTYPES.values())
_MAX_AXES: Final = 32


@dataclass(frozen=True)
class ArrayEncoding:
    """`ndarray`, `ndarray:int32` or `ndarray:int32:3,4`: what is not fixed stands before each array."""

    dtype: str | None
    shape: tuple[int, ...] | None

    @classmethod
    def parse(cls, encoding: str) -> ArrayEncoding:
        """Raises ValueError for one that is none."""
        _, *words = encoding.split(":")
        dtype = words[0] if words else None
        shape = tuple(int(length) for length in words[1].split(",")) if len(words) > 1 else None
        if len(words) > 2 or dtype not in {None, *ARRAY_DTYPES} or min(shape or (1,)) < 1:
            raise ValueError(f"encoding {encoding!r} is not known")
        return cls(dtype, shape)

    def decode(self, data: bytes) -> Array:
        """Raises ValueError for bytes that are no such array."""
        at = 0
        dtype, shape = self.dtype, self.shape
        if dtype is None:
            dtype, at = _VALUE_DTYPES.get(data[0] if data else 0, ""), 1
        if not dtype or (shape is None and at >= len(data)):
            raise ValueError("the head of an array is cut, or names no type")
        if shape is None:
            num_axes, width = data[at] >> 2, 1 << data[at] % 4
            if num_axes > _MAX_AXES:
                raise ValueError(f"an array claims {num_axes} axes")
            shape = tuple(np.frombuffer(data, f"<u{width}", count=num_axes, offset=at + 1).tolist())
            at += 1 + num_axes * width
        kind = np.dtype(dtype).newbyteorder("<")
        if math.prod(shape) * kind.itemsize != len(data) - at:
            raise ValueError(f"an array of shape {list(shape)} claims another size than its {len(data) - at} bytes")
        return np.frombuffer(data, kind, offset=at).reshape(shape)


def array_head(shape: tuple[int, ...]) -> bytes:
    """What stands before an array whose dtype is fixed and whose shape is not."""
    most = max(shape)
    code = next(code for code in range(4) if most < 1 << (8 << code))
    return bytes([len(shape) << 2 | code]) + np.array(shape, f"<u{1 << code}").tobytes()


def fixed_size(encoding: str) -> int | None:
    """Bytes of a value; None where it varies. Raises ValueError for an encoding that is not known."""
    if encoding in SCALARS:
        return np.dtype(SCALARS[encoding]).itemsize
    if encoding.partition(":")[0] == "ndarray":
        array = ArrayEncoding.parse(encoding)
        if array.dtype and array.shape:
            return math.prod(array.shape) * np.dtype(array.dtype).itemsize
    return None

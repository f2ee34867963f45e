"""Dtypes of tensors: how many bytes they take, what safetensors calls them, and their numbers in NumPy.

NumPy has no bfloat16 and no floats of eight bits. Of those the first is the upper half of a float32, and of the others
a table holds every number that there is.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Bytes = npt.NDArray[np.uint8]

ITEM_BYTES: Final = {
    "bool": 1, "uint8": 1, "int8": 1, "uint16": 2, "int16": 2, "float16": 2, "bfloat16": 2,
    "uint32": 4, "int32": 4, "float32": 4, "uint64": 8, "int64": 8, "float64": 8,
    "float8_e4m3fn": 1, "float8_e5m2": 1, "float8_e4m3fnuz": 1, "float8_e5m2fnuz": 1, "float8_e8m0fnu": 1,
    "complex32": 4, "complex64": 8, "complex128": 16,
}  # fmt: skip
"""Size of one element, by torch's name of the dtype."""

SAFETENSORS_DTYPES: Final = {
    "bool": "BOOL", "uint8": "U8", "int8": "I8", "uint16": "U16", "int16": "I16", "uint32": "U32", "int32": "I32",
    "uint64": "U64", "int64": "I64", "float16": "F16", "bfloat16": "BF16", "float32": "F32", "float64": "F64",
    "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", "float8_e4m3fnuz": "F8_E4M3FNUZ",
    "float8_e5m2fnuz": "F8_E5M2FNUZ", "float8_e8m0fnu": "F8_E8M0", "complex64": "C64",
}  # fmt: skip
"""What a header of safetensors calls each dtype; it knows no others."""


@dataclass(frozen=True)
class _Float8:
    """A float of one sign bit, some bits of exponent, and the rest of mantissa."""

    exponent_bits: int
    bias: int
    kind: str
    """`ieee`: infinities and NaNs as usual. `fn`: all ones are NaN, no infinities. `fnuz`: only minus zero is NaN."""


_FLOATS8: Final = {
    "float8_e4m3fn": _Float8(4, 7, "fn"),
    "float8_e5m2": _Float8(5, 15, "ieee"),
    "float8_e4m3fnuz": _Float8(4, 8, "fnuz"),
    "float8_e5m2fnuz": _Float8(5, 16, "fnuz"),
}


def numbers(raw: Bytes, dtype: str) -> Array:
    """Elements as numbers that NumPy can calculate with: float64, or complex128 for complex dtypes.

    Args:
        raw: the bytes of whole elements, little-endian, (n * ITEM_BYTES[dtype],).
        dtype: torch's name of it.
    """
    if dtype == "bfloat16":
        return (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    if dtype == "complex32":
        return raw.view(np.float16).astype(np.float64).view(np.complex128)
    if dtype == "float8_e8m0fnu":
        return np.where(raw == 0xFF, np.nan, np.exp2(raw.astype(np.float64) - 127))
    if dtype in _FLOATS8:
        values: Array = _table(dtype)[raw]
        return values
    return raw.view(dtype).astype(np.complex128 if dtype.startswith("complex") else np.float64)


@functools.cache
def _table(dtype: str) -> Array:
    """The 256 numbers of a float of eight bits, float64 (256,).

    Source: https://onnx.ai/onnx/technical/float8.html
    """
    form = _FLOATS8[dtype]
    mantissa_bits = 7 - form.exponent_bits
    bits = np.arange(256)
    sign = np.where(bits & 0x80, -1.0, 1.0)
    exponent = (bits >> mantissa_bits) & ((1 << form.exponent_bits) - 1)
    fraction = (bits & ((1 << mantissa_bits) - 1)) / (1 << mantissa_bits)
    is_normal = exponent > 0
    values = sign * (fraction + is_normal) * np.exp2(np.where(is_normal, exponent, 1) - float(form.bias))
    if form.kind == "fnuz":
        values[0x80] = np.nan
    elif form.kind == "fn":
        values[[0x7F, 0xFF]] = np.nan
    else:
        is_highest = exponent == (1 << form.exponent_bits) - 1
        values = np.where(is_highest, np.where(fraction > 0, np.nan, sign * np.inf), values)
    return values

"""The dtypes of columns: how many bytes they take, and what NumPy calls them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from railbus_shared.data.plain import AnyColumn

Array = npt.NDArray[Any]

ITEM_BYTES: Final = {
    "bool": 1, "uint8": 1, "int8": 1, "uint16": 2, "int16": 2, "float16": 2, "bfloat16": 2,
    "uint32": 4, "int32": 4, "float32": 4, "uint64": 8, "int64": 8, "float64": 8,
}  # fmt: skip
"""Size of one element of each dtype."""

SAFETENSORS_DTYPES: Final = {
    "bool": "BOOL", "uint8": "U8", "int8": "I8", "uint16": "U16", "int16": "I16", "uint32": "U32", "int32": "I32",
    "uint64": "U64", "int64": "I64", "float16": "F16", "bfloat16": "BF16", "float32": "F32", "float64": "F64",
}  # fmt: skip
"""What a header of payload `columns` calls each dtype."""


PADDING: Final = "__padding__."
"""Begins the names of padding tensors of payload `columns`; no column's name can begin so."""
OFFSETS: Final = "__offsets__."
"""Begins the name of the tensor that says where the samples of a column of variable length begin."""


def sample_bytes(column: AnyColumn) -> int:
    """Bytes of one sample of a column, or of one item where the length varies."""
    return ITEM_BYTES[column.dtype] * math.prod(column.shape)


def numpy_dtype(column: AnyColumn) -> np.dtype[Any]:
    """NumPy's dtype of a column; NumPy has no bfloat16, so its bits are shown as uint16."""
    return np.dtype("uint16" if column.dtype == "bfloat16" else column.dtype)

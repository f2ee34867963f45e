"""Text as a dataset of fixed blocks of characters, for language models."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from railbus.splitting import splits
from railbus_shared.contracts.artifacts import Column, DatasetSchema, Dtype
from railbus_shared.data.writer import Chunk
from railbus_shared.errors import InvalidField

_MAX_SYMBOLS: Final = 65_536
_CHUNK: Final = 4096


def text_dataset(
    name: str,
    text: str,
    *,
    block: int,
    held_out_frac: float = 0.1,
    description: str = "",
    licence: str = "",
    source: str = "",
) -> tuple[DatasetSchema, Iterator[Chunk]]:
    """Schema and chunks: column `tokens`, uint8 or uint16 (block + 1,), numbers of the symbols in `labels`.

    Block i holds characters i * block to (i + 1) * block, the last of them also the first of the next, so that every
    character but the first is predicted once. The last share of the blocks is the split `validation`.
    Raises InvalidField for a text that is too short for two blocks or has too many symbols.
    """
    if block < 1:
        raise InvalidField(field="block", value=block, problem="not a positive number of characters")
    samples = (len(text) - 1) // block
    if samples < 2:
        raise InvalidField(
            field="source",
            value=f"{len(text)} characters",
            problem=f"too short for two blocks of {block}",
            hint="give a longer text or a smaller block",
        )
    symbols, tokens, dtype = _encoded(text)
    column = Column(
        dtype=dtype,
        shape=(block + 1,),
        description=f"Characters; the first {block} predict the last {block}.",
        num_classes=len(symbols),
        labels=tuple(symbols),
    )
    schema = DatasetSchema(
        name=name,
        description=description,
        licence=licence,
        source=source,
        columns={"tokens": column},
        splits=splits(samples, held_out_frac=held_out_frac, held_out="validation"),
    )
    return schema, _blocks(tokens, block=block, samples=samples)


def _encoded(text: str) -> tuple[list[str], npt.NDArray[Any], Dtype]:
    """The symbols of a text in the order of their code points, and the text as numbers of them."""
    points = np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
    found, numbers = np.unique(points, return_inverse=True)
    if len(found) > _MAX_SYMBOLS:
        raise InvalidField(
            field="source", value=f"{len(found)} symbols", problem=f"more than {_MAX_SYMBOLS} different characters"
        )
    dtype: Dtype = "uint8" if len(found) <= 256 else "uint16"
    return [chr(point) for point in found.tolist()], numbers.astype(dtype), dtype


def _blocks(tokens: npt.NDArray[Any], *, block: int, samples: int) -> Iterator[Chunk]:
    windows = np.lib.stride_tricks.sliding_window_view(tokens, block + 1)[::block]
    for start in range(0, samples, _CHUNK):
        yield {"tokens": windows[start : min(start + _CHUNK, samples)]}

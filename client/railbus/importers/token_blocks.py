"""Tokens of a text in blocks, for language models.

Block i holds tokens i * block to (i + 1) * block, the last of them also the first of the next, so that every token but
the first is predicted once.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

from railbus.importers.source import CHUNK_ROWS, Array, Chunk
from railbus_shared.errors import InvalidField


def num_blocks(num_tokens: int, *, block: int, kind: str) -> int:
    """Blocks in so many tokens; raises InvalidField if they are too few for two, or no length of a block."""
    if block < 1:
        raise InvalidField(field="block", value=block, problem=f"not a positive number of {kind}")
    samples = (num_tokens - 1) // block
    if samples < 2:
        raise InvalidField(
            field="source",
            value=f"{num_tokens} {kind}",
            problem=f"too short for two blocks of {block}",
            hint="give a longer text or a smaller block",
        )
    return samples


def blocks(tokens: Iterable[Array], *, block: int) -> Iterator[Chunk]:
    """Chunks of column `tokens` (N, block + 1) of a text that comes in parts; what is left at the end is dropped."""
    rest: Array | None = None
    for part in tokens:
        rest = part if rest is None else np.concatenate([rest, part])
        count = (len(rest) - 1) // block
        if count <= 0:
            continue
        windows = np.lib.stride_tricks.sliding_window_view(rest, block + 1)[::block]
        for start in range(0, count, CHUNK_ROWS):
            yield {"tokens": windows[start : min(start + CHUNK_ROWS, count)]}
        rest = rest[count * block :]

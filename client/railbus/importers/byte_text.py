"""Text, or any file, as its bytes: 256 tokens, nothing to train, nothing that cannot be read."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Final

import numpy as np

from railbus.importers.source import Array, Chunk, Options, Outline
from railbus.importers.token_blocks import blocks, num_blocks
from railbus_shared.contracts.artifacts import Column

_PIECE_BYTES: Final = 4 << 20


class ByteText:
    """Blocks of bytes; column `tokens`, uint8 (block + 1,)."""

    def __init__(self, path: Path, options: Options) -> None:
        """Raises InvalidField for a file that is too short for two blocks."""
        self._path = path
        self._options = options
        block = options.block
        samples = num_blocks(path.stat().st_size, block=block, kind="bytes")
        column = Column(
            dtype="uint8",
            shape=(block + 1,),
            description=f"Bytes of the text; the first {block} predict the last {block}.",
            num_classes=256,
        )
        self.outline = Outline(
            columns={"tokens": column},
            samples=samples,
            held_out="validation",
            is_sequence=True,
            sample_bytes=block + 1,
        )

    def chunks(self) -> Iterator[Chunk]:
        return blocks(self._pieces(), block=self._options.block)

    def _pieces(self) -> Iterator[Array]:
        size = self._path.stat().st_size
        with self._path.open("rb") as file:
            while data := file.read(_PIECE_BYTES):
                yield np.frombuffer(data, np.uint8)
                self._options.report("reading", file.tell(), size)

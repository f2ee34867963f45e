"""Text as numbers of its characters: the symbols that it has, in the order of their code points, are the labels."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from railbus.importers.source import Array, Chunk, Options, Outline, Report, unreadable
from railbus.importers.token_blocks import blocks, num_blocks
from railbus_shared.contracts.artifacts import Column, Dtype
from railbus_shared.errors import InvalidField

Pieces = Callable[[], Iterable[str]]
"""Gives a text from its start, in parts."""

_MAX_SYMBOLS: Final = 65_536
_PIECE: Final = 1 << 20
_NUM_POINTS: Final = 0x110000


class Characters:
    """Blocks of characters; column `tokens`, uint8 or uint16 (block + 1,)."""

    def __init__(self, pieces: Pieces, *, block: int, description: str = "", licence: str = "") -> None:
        """Reads the text once. Raises InvalidField if it is too short for two blocks or has too many symbols."""
        self._pieces = pieces
        self._block = block
        is_there = np.zeros(_NUM_POINTS, np.bool_)
        count = 0
        for piece in pieces():
            is_there[_points(piece)] = True
            count += len(piece)
        samples = num_blocks(count, block=block, kind="characters")
        self._symbols = np.flatnonzero(is_there)
        if len(self._symbols) > _MAX_SYMBOLS:
            raise InvalidField(
                field="source",
                value=f"{len(self._symbols)} symbols",
                problem=f"more than {_MAX_SYMBOLS} different characters",
            )
        dtype: Dtype = "uint8" if len(self._symbols) <= 256 else "uint16"
        self._dtype = np.dtype(dtype)
        column = Column(
            dtype=dtype,
            shape=(block + 1,),
            description=f"Characters; the first {block} predict the last {block}.",
            num_classes=len(self._symbols),
            labels=tuple(chr(point) for point in self._symbols.tolist()),
        )
        self.outline = Outline(
            columns={"tokens": column},
            samples=samples,
            held_out="validation",
            is_sequence=True,
            sample_bytes=(block + 1) * self._dtype.itemsize,
            description=description,
            licence=licence,
        )

    def chunks(self) -> Iterator[Chunk]:
        numbers = np.zeros(_NUM_POINTS, self._dtype)
        numbers[self._symbols] = np.arange(len(self._symbols))
        tokens: Iterator[Array] = (numbers[_points(piece)] for piece in self._pieces())
        return blocks(tokens, block=self._block)


def _points(text: str) -> npt.NDArray[np.uint32]:
    return np.frombuffer(text.encode("utf-32-le"), dtype="<u4")


def pieces_of(path: Path, *, report: Report, stage: str = "reading") -> Pieces:
    """A text file in parts of a million characters; raises InvalidField where it is not UTF-8."""

    def read() -> Iterator[str]:
        size, done = path.stat().st_size, 0
        with path.open(encoding="utf-8") as file:
            try:
                while piece := file.read(_PIECE):
                    yield piece
                    done += len(piece)
                    report(stage, min(done, size), size)
            except UnicodeDecodeError as exc:
                raise unreadable(
                    path.name, f"not UTF-8 text: {exc}", hint="or take its bytes: --tokenizer byte"
                ) from exc

    return read


def character_file(path: Path, options: Options) -> Characters:
    """The characters of a text file."""
    return Characters(pieces_of(path, report=options.report), block=options.block)

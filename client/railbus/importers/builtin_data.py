"""Real data that ships with us and with Python, so that examples work offline.

`digits.csv.gz` is the test part of "Optical Recognition of Handwritten Digits" by E. Alpaydin and C. Kaynak (UCI
Machine Learning Repository, CC BY 4.0): a line for each image, 64 brightnesses from 0 to 16 row by row, then the digit.
"""

from __future__ import annotations

import gzip
from collections.abc import Iterator
from importlib import resources
from typing import Final

import numpy as np
import numpy.typing as npt

from railbus.importers.characters import Characters
from railbus.importers.source import Chunk, Outline, Source
from railbus_shared.contracts.artifacts import Column, Split
from railbus_shared.data.order import EpochOrder, Positions

BUILTIN: Final = {
    "digits": "UCI optical recognition of handwritten digits (test part), as bundled with scikit-learn",
    "pydocs": "pydoc_data.topics of the Python that imported it",
}
"""What ships, and where it comes from."""
_HELD_OUT: Final = 0.2
_BLOCK: Final = 128
_ORDER_SEED: Final = 0


def builtin(name: str) -> Source:
    """A built-in source."""
    return Digits() if name == "digits" else pydocs()


class Digits:
    """Handwritten digits, 1,797 images of 8 by 8.

    Columns: `image` float32 (1, 8, 8) from 0 to 1, `label` int64. The held-out fifth has every class in its share.
    """

    def __init__(self) -> None:
        packed = (resources.files("railbus.importers") / "digits.csv.gz").read_bytes()
        lines = gzip.decompress(packed).decode().split()
        rows = np.array([line.split(",") for line in lines], dtype=np.int64)
        images, labels = (rows[:, :-1] / 16.0).astype(np.float32).reshape(-1, 1, 8, 8), rows[:, -1]
        train, test = _stratified(labels, held_out=_HELD_OUT)
        order = np.concatenate([train, test])
        self._chunk: Chunk = {"image": images[order], "label": labels[order]}
        self.outline = Outline(
            columns={
                "image": Column(dtype="float32", shape=(1, 8, 8), description="Brightness from 0 to 1."),
                "label": Column(dtype="int64", shape=(), num_classes=10, labels=tuple("0123456789")),
            },
            samples=len(order),
            splits={"train": Split(first=0, samples=len(train)), "test": Split(first=len(train), samples=len(test))},
            description="Handwritten digits, 8 by 8 pixels, ten classes.",
            licence="CC BY 4.0",
        )

    def chunks(self) -> Iterator[Chunk]:
        yield self._chunk


def _stratified(labels: npt.NDArray[np.int64], *, held_out: float) -> tuple[Positions, Positions]:
    """Samples (N,) of both parts, each in a fixed mixed order; every class gives its share to the second.

    The order is our own, because NumPy's generators may give another one in another version.
    """
    mixed = EpochOrder(len(labels), _ORDER_SEED, epoch=0).positions(0, len(labels))
    is_held_out = np.zeros(len(labels), dtype=np.bool_)
    for label in range(int(labels.max()) + 1):
        places = np.flatnonzero(labels[mixed] == label)
        is_held_out[places[: round(len(places) * held_out)]] = True
    return mixed[~is_held_out], mixed[is_held_out]


def pydocs() -> Characters:
    """Python's own reference texts (what `help()` shows), some 465,000 characters, character by character."""
    from pydoc_data.topics import topics  # noqa: PLC0415 - half a megabyte that few callers need

    text = "\n\n".join(topics[key] for key in sorted(topics))
    return Characters(
        lambda: [text],
        block=_BLOCK,
        description="The reference topics of Python's help system, as characters.",
        licence="PSF-2.0",
    )

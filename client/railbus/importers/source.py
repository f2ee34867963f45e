"""What every importer gives: an outline found in a first pass, and the samples in chunks of bounded size.

An outline says columns and number of samples before the first chunk is made, because `schema.json` names the splits. A
source may be read any number of times and gives the same samples each time. Nothing of it is executed: no pickle, no
code of a dataset. What unpacks has a budget, so that a small file cannot fill a disk.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from railbus_shared.contracts.artifacts import Column, Split
from railbus_shared.data.order import Positions
from railbus_shared.data.ragged import Ragged
from railbus_shared.errors import InvalidField
from railbus_shared.names import checked_name

Array = npt.NDArray[Any]
Values = Array | Ragged
Chunk = Mapping[str, Values]
Report = Callable[[str, int, int | None], None]
"""Told of progress: what is done now, how much of it, and of how much, if that is known."""

CHUNK_BYTES: Final = 16 << 20
"""What a chunk may take; one sample may be larger."""
CHUNK_ROWS: Final = 4096
CLASS_COLUMNS: Final = frozenset({"label", "target", "class", "cls", "y"})
"""Columns of whole numbers from 0 up, or of a few words, that are so named are taken for classes."""
_SHORT_BYTES: Final = 128
_MIN_BUDGET_BYTES: Final = 1 << 30
_MAX_EXPANSION: Final = 100


def _no_note(_note: str) -> None:
    """For callers that want no notes."""


def _no_report(_stage: str, _done: int, _total: int | None) -> None:
    """For callers that watch nothing."""


@dataclass(frozen=True)
class Options:
    """How a source is to be read; each importer looks at what concerns it."""

    tokenizer: Literal["char", "byte", "bpe"] = "char"
    """What cuts a text into tokens."""
    vocab_size: int = 8192
    """Of a trained tokenizer."""
    text_columns: frozenset[str] = frozenset()
    """Columns of a table to be taken as text whatever they hold."""
    missing: Literal["refuse", "fill"] = "refuse"
    """Whether what is not there becomes NaN, or an empty text or list."""
    decode: tuple[int, int] | None = None
    """Width and height to which images are decoded; encoded files are kept as they are if None."""
    max_bytes: int | None = None
    """What a packed source may unpack to; 1 GiB or 100 times its size if None."""
    vocabulary: tuple[str, ...] = ()
    """Tokens of a tokenizer that is there already, which is then used instead of a new one."""
    split: str | None = None
    """Puts all samples of a source into one split of this name."""
    block: int = 128
    """Tokens of a sample of text."""
    scratch: Path = Path()
    """A folder for what does not fit into memory; it vanishes after the import."""
    report: Report = field(default=_no_report, compare=False)
    note: Callable[[str], None] = field(default=_no_note, compare=False)
    """Told what a source's owner should know, for instance of files that were left out."""


@dataclass(frozen=True)
class Outline:
    """What a source holds."""

    columns: Mapping[str, Column]
    samples: int
    splits: Mapping[str, Split] | None = None
    """The source's own, which then stay as they are."""
    held_out: str = "test"
    """What the last share is called where a source has no splits of its own."""
    is_sequence: bool = False
    """Whether samples follow each other, as in a text, and are never mixed."""
    sample_bytes: int = 0
    """About, on the average."""
    description: str = ""
    licence: str = ""
    notes: tuple[str, ...] = ()
    """What its owner should know, for instance of files that were left out."""


class Source(Protocol):
    """Something that can be imported."""

    @property
    def outline(self) -> Outline: ...

    def chunks(self) -> Iterator[Chunk]:
        """All samples in the order of the source."""
        ...


@runtime_checkable
class RandomSource(Source, Protocol):
    """One whose samples can be had in any order."""

    def take(self, rows: Positions) -> Chunk:
        """Samples (N,) in that order."""
        ...


class Budget:
    """Bytes that a packed source may still unpack to."""

    def __init__(self, name: str, *, packed_bytes: int, max_bytes: int | None) -> None:
        self._name = name
        self._limit = max(_MIN_BUDGET_BYTES, _MAX_EXPANSION * packed_bytes) if max_bytes is None else max_bytes
        self._spent = 0

    def spend(self, num_bytes: int) -> None:
        """Raises InvalidField when the source has unpacked to more than it may."""
        self._spent += num_bytes
        if self._spent > self._limit:
            raise unreadable(
                self._name,
                f"it unpacks to more than {self._limit} bytes",
                hint="if that is right, allow it with --max-bytes",
            )


def unreadable(name: str, problem: str, *, hint: str = "") -> InvalidField:
    """The error for a source that is not what it should be."""
    return InvalidField(field="source", value=name, problem=f"cannot be imported: {problem}", hint=hint)


def column_names(keys: Iterable[str]) -> dict[str, str]:
    """A name that a column may have for each key; raises InvalidField if two would have the same, InvalidName."""
    names: dict[str, str] = {}
    for key in keys:
        name = checked_name(re.sub(r"[^a-z0-9._-]+|\.{2,}", "_", key.lower()).strip("_.-"), kind="column")
        if name in names.values():
            raise InvalidField(field=f"columns.{name}", value=key, problem="another column has this name already")
        names[key] = name
    return names


def check_text_columns(options: Options, names: Iterable[str], *, file: str) -> None:
    """Raises InvalidField for a column that is to be taken as text and is not there."""
    known = list(names)
    for name in sorted(options.text_columns - set(known)):
        raise InvalidField(
            field="text", value=name, problem=f"{file!r} has no such column", hint=f"it has {', '.join(known)}"
        )


def is_class(name: str) -> bool:
    """Whether a column's name says that it holds classes; `image.cls` does as `cls` does."""
    return name.rpartition(".")[2] in CLASS_COLUMNS


def rows_per_chunk(sample_bytes: int) -> int:
    """How many samples of this size a chunk may hold."""
    return max(1, min(CHUNK_ROWS, CHUNK_BYTES // max(sample_bytes, 1)))


def ragged(parts: list[Array], *, empty: Array) -> Ragged:
    """Samples of different lengths as one column; `empty` gives dtype and shape where there is nothing to join."""
    lengths = np.fromiter((len(part) for part in parts), np.int64, len(parts))
    offsets = np.zeros(len(parts) + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return Ragged(np.concatenate([empty, *parts]), offsets)


def gathered(found: Ragged, rows: Positions) -> Ragged:
    """Samples (N,) of a column, in that order; short ones in one call, long ones each by a copy of its own."""
    starts, lengths = found.offsets[rows], found.offsets[rows + 1] - found.offsets[rows]
    offsets = np.zeros(len(rows) + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    item_bytes = found.values[:1].nbytes or 1
    if offsets[-1] * item_bytes > _SHORT_BYTES * len(rows):
        pieces = [found[row] for row in rows.tolist()]
        return Ragged(np.concatenate([found.values[:0], *pieces]), offsets)
    items = np.repeat(starts - offsets[:-1], lengths)
    items += np.arange(len(items))
    return Ragged(found.values[items], offsets)


def ragged_bytes(parts: list[bytes]) -> Ragged:
    """Byte strings as one column."""
    offsets = np.zeros(len(parts) + 1, np.int64)
    np.cumsum(np.fromiter((len(part) for part in parts), np.int64, len(parts)), out=offsets[1:])
    return Ragged(np.frombuffer(b"".join(parts), np.uint8), offsets)


def num_samples(chunk: Chunk) -> int:
    """Samples in a chunk."""
    return len(next(iter(chunk.values())))


def num_bytes(values: Values) -> int:
    """Bytes of a column of a chunk, without its offsets."""
    return values.values.nbytes if isinstance(values, Ragged) else values.nbytes

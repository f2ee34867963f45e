"""More samples for a dataset that is there: its own tokens, classes and types are kept, whatever the new source has."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Final, Literal

import numpy as np

from railbus.importers.bpe import ENCODING
from railbus.importers.scratch import scratch_folder
from railbus.importers.source import Array, Chunk, Options, Outline, Values, num_samples
from railbus.importing import opened_source
from railbus_shared.contracts.artifacts import Column
from railbus_shared.data.index import DatasetIndex
from railbus_shared.data.ragged import Ragged
from railbus_shared.data.readers import numpy_dtype
from railbus_shared.data.writer import SHARD_BYTES, append_dataset
from railbus_shared.errors import InvalidField
from railbus_shared.layout import Layout

_TOKENS: Final = "tokens"


def append_source(
    layout: Layout,
    index: DatasetIndex,
    source: str,
    *,
    split: str,
    shard_bytes: int = SHARD_BYTES,
    options: Options | None = None,
) -> DatasetIndex:
    """Write a source's samples behind those of a dataset, in their order, and return the new version's index.

    Classes and symbols are matched by their names. Raises InvalidField where the source does not fit the dataset.
    """
    with scratch_folder(layout) as scratch:
        wishes = dataclasses.replace(_as_before(index, options or Options()), scratch=scratch)
        found = opened_source(source, wishes)
        fits = _fits(index.schema.columns, found.outline)
        chunks = _fitted(found.chunks(), fits, wishes, found.outline.samples)
        return append_dataset(layout, index.schema.name, chunks, split=split, shard_bytes=shard_bytes)


def _as_before(index: DatasetIndex, options: Options) -> Options:
    """Options by which a text is cut into the tokens that the dataset has."""
    tokens = index.schema.columns.get(_TOKENS)
    if tokens is None or len(tokens.shape) != 1:
        return options
    kind: Literal["bpe", "char", "byte"] = "bpe" if tokens.encoding == ENCODING else "char" if tokens.labels else "byte"
    return dataclasses.replace(options, tokenizer=kind, vocabulary=tokens.labels, block=tokens.shape[0] - 1)


def _fits(columns: Mapping[str, Column], outline: Outline) -> dict[str, _Fit]:
    if columns.keys() != outline.columns.keys():
        raise InvalidField(
            field="columns",
            value=sorted(outline.columns),
            problem="not the columns of the dataset",
            hint=f"it has {', '.join(sorted(columns))}",
        )
    return {name: _Fit.of(name, column, outline.columns[name]) for name, column in columns.items()}


@dataclasses.dataclass(frozen=True)
class _Fit:
    """How values of a source become those of a column."""

    dtype: np.dtype[np.generic]
    numbers: Array | None
    """The dataset's number for each number of a class or symbol of the source."""

    @classmethod
    def of(cls, name: str, column: Column, new: Column) -> _Fit:
        """Raises InvalidField if the source's column does not fit."""
        if (column.shape, column.variable_length) != (new.shape, new.variable_length):
            raise _misfit(name, column, new)
        if column.labels and new.labels and column.labels != new.labels:
            known = {label: number for number, label in enumerate(column.labels)}
            if unknown := [label for label in new.labels if label not in known]:
                raise InvalidField(
                    field=f"columns.{name}",
                    value=unknown[0],
                    problem=f"the dataset has no such class or symbol ({len(unknown)} are new)",
                    hint="import everything together under a new name",
                )
            return cls(numpy_dtype(column), np.array([known[label] for label in new.labels]))
        if not np.can_cast(numpy_dtype(new), numpy_dtype(column), "same_kind"):
            raise _misfit(name, column, new)
        return cls(numpy_dtype(column), None)

    def apply(self, values: Values) -> Values:
        if isinstance(values, Ragged):
            return Ragged(values.values.astype(self.dtype, copy=False), values.offsets)
        found = values if self.numbers is None else self.numbers[values]
        return found.astype(self.dtype, copy=False)


def _misfit(name: str, column: Column, new: Column) -> InvalidField:
    shown, expected = (f"{one.dtype}{list(one.shape)}{' …' if one.variable_length else ''}" for one in (new, column))
    return InvalidField(field=f"columns.{name}", value=shown, problem=f"the dataset has {expected}")


def _fitted(chunks: Iterator[Chunk], fits: Mapping[str, _Fit], options: Options, samples: int) -> Iterator[Chunk]:
    done = 0
    for chunk in chunks:
        yield {name: fits[name].apply(values) for name, values in chunk.items()}
        done += num_samples(chunk)
        options.report("writing", done, samples)

"""Several sources as one dataset with a split for each, for instance the folders `train` and `test`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

from railbus.importers.source import Chunk, Outline, Source
from railbus_shared.contracts.artifacts import Column, Split
from railbus_shared.errors import InvalidField

SPLIT_NAMES: Final = ("train", "validation", "valid", "val", "dev", "test")
"""Folders and files that are so called hold a split each, in this order."""


def split_folders(folder: Path) -> dict[str, Path]:
    """Folders in a folder that are called like splits; empty unless there is one for training."""
    found = {name: folder / name for name in SPLIT_NAMES if (folder / name).is_dir()}
    return found if "train" in found else {}


class Joined:
    """Sources one after the other; each is a split, and their columns are the same."""

    def __init__(self, sources: Mapping[str, Source]) -> None:
        """Raises InvalidField if the columns differ."""
        self._sources = sources
        outlines = {name: source.outline for name, source in sources.items()}
        splits: dict[str, Split] = {}
        first = 0
        for name, outline in outlines.items():
            splits[name] = Split(first=first, samples=outline.samples)
            first += outline.samples
        self.outline = Outline(
            columns=_same_columns({name: outline.columns for name, outline in outlines.items()}),
            samples=first,
            splits=splits,
            sample_bytes=max(outline.sample_bytes for outline in outlines.values()),
            notes=tuple(f"{name}: {note}" for name, outline in outlines.items() for note in outline.notes),
        )

    def chunks(self) -> Iterator[Chunk]:
        for source in self._sources.values():
            yield from source.chunks()


def _same_columns(found: Mapping[str, Mapping[str, Column]]) -> dict[str, Column]:
    (first_name, first), *others = found.items()
    columns = dict(first)
    for name, other in others:
        if columns.keys() != other.keys():
            raise InvalidField(
                field="columns", value=sorted(other), problem=f"split {name!r} has these, but {first_name!r} others"
            )
        for key, column in other.items():
            columns[key] = _wider(key, columns[key], column, names=(first_name, name))
    return columns


def _wider(key: str, one: Column, other: Column, *, names: tuple[str, str]) -> Column:
    """The column that holds both: there may be more classes in one split than in the other."""
    alike = one.changed(num_classes=None, labels=(), encoding="") == other.changed(
        num_classes=None, labels=(), encoding=""
    )
    if not alike or (one.labels and other.labels and one.labels != other.labels):
        raise InvalidField(
            field=f"columns.{key}",
            value=f"{other.dtype}{list(other.shape)}",
            problem=f"split {names[1]!r} holds something else than {names[0]!r}",
        )
    most = None if None in {one.num_classes, other.num_classes} else max(one.num_classes or 0, other.num_classes or 0)
    encoding = one.encoding if one.encoding == other.encoding else "image"
    return one.changed(num_classes=most, labels=one.labels or other.labels, encoding=encoding)

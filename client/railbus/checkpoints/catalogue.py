"""Which checkpoints there are: their metas, and where they lie.

A meta that is none (`railbus_shared.metas`) hides no other.
"""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from railbus_shared.contracts.artifacts import CheckpointMeta
from railbus_shared.errors import CheckpointCorrupt, CheckpointNotFound, ModelNotFound
from railbus_shared.layout import Layout, checkpoint_number
from railbus_shared.metas import ENDING, read_meta

_META: Final = "checkpoint-*.meta.json"
_SHOWN: Final = 10

Damaged = Callable[[Path, CheckpointCorrupt], None]


@dataclass(frozen=True)
class Checkpoint:
    """A meta and where it lies."""

    path: Path
    meta: CheckpointMeta
    meta_sha256: str
    """Of the bytes of the meta."""

    @property
    def folder(self) -> Path:
        return self.path.parent

    @property
    def num_bytes(self) -> int:
        return sum(file.bytes for file in self.meta.files)

    @property
    def name(self) -> str:
        return self.path.name.removesuffix(ENDING)

    @property
    def title(self) -> str:
        """Model and number, as the commands take them."""
        return f"{self.meta.model} {self.meta.number}"


def model_names(layout: Layout) -> list[str]:
    """Models that have a folder of checkpoints."""
    return sorted(
        path.parent.name for path in layout.models.glob("*/checkpoints") if not path.parent.name.startswith(".")
    )


def known_model(layout: Layout, name: str) -> str:
    """The name itself; raises ModelNotFound with the nearest one, InvalidName."""
    if layout.checkpoints(name).is_dir():
        return name
    known = model_names(layout)
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"there are: {', '.join(known) or 'none'}"
    raise ModelNotFound(f"model has value {name!r}: it has no checkpoints under {str(layout.models)!r}", hint=hint)


def numbered(layout: Layout, model: str) -> dict[int, Path]:
    """Paths of all metas of a model that have their final name, oldest first; none of them is opened."""
    found = {checkpoint_number(path.name): path for path in layout.checkpoints(model).glob(_META)}
    return {number: found[number] for number in sorted(number for number in found if number is not None)}


def read_all(layout: Layout, model: str, *, damaged: Damaged) -> Iterator[Checkpoint]:
    """A model's checkpoints, oldest first; `damaged` is told of a meta that is none, which is left out."""
    for path in numbered(layout, model).values():
        try:
            yield read(path, model=model)
        except FileNotFoundError:
            continue  # a newer one has replaced it just now
        except CheckpointCorrupt as exc:
            damaged(path, exc)


def read(path: Path, *, model: str | None = None) -> Checkpoint:
    """The checkpoint of a meta, which must be that of its file name, and of `model` if that is given.

    Raises CheckpointCorrupt, FileNotFoundError.
    """
    meta, data = read_meta(path, model=model)
    return Checkpoint(path, meta, hashlib.sha256(data).hexdigest())


def at(path: Path) -> Checkpoint:
    """The checkpoint that a path of one of its files means: the meta, the `.pt`, the folder `.dcp`, or without ending.

    Raises CheckpointNotFound, CheckpointCorrupt.
    """
    stem = path.name.removesuffix(ENDING).removesuffix(".pt").removesuffix(".dcp")
    meta = path.with_name(stem + ENDING)
    if checkpoint_number(meta.name) is None:
        raise CheckpointNotFound(
            f"path has value {str(path)!r}: not the name of a checkpoint",
            hint="name a file checkpoint-000123.meta.json, or a model and a number",
        )
    try:
        return read(meta)
    except FileNotFoundError as exc:
        raise CheckpointNotFound(
            f"path has value {str(path)!r}: there is no {meta.name} beside it",
            hint="a file without a meta is no checkpoint",
        ) from exc


def find(layout: Layout, model: str, number: int | None, *, damaged: Damaged) -> Checkpoint:
    """A model's checkpoint of this number, or its newest whose meta is one; `damaged` is told of newer ones.

    Raises ModelNotFound, CheckpointNotFound, and CheckpointCorrupt if the meta that is asked for is none.
    """
    paths = numbered(layout, known_model(layout, model))
    if number is not None and number in paths:
        return read(paths[number], model=model)
    for path in reversed(paths.values()) if number is None else ():
        try:
            return read(path, model=model)
        except CheckpointCorrupt as exc:
            damaged(path, exc)
        except FileNotFoundError:
            continue  # a newer one has replaced it just now
    known = ", ".join(map(str, list(paths)[-_SHOWN:]))
    what = f"has no checkpoint {number}" if number is not None else "has no checkpoint"
    raise CheckpointNotFound(f"model {model!r} {what}", hint=f"there are: {known}" if known else "train it first")

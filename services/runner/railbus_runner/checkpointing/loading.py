"""Which checkpoint is read, and that it is what its meta says.

Whatever is read is hashed before a byte of it is unpickled (`state_file`); what does not match its meta, or has no
hash, is passed over for the next older one.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Self, cast

import torch

from railbus_runner.checkpointing.filling import Placement
from railbus_runner.checkpointing.proving import NotProven, prove
from railbus_runner.checkpointing.state_file import open_plain, open_state
from railbus_runner.checkpointing.store import CheckpointStore
from railbus_runner.checkpointing.tensor_file import TensorFile
from railbus_shared.contracts.artifacts import CheckpointFile, CheckpointMeta
from railbus_shared.errors import CheckpointCorrupt, RailbusError
from railbus_shared.layout import checkpoint_stem

State = dict[str, object]
Live = Callable[[CheckpointMeta], Collection[str]]
"""Names of a checkpoint's tensors, as in `CheckpointMeta.tensors`, for which there are live ones to read into."""


@dataclass(frozen=True)
class InMemory:
    """A state that has been read already, with what a `StateFile` has."""

    state: object

    def place(self, saved: torch.Tensor, target: torch.Tensor) -> Placement | None:
        """No values are to be read: its tensors have theirs."""
        del saved, target
        return None

    def fill(self, state: object, placements: Iterable[Placement] = ()) -> int:
        """Nothing is read."""
        del state, placements
        return 0

    def close(self) -> None:
        """Nothing is open."""


@dataclass(frozen=True)
class Opened:
    """A checkpoint whose bytes matched its meta, to be used as a context; its tensors' values are still in the file."""

    meta: CheckpointMeta
    file: TensorFile | InMemory

    @property
    def state(self) -> State:
        return cast("State", self.file.state)

    def read(self) -> State:
        """The whole state, its values in memory of their own."""
        self.file.fill(self.state)
        return self.state

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()


def _none_live(_meta: CheckpointMeta) -> Collection[str]:
    return ()


def newest(
    store: CheckpointStore, *, rejected: Callable[[int, RailbusError], None], live: Live = _none_live
) -> Opened | None:
    """The newest checkpoint of the store's job that is what its meta says; tells `rejected` of each that is not."""
    for meta in store.own_metas(rejected=rejected):
        try:
            return open_checkpoint(store.folder, meta, live=live)
        except CheckpointCorrupt as exc:
            rejected(meta.number, exc)
    return None


def named(store: CheckpointStore, stem: str, *, live: Live = _none_live) -> Opened:
    """The model's checkpoint of this name, of whatever job; raises CheckpointNotFound, CheckpointCorrupt."""
    return open_checkpoint(store.folder, store.named(stem), live=live)


def open_checkpoint(folder: Path, meta: CheckpointMeta, *, live: Live = _none_live) -> Opened:
    """Prove all files of a checkpoint, and open its state; raises CheckpointCorrupt."""
    if meta.format == "dcp":
        from railbus_runner.checkpointing import sharded  # noqa: PLC0415 - few need it

        return as_stated(Opened(meta, InMemory(sharded.load_whole(folder, meta))), folder)
    for extra in meta.files[1:]:
        _prove(folder, extra)
    own = set(live(meta))
    ahead = {place.offset for name, place in meta.tensors.items() if name not in own}
    first = meta.files[0]
    file = open_state(folder / first.file, nbytes=first.bytes, sha256=first.sha256, ahead=ahead)
    if not isinstance(file.state, dict):
        file.close()
        raise CheckpointCorrupt(path=str(file.path), expected="a map of states", actual=type(file.state).__name__)
    return as_stated(Opened(meta, file), folder)


def as_stated(opened: Opened, folder: Path) -> Opened:
    """The same, if its state is of the step that its meta says, for no hash proves a meta; raises CheckpointCorrupt."""
    meta, step = opened.meta, opened.state.get("step")
    if step != meta.step:
        opened.file.close()
        path = folder / f"{checkpoint_stem(meta.number)}.meta.json"
        raise CheckpointCorrupt(path=str(path), expected=f"step {step}, as in the state", actual=f"step {meta.step}")
    return opened


def _prove(folder: Path, stated: CheckpointFile) -> None:
    path = folder / stated.file
    descriptor, _ = open_plain(path, stated.bytes)
    try:
        prove(descriptor, nbytes=stated.bytes, sha256=stated.sha256)
    except NotProven as exc:
        raise CheckpointCorrupt(path=str(path), expected=exc.expected, actual=exc.actual) from exc
    except OSError as exc:
        raise CheckpointCorrupt(
            path=str(path), expected=f"{stated.bytes} bytes", actual=os.strerror(exc.errno or 0)
        ) from exc
    finally:
        os.close(descriptor)

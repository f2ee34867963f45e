"""The states of checkpoints, read only when proven.

Whatever is read is hashed before a byte of it is unpickled, and is unpickled with `weights_only`; what does not match
its meta, or has no hash, is passed over for the next older one.
"""

from __future__ import annotations

import hashlib
import os
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Final, cast

import torch

from railbus_runner.checkpointing.store import CheckpointStore
from railbus_shared.contracts.artifacts import CheckpointFile, CheckpointMeta
from railbus_shared.errors import CheckpointCorrupt, RailbusError

State = dict[str, object]

_ZIP: Final = b"PK\x03\x04"
_NO_STATE: Final = (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, LookupError, TypeError, AttributeError)
"""What torch makes of bytes that have the right hash but hold no state that `weights_only` allows."""


@dataclass(frozen=True)
class Loaded:
    """A checkpoint whose bytes matched its meta."""

    meta: CheckpointMeta
    state: State


def newest(store: CheckpointStore, *, rejected: Callable[[int, RailbusError], None]) -> Loaded | None:
    """The newest checkpoint of the store's job that is what its meta says; tells `rejected` of each that is not."""
    for meta in store.own_metas(rejected=rejected):
        try:
            return load(store.folder, meta)
        except CheckpointCorrupt as exc:
            rejected(meta.number, exc)
    return None


def named(store: CheckpointStore, stem: str) -> Loaded:
    """The model's checkpoint of this name, of whatever job; raises CheckpointNotFound, CheckpointCorrupt."""
    return load(store.folder, store.named(stem))


def load(folder: Path, meta: CheckpointMeta) -> Loaded:
    """The state in the first file of a checkpoint, all of whose files are hashed before; raises CheckpointCorrupt."""
    for extra in meta.files[1:]:
        with _open(folder, extra) as file:
            _verify(file, extra)
    with _open(folder, meta.files[0]) as file:
        _verify(file, meta.files[0])
        file.seek(0)
        if file.peek(4)[:4] != _ZIP:  # else torch would try older formats
            raise CheckpointCorrupt(path=file.name, expected="a file of torch.save", actual="another format")
        try:
            state = cast("State", torch.load(file, map_location="cpu", weights_only=True))
        except _NO_STATE as exc:
            raise CheckpointCorrupt(path=file.name, expected="tensors and plain containers", actual=str(exc)) from exc
    return Loaded(meta, state)


def _open(folder: Path, expected: CheckpointFile) -> BufferedReader:
    path = folder / expected.file
    try:
        return path.open("rb")
    except OSError as exc:
        raise CheckpointCorrupt(path=str(path), expected=f"{expected.bytes} bytes", actual=str(exc)) from exc


def _verify(file: BufferedReader, expected: CheckpointFile) -> None:
    """Raises CheckpointCorrupt unless the open file has the size and hash that its meta states."""
    size = os.fstat(file.fileno()).st_size
    if size != expected.bytes:
        raise CheckpointCorrupt(path=file.name, expected=f"{expected.bytes} bytes", actual=f"{size} bytes")
    digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != expected.sha256:
        raise CheckpointCorrupt(path=file.name, expected=f"sha256 {expected.sha256}", actual=f"sha256 {digest}")

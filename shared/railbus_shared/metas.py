"""Reads the commit record of a checkpoint. Reading is total: whatever lies in its place, also a pipe, a link that leads
away or a gigabyte of JSON, is a valid meta or a CheckpointCorrupt that names it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from railbus_shared import wire
from railbus_shared.contracts.artifacts import CheckpointMeta
from railbus_shared.errors import CheckpointCorrupt, WireError
from railbus_shared.layout import checkpoint_number, checkpoint_stem
from railbus_shared.plain_files import opened

MAX_META_BYTES: Final = 16 << 20
ENDING: Final = ".meta.json"


def read_meta(path: Path, *, model: str | None = None) -> tuple[CheckpointMeta, bytes]:
    """The meta in a file, and the file's bytes.

    It must be that of the file's name, which may be the temporary one, and of `model` if that is given. Raises
    CheckpointCorrupt, FileNotFoundError.
    """
    with opened(path.parent, path.name) as file:
        data = file.read(MAX_META_BYTES + 1)
    try:
        meta = CheckpointMeta.parse(wire.decode(data, limit_bytes=MAX_META_BYTES))
    except WireError as exc:
        raise CheckpointCorrupt(path=str(path), expected="a valid meta", actual=exc.message) from exc
    name = path.name.removeprefix(".").removesuffix(".tmp")
    if (meta.number, meta.model) != (checkpoint_number(name), model or meta.model):
        raise CheckpointCorrupt(
            path=str(path),
            expected=f"the meta of {name.removesuffix(ENDING)}" + (f" of {model!r}" if model else ""),
            actual=f"that of {checkpoint_stem(meta.number)} of {meta.model!r}",
        )
    return meta, data

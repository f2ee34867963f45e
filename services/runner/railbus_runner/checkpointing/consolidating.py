"""An ordinary `.pt` of a checkpoint whose tensors were spread over ranks."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from railbus_runner.checkpointing import loading
from railbus_shared import files
from railbus_shared.contracts.artifacts import CheckpointMeta
from railbus_shared.errors import Conflict, InvalidField
from railbus_shared.layout import checkpoint_stem


@dataclass(frozen=True)
class Consolidated:
    """What was written."""

    path: Path
    num_bytes: int
    sha256: str


def consolidate(folder: Path, meta: CheckpointMeta, target: Path) -> Consolidated:
    """Write a spread checkpoint as one file of `torch.save`, whole or not at all; its hashes are proven before.

    The state is in memory once. `folder` is that of the meta; the target must not exist. Raises InvalidField for a
    checkpoint that is one file already, Conflict if the target exists, CheckpointCorrupt, StorageFull.
    """
    if meta.format != "dcp":
        raise InvalidField(
            field="number",
            value=meta.number,
            problem=f"{checkpoint_stem(meta.number)} is one file already",
            hint=f"copy {str(folder / meta.files[0].file)!r}",
        )
    if target.exists() or target.is_symlink():
        raise Conflict(f"target has value {str(target)!r}: it exists", hint="name a new one; nothing is overwritten")
    state = loading.open_checkpoint(folder, meta).read()
    with files.temporary(target) as file:
        torch.save(state, file)
    draft = files.temporary_path(target)
    done = Consolidated(target, draft.stat().st_size, files.sha256_file(draft))
    files.publish(draft, target)
    return done

"""A sharded checkpoint as one file, for as long as it is read."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

from railbus.checkpoints.catalogue import Checkpoint
from railbus_shared.contracts.artifacts import CheckpointFile
from railbus_shared.errors import ConfigError


@contextlib.contextmanager
def as_one_file(one: Checkpoint, *, beside: Path | None = None) -> Iterator[Checkpoint]:
    """The checkpoint itself, or one whose data is a file that is removed afterwards; that needs torch.

    Args:
        one: the checkpoint; what is sharded is verified before it is put together, with all of it in memory.
        beside: where the file goes; by default where temporary files do.

    Raises ConfigError where torch is missing, CheckpointCorrupt, StorageFull.
    """
    if one.meta.format == "torch":
        yield one
        return
    try:
        from railbus_runner.checkpointing.consolidating import consolidate  # noqa: PLC0415 - it loads torch
    except ModuleNotFoundError as exc:
        raise ConfigError(
            f"tensors of several ranks are put together by torch: {exc}", hint="pip install 'railbus[runner]'"
        ) from exc
    with tempfile.TemporaryDirectory(prefix=".railbus-", dir=beside) as folder:
        done = consolidate(one.folder, one.meta, Path(folder) / f"{one.name}.pt")
        file = CheckpointFile(file=done.path.name, bytes=done.num_bytes, sha256=done.sha256)
        meta = one.meta.changed(format="torch", files=(file,), tensors={})
        yield Checkpoint(Path(folder) / one.path.name, meta, one.meta_sha256)

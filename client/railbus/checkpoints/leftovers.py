"""What lies beside a model's checkpoints and is none: drafts, tensors without a meta, and claims on numbers.

Some of it is being written at this moment, so nothing here is wrong by itself. The claim `.serial-000123` says which
attempt writes, or was writing, under a number.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from railbus_shared.layout import Layout

Kind = Literal["draft", "tensors without a meta", "claim"]

_CLAIM: Final = re.compile(r"\.serial-(\d{6,12})\Z")
_DRAFT: Final = re.compile(r"\.checkpoint-(\d{6,12})\.")
_TENSORS: Final = re.compile(r"checkpoint-(\d{6,12})\.(?:pt|dcp)\Z")
_OWNER: Final = re.compile(r"([a-z0-9][a-z0-9_-]{0,63}) (\d{1,18})\s*\Z")
_MAX_CLAIM_BYTES: Final = 200


@dataclass(frozen=True)
class Leftover:
    """A file or folder that belongs to no checkpoint that there is."""

    path: Path
    kind: Kind
    number: int
    num_bytes: int
    """With all that is in it."""
    changed_s: float
    """When it was last changed, seconds since 1970."""
    job: str | None
    """Whose attempt claimed the number; None where no claim says so."""
    lease_epoch: int | None

    def to_map(self) -> dict[str, object]:
        return {
            "path": str(self.path),
            "kind": self.kind,
            "number": self.number,
            "bytes": self.num_bytes,
            "job": self.job,
            "lease_epoch": self.lease_epoch,
        }


def leftovers(layout: Layout, model: str) -> list[Leftover]:
    """All of a model's, by number; an empty claim is none: it keeps its number from being used again."""
    folder = layout.checkpoints(model)
    names = sorted(os.listdir(folder)) if folder.is_dir() else []  # noqa: PTH208 - bare names
    claims = {int(match[1]): _owner(folder / name) for name in names if (match := _CLAIM.match(name))}
    found: list[Leftover] = []
    for name in names:
        kind, number = _kind(name, claims)
        if kind is None or (kind == "tensors without a meta" and layout.checkpoint_meta(model, number).exists()):
            continue
        job, lease_epoch = claims.get(number) or (None, None)
        num_bytes, changed_s = _weight(folder / name)
        found.append(Leftover(folder / name, kind, number, num_bytes, changed_s, job, lease_epoch))
    return sorted(found, key=lambda one: (one.number, one.path.name))


def _kind(name: str, claims: dict[int, tuple[str, int] | None]) -> tuple[Kind | None, int]:
    if match := _DRAFT.match(name):
        return "draft", int(match[1])
    if match := _TENSORS.match(name):
        return "tensors without a meta", int(match[1])
    match = _CLAIM.match(name)
    return ("claim", int(match[1])) if match and claims.get(int(match[1])) else (None, 0)


def _owner(claim: Path) -> tuple[str, int] | None:
    try:
        with claim.open("rb") as file:
            text = file.read(_MAX_CLAIM_BYTES).decode("ascii", "replace")
    except OSError:  # dropped since the folder was listed
        return None
    match = _OWNER.match(text)
    return (match[1], int(match[2])) if match else None


def _weight(path: Path) -> tuple[int, float]:
    """Bytes and time of a file, or of all files in a folder; nothing of what has just gone. Links are not followed."""
    total, newest = 0, 0.0
    inside = [Path(folder) / name for folder, _, names in os.walk(path) for name in names] if path.is_dir() else []
    for one in (path, *inside):
        try:
            status = one.lstat()
        except OSError:
            continue
        total += status.st_size if one is not path or not inside else 0
        newest = max(newest, status.st_mtime)
    return total, newest
